"""The traits of a driver: read once, checked, and refused with a sentence that names driver and value."""

from __future__ import annotations

import pytest

from homeloop.block.driver import BlockSize, traits_of
from homeloop.errors import UsageError


class Least:
    size = 1 << 20

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


def driver_with(**attributes: object) -> Least:
    driver = Least()
    for name, value in attributes.items():
        setattr(driver, name, value)
    return driver


def test_defaults() -> None:
    traits = traits_of(Least())
    assert traits.size == 1 << 20
    assert traits.block_size == BlockSize(minimum=1, preferred=4096, maximum=1 << 25)
    assert traits.thread_model == "serialised"
    assert not traits.read_only
    assert not traits.multi_conn


def test_size_may_be_a_property() -> None:
    class Computed(Least):
        size = property(lambda self: 512)

    assert traits_of(Computed()).size == 512


def test_preferred_follows_a_large_minimum() -> None:
    assert traits_of(driver_with(block_size_min=65536)).block_size.preferred == 65536


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"size": -1}, "size is -1"),
        ({"size": 1 << 63}, "size is 9223372036854775808"),
        ({"size": "1G"}, "size is '1G'"),
        ({"size": 1.5}, "size is 1.5"),
        ({"size": None}, "size is None"),
        ({"size": 1000, "block_size_min": 512}, "size is 1000, not a multiple of its block_size_min 512"),
        ({"block_size_min": 0}, "block_size_min is 0"),
        ({"block_size_min": 3}, "block_size_min is 3"),
        ({"block_size_min": 131072}, "block_size_min is 131072"),
        ({"block_size_min": True}, "block_size_min is True"),
        ({"block_size_preferred": 256}, "block_size_preferred is 256"),
        ({"block_size_preferred": 4097}, "block_size_preferred is 4097"),
        ({"block_size_preferred": 1 << 26}, "block_size_preferred is 67108864"),
        ({"block_size_min": 8192, "block_size_preferred": 4096}, "from 8192 to"),
        ({"thread_model": "fast"}, "thread_model is 'fast'"),
    ],
)
def test_broken_traits(attributes: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=r"^Least\.") as caught:
        traits_of(driver_with(**attributes))
    assert says in str(caught.value)
