"""Sizes as people type them."""

from __future__ import annotations

import pytest

from homeloop.block.sizes import parse_size
from homeloop.errors import UsageError


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
