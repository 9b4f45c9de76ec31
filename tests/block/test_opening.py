"""What a person types: specs and sizes, and a sentence for each mistake."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from homeloop.block.opening import open_device, parse_size
from homeloop.errors import BlockError, UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("512", 512),
        ("4k", 4096),
        ("4K", 4096),
        ("1M", 1 << 20),
        ("1m", 1 << 20),
        ("3G", 3 << 30),
        ("2T", 2 << 40),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "+1", "1.5G", "1 G", " 1", "1\n", "0x10", "1e9", "1GB", "1P", "٣", "1_000", "9" * 21]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["9223372036854775808", "8388608T"])
def test_size_beyond_any_device(text: str) -> None:
    with pytest.raises(UsageError, match="more than a device can have"):
        parse_size(text)


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
        ("nbd://host/x", {}, "no kind of device 'nbd'"),
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
