"""homeloop.block.lending: pieces that do not change, and the reads that are not lent."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from homeloop.block.device import Device
from homeloop.block.lending import LENT_BYTES_MIN
from homeloop.block.memory import PAGE, Memory
from homeloop.errors import BlockError

SIZE = 8 * PAGE


def joined(pieces: Any) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


def test_what_was_lent_does_not_change(seed: int) -> None:
    """Against a model: whatever is done to the memory, pieces that were given away stay as they were."""
    dice = random.Random(seed)
    memory, model = Memory(SIZE), bytearray(SIZE)
    held: list[tuple[Any, bytes]] = []
    for _ in range(400):
        offset = dice.choice([dice.randrange(SIZE), dice.randrange(8) * PAGE])
        length = min(SIZE - offset, dice.choice([1, 4096, PAGE, PAGE + 7, 3 * PAGE]))
        deed = dice.randrange(6)
        if deed < 2:
            data = dice.randbytes(length)
            memory.write(offset, data)
            model[offset : offset + length] = data
        elif deed == 2:
            memory.trim(offset, length)
            model[offset : offset + length] = bytes(length)
        elif deed == 3 and held:
            pieces, was = held.pop(dice.randrange(len(held)))
            assert joined(pieces) == was
        else:
            lent = memory.read_pieces(offset, length)
            was = bytes(model[offset : offset + length])
            if lent is None:
                assert was == bytes(length)
            else:
                assert joined(lent) == was
                held.append((lent, was))
        assert bytes(memory.read(offset, length)) == model[offset : offset + length]
    for pieces, was in held:
        assert joined(pieces) == was


def test_a_page_is_copied_once() -> None:
    memory = Memory(SIZE)
    memory.write(0, b"x" * SIZE)
    pieces = memory.read_pieces(0, SIZE)
    assert pieces is not None
    memory.write(5, b"a")
    page = memory._pages[0]
    memory.write(6, b"b")
    assert memory._pages[0] is page is not pieces[0]
    assert memory._pages[1] is pieces[1]        # not written: not copied


def test_counts_and_what_is_not_lent() -> None:
    async def main() -> None:
        device = Device(Memory(SIZE))
        lending = device.lending
        assert lending is not None
        assert lending.read(0, SIZE) is None                        # a hole: read() says so
        assert device.write(0, b"x" * SIZE) is None
        assert lending.read(0, LENT_BYTES_MIN - 1) is None
        for offset, length in ((-1, LENT_BYTES_MIN), (1, SIZE), (SIZE, LENT_BYTES_MIN)):
            assert lending.read(offset, length) is None
        assert device.statistics().reads == 0
        assert joined(lending.read(1, LENT_BYTES_MIN)) == b"x" * LENT_BYTES_MIN
        assert device.statistics().reads == 1
        assert device.statistics().read_bytes == LENT_BYTES_MIN
        await device.close()
        assert lending.read(0, SIZE) is None
        with pytest.raises(BlockError, match="closed"):
            device.read(0, SIZE)

    asyncio.run(main())


def test_a_class_with_a_read_of_its_own_is_asked_for_it() -> None:
    class Own(Memory):
        def read(self, offset: int, length: int) -> bytes:
            return b"o" * length

    class OwnAsync(Memory):
        async def read(self, offset: int, length: int) -> bytes:        # type: ignore[override]
            return b"o" * length

    class Same(Memory):
        pass

    patched = Memory(SIZE)
    patched.read = lambda _offset, length: b"o" * length                # type: ignore[assignment,method-assign]
    assert Device(Own(SIZE)).lending is None
    assert Device(OwnAsync(SIZE)).lending is None
    assert Device(patched).lending is None
    assert Device(Same(SIZE)).lending is not None


@pytest.mark.parametrize("wrong", [[b"short"], OSError("bad"), None])
def test_a_driver_that_lends_badly_is_read(wrong: Any) -> None:
    class Bad(Memory):
        def read(self, offset: int, length: int) -> bytes:
            return b"r" * length

        def read_pieces(self, offset: int, length: int) -> Any:
            if isinstance(wrong, Exception):
                raise wrong
            return wrong

    lending = Device(Bad(SIZE)).lending
    assert lending is not None
    assert lending.read(0, SIZE) is None
