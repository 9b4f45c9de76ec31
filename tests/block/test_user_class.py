"""Classes by name: where they are looked for, what their options become, a sentence for each mistake."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from homeloop.block.user_class import class_name, make_driver
from homeloop.errors import BlockError, UsageError

SOURCE = """
from __future__ import annotations
import dataclasses, enum, errno, pathlib
from typing import Annotated, Any, Literal, Optional
from homeloop.errors import BlockError

class Colour(enum.Enum):
    red = 1
    blue = 2

class Options:
    size = 4096
    def __init__(self, count: int, *, flag: bool = False, ratio: float = 0.5, path: pathlib.Path = None,
                 mode: Literal["fast", "slow", 3] = "fast", colour: Colour = Colour.red, raw: bytes = b"",
                 limit: int | None = 7, either: str | int = 0, maybe: Optional[float] = None, plain="x",
                 noted: Annotated[int, "note"] = 0, odd: dict[str, int] = {}) -> None:
        self.given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
    def read(self, offset, length): return bytes(length)

class Free:
    def __init__(self, size: int, **rest: int) -> None:
        self.given = (size, rest)

class Bare: pass

class Picky:
    def __init__(self, size: int = 0) -> None:
        if size == 1: raise ValueError("one is too few")
        if size == 2: raise BlockError(errno.EBUSY, "taken")

class Unreadable:
    def __init__(self, size: NoSuchType) -> None: pass

@dataclasses.dataclass
class Data:
    size: int = 5

word = "no class"
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "devices.py"
    path.write_text(SOURCE)
    return str(path)


def given(source: str, options: str) -> Any:
    return make_driver(f"{source}:Options?count=1&{options}").given


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("flag=yes", True), ("flag=0", False), ("ratio=1.25", 1.25), ("mode=slow", "slow"), ("mode=3", 3),
        ("raw=ab", b"ab"), ("limit=none", None), ("limit=64k", 65536), ("either=12", 12), ("either=12a", "12a"),
        ("maybe=2.5", 2.5), ("maybe=", None), ("plain=a%26b%3Dc+d", "a&b=c+d"), ("noted=0x10", 16),
    ],
)
def test_conversions(source: str, option: str, value: object) -> None:
    assert given(source, option)[option.partition("=")[0]] == value


def test_more_conversions(source: str) -> None:
    assert given(source, "path=/a/b")["path"] == Path("/a/b")
    assert given(source, "colour=blue")["colour"].name == "blue"
    assert given(source, "count2=1".replace("count2", "noted"))["count"] == 1
    assert make_driver(f"{source}:Free?size=3&a=1&b=2k").given == (3, {"a": 1, "b": 2048})
    assert make_driver(f"{source}:Data?size=9").size == 9
    assert type(make_driver(f"{source}:Bare")).__name__ == "Bare"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("count=x", "option count='x' of Options: not a whole number, nor a size such as 64k"),
        ("count=1&flag=maybe", "not yes or no"),
        ("count=1&ratio=half", "could not convert"),
        ("count=1&mode=medium", "not one of fast, slow, 3"),
        ("count=1&colour=green", "not one of red, blue"),
        ("count=1&limit=x", "not a whole number"),
        ("count=1&odd=x", "it should be dict"),
        ("count=1&nope=1", "Options has no option 'nope', only count, flag"),
        ("count=1&count=2", "option 'count' is given twice"),
        ("count", "option 'count' is not name=value"),
        ("flag=1", "Options needs the option count"),
    ],
)
def test_wrong_options(source: str, options: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_driver(f"{source}:Options?{options}")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Class", "names no class: write python:"),
        ("mod:", "names no class"),
        ("mod:a-b", "names no class"),
        ("no_such_module_at_all:C", "there is no module 'no_such_module_at_all'"),
        ("homeloop.no_such:C", "there is no module 'homeloop.no_such'"),
        ("{folder}/none.py:C", "there is no file"),
        ("{folder}:C", "there is no file"),
        ("{source}:Nope", "has nothing named 'Nope'"),
        ("{source}:word", "has no class named 'word'"),
        ("{source}:Picky?size=1", "Picky(size=1): ValueError: one is too few"),
        ("{source}:Unreadable?size=1", "annotations of Unreadable.__init__ cannot be read"),
    ],
)
def test_wrong_names(source: str, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_driver(text.format(source=source, folder=tmp_path))
    assert says in str(caught.value)


def test_own_errors_pass(source: str) -> None:
    with pytest.raises(BlockError) as caught:
        make_driver(f"{source}:Picky?size=2")
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    ("text", "says"),
    [("import no_such_thing", "No module named"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")],
)
def test_files_that_cannot_be_run(tmp_path: Path, text: str, says: str) -> None:
    """Also not the second time: a module that is half there is not used."""
    path = tmp_path / "broken.py"
    path.write_text(text)
    for _ in range(2):
        with pytest.raises(UsageError, match=says):
            make_driver(f"{path}:C")


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_on_purpose.py").write_text("import no_such_thing")
    (tmp_path / "raising_on_purpose.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="'broken_on_purpose' cannot be imported: No module named 'no_such_thing'"):
        make_driver("broken_on_purpose:C")
    with pytest.raises(UsageError, match="cannot be imported: ZeroDivisionError"):
        make_driver("raising_on_purpose:C")


def test_a_file_is_run_once(source: str) -> None:
    assert type(make_driver(f"{source}:Bare")) is type(make_driver(f"{source}:Bare"))


def test_a_file_that_two_threads_want_at_once(tmp_path: Path) -> None:
    """The second waits for the module, and does not take it half made."""
    path = tmp_path / "slow.py"
    path.write_text(
        "import threading\n"
        "reached, go = threading.Event(), threading.Event()\n"
        "threading.current_thread().gates.append((reached, go))\n"
        "go.wait(20)\n"
        "class Disk:\n"
        "    size = 512\n"
    )
    gates: list[Any] = []
    found: list[Any] = []

    def opens() -> None:
        threading.current_thread().gates = gates        # type: ignore[attr-defined]
        try:
            found.append(make_driver(f"{path}:Disk").size)
        except UsageError as error:
            found.append(error)

    threads = [threading.Thread(target=opens) for _ in range(2)]
    threads[0].start()
    while not gates:
        threads[0].join(0.01)
    threads[1].start()
    threads[1].join(0.2)        # time to do it wrong
    gates[0][1].set()
    for thread in threads:
        thread.join(20)
    assert found == [512, 512]
    assert len(gates) == 1


def test_class_name() -> None:
    assert class_name("a.b:C?x=1:2") == "C"
    assert class_name("a") == "a"
