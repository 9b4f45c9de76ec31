"""What a person types: specs, and a sentence for each mistake."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from homeloop.block import opening
from homeloop.block.device import Device
from homeloop.block.memory import Memory
from homeloop.block.null import Null
from homeloop.block.opening import Spec, default_name, open_device, open_driver, register_kind
from homeloop.errors import BlockError, UsageError


def test_memory() -> None:
    device = open_device("memory:64k")
    assert (device.name, device.size, device.can_write) == ("memory", 65536, True)
    assert open_device("memory:64k", read_only=True).can_write is False


@pytest.mark.parametrize("spell", ["{}", "file:{}"])
def test_file(tmp_path: Path, spell: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    device = open_device(spell.format(image))
    assert (device.name, device.size, device.read_only) == ("disk.img", 4096, False)
    asyncio.run(device.close())


def test_create(tmp_path: Path) -> None:
    image = tmp_path / "new.img"
    asyncio.run(open_device(str(image), size=1 << 20, create=True).close())
    assert image.stat().st_size == 1 << 20


def test_path_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").write_bytes(bytes(512))
    with pytest.raises(UsageError, match="no kind of device 'a'"):
        open_device("a:b")
    for spec in ("./a:b", "file:a:b"):
        device = open_device(spec)
        assert device.name == "a:b"
        asyncio.run(device.close())


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("", {}, "names no file"),
        ("file:", {}, "names no file"),
        ("a\0b", {}, "names no file"),
        ("memory:", {}, "is not a size"),
        ("memory:lots", {}, "'lots' is not a size"),
        ("memory:1G", {"size": 5}, "memory takes its size behind the colon"),
        ("memory:1G", {"create": True}, "needs no creating"),
        ("memroy:1G", {}, "no kind of device 'memroy'"),
        ("tape://host/x", {}, "no kind of device 'tape'"),
    ],
)
def test_nonsense(spec: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_device(spec, **options)    # type: ignore[arg-type]
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BlockError, match=r"cannot open .*nothing\.img: No such file") as caught:
        open_device(str(tmp_path / "nothing.img"))
    assert caught.value.errno == errno.ENOENT


def test_null() -> None:
    device = open_device("null:64k")
    assert (device.name, device.size) == ("null", 65536)
    assert open_device("null:").size == 1 << 30
    with pytest.raises(UsageError, match="are for files"):
        open_device("null:1M", size=1)


def test_python() -> None:
    device = open_device("python:homeloop.block.memory:Memory?size=64k")
    assert (device.name, device.size, device.read_only) == ("Memory", 65536, False)
    assert open_device("python:homeloop.block.memory:Memory?size=64k", read_only=True).read_only
    with pytest.raises(UsageError, match="are for files"):
        open_device("python:homeloop.block.memory:Memory?size=64k", create=True)


def test_kinds_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_kinds", dict(opening._kinds))
    asked: list[Spec] = []

    def opener(spec: Spec) -> Memory:
        asked.append(spec)
        return Memory(4096)

    register_kind("tape+x", opener, form="tape+x://HOST", name=lambda spec: f"tape {spec.rest}")
    register_kind("tape+x", opener)                 # the same again is no mistake
    assert isinstance(open_driver("tape+x://host", read_only=True), Memory)
    assert asked == [Spec(text="tape+x://host", kind="tape+x", rest="//host", read_only=True)]
    assert isinstance(open_device("tape+x:y", name="own"), Device)
    with pytest.raises(UsageError, match="already"):
        register_kind("memory", opener)
    with pytest.raises(UsageError, match="cannot be a kind"):
        register_kind("a b", opener)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("memory:1G", "memory"), ("null:", "null"), ("/a/b.img", "b.img"), ("file:b.img", "b.img"),
        ("python:mod.sub:Class?x=a/b:c", "Class"), ("unknown:/a/b", "b"),
    ],
)
def test_default_names(spec: str, name: str) -> None:
    assert default_name(spec) == name


def test_open_driver() -> None:
    assert isinstance(open_driver("null:1k"), Null)
