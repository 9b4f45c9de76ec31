"""The documents show the examples as they are, and the examples print what the documents say.

A document shows a file, or what it prints, in a fenced block behind a marker:

    <!-- examples/home.py -->                   the file, without its docstring
    <!-- output of examples/home.py -->         what it prints
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README_LINES_MAX = 285
RUN_LIMIT_S = 40        # each runs for a second or two; the rest is for a busy machine

BLOCK = re.compile(r"^<!-- (output of )?(examples/\S+) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCSTRING = re.compile(r'\A""".*?"""\n\n', re.DOTALL)
MARKER = re.compile(r"^<!-- (?:output of )?examples/\S+ -->$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

# Programs that an example needs besides Python.
NEEDS: dict[str, tuple[str, ...]] = {"device.py": ("nbdcopy",)}

# Libraries of others that an example shows us with. Not of the dev extra: it is skipped where they are missing.
LIBRARIES = {"web_server.py": "aiohttp", "websocket_echo.py": "websockets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block that stands for an example."""

    document: str
    path: str
    is_output: bool
    text: str


def blocks_of(text: str, document: str) -> list[Block]:
    return [
        Block(document=document, path=match[2], is_output=bool(match[1]), text=match[3])
        for match in BLOCK.finditer(text)
    ]


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path.read_text(encoding="utf-8"), path.name)]


def test_markers_have_their_blocks() -> None:
    """A marker that is not followed by a block would show nothing, and check nothing."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert len(MARKER.findall(text)) == len(blocks_of(text, path.name)), path.name


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if not block.is_output],
    ids=lambda block: f"{block.document}-{Path(block.path).name}",
)
def test_document_shows_the_file(block: Block) -> None:
    file = DOCSTRING.sub("", (ROOT / block.path).read_text(encoding="utf-8"))
    assert block.text == file, f"{block.document} does not show {block.path} as it is: copy the file into the block"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.foreign(*NEEDS.get(path.name, ()))) for path in EXAMPLES],
    ids=lambda path: path.name,
)
def test_example_prints_what_the_documents_say(path: Path, tmp_path: Path) -> None:
    library = LIBRARIES.get(path.name)
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"not installed: the library {library}")
    said = [block.text for block in BLOCKS if block.is_output and ROOT / block.path == path]
    assert said, f"no document says what {path.name} prints: add <!-- output of examples/{path.name} -->"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONWARNINGS": "error",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False,
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    for text in said:
        assert run.stdout == text


def test_links_within_the_repository_lead_somewhere() -> None:
    for path in DOCUMENTS:
        prose = FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in LINK.findall(prose):
            if "://" in target or target.startswith("#"):
                continue
            file = (path.parent / target.partition("#")[0]).resolve()
            assert file.exists(), f"{path.name} links to {target}, which is not there"


def test_readme_stays_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").count("\n")
    assert lines <= README_LINES_MAX, f"README.md has {lines} lines: move what is not for the first look to docs/"


def test_block_parser_sees_a_wrong_block() -> None:
    """What the tests above lean on: text, path and kind of a block are found."""
    text = "x\n<!-- examples/a.py -->\n```python\none\n```\n\n<!-- output of examples/a.py -->\n```text\ntwo\n```\n"
    found = [(block.path, block.is_output, block.text) for block in blocks_of(text, "README.md")]
    assert found == [("examples/a.py", False, "one\n"), ("examples/a.py", True, "two\n")]
