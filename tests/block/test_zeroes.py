"""Zero bytes by view and by copy."""

from __future__ import annotations

import pytest

from homeloop.block.zeroes import ZEROES, zeroes


@pytest.mark.parametrize("length", [0, 1, 4096, 1 << 21, (1 << 21) + 1])
def test_length_and_contents(length: int) -> None:
    answer = zeroes(length)
    assert len(answer) == length
    assert bytes(answer) == bytes(length)


def test_nobody_can_write_to_them() -> None:
    with pytest.raises(TypeError):
        ZEROES[0] = 1
    assert memoryview(zeroes(4096)).readonly
