"""What mkdocs does not do by itself to make the built documents of docs/: run by it, see mkdocs.yml.

Pages link to files of the repository as one reads them there (`../examples/home.py`). Each such file comes along, a
Markdown file as a page, any other as plain text. Help texts of the command are printed into their page.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
HELP = re.compile(r"^<!-- help of (.*) -->$", re.MULTILINE)
ELSEWHERE = "repository"                # the folder of the built pages for what is not in docs/


def built_path(path: str) -> str:
    """Where the file `path` of the repository is found among the sources of the built pages."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{ELSEWHERE}/{path}" + ("" if path.endswith(".md") else ".txt")


def repository_path(built: str) -> str:
    return built.removeprefix(f"{ELSEWHERE}/") if built.startswith(f"{ELSEWHERE}/") else f"docs/{built}"


def targets(text: str, path: str) -> set[str]:
    """The files of the repository that the page `path` links to."""
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)}
    return {target for target in found if (ROOT / target).is_file()}


def on_files(files: Files, *, config: Any) -> Files:
    """Adds what the pages link to, and what those link to in turn."""
    files.append(File.generated(config, "pygments.css", content=HtmlFormatter().get_style_defs(".highlight")))
    left = [repository_path(file.src_uri) for file in files.documentation_pages()]
    while left:
        path = left.pop()
        for target in targets((ROOT / path).read_text(encoding="utf-8"), path):
            if target.startswith("docs/") or files.get_file_from_path(built_path(target)):
                continue
            text = (ROOT / target).read_text(encoding="utf-8")
            file = File.generated(config, built_path(target), content=text)
            files.append(file)
            if target.endswith(".md"):
                file.inclusion = file.inclusion.NOT_IN_NAV
                left.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Puts help texts in, and makes links into the repository links between the built pages."""
    path = repository_path(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        return posixpath.relpath(built_path(target), here or ".") if (ROOT / target).is_file() else match[1]

    return HELP.sub(lambda match: help_text(match[1].split()), LINK.sub(moved, markdown))


def help_text(words: list[str]) -> str:
    """What `homeloop WORDS --help` prints, as a block; raises CalledProcessError if there is no such command."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT / "src")}
    printed = subprocess.run(
        [sys.executable, "-m", *words, "--help"],
        env=environment, check=True, capture_output=True, text=True, timeout=60,
    )
    return f"```text\n{printed.stdout}```"
