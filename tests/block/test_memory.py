"""Sparse memory: what it takes, what it gives back, and its edges at pages."""

from __future__ import annotations

import random

import pytest

from homeloop.block.memory import PAGE, Memory
from homeloop.errors import UsageError


def test_huge_and_empty() -> None:
    memory = Memory(1 << 62)
    assert memory.allocated_bytes == 0
    memory.write((1 << 62) - 3, b"end")
    assert bytes(memory.read((1 << 62) - 4, 4)) == b"\0end"
    assert memory.allocated_bytes == PAGE


def test_reading_takes_nothing() -> None:
    memory = Memory(1 << 30)
    for offset, length in ((0, 4096), (PAGE - 1, 2), (5, 3 * PAGE), (0, 1 << 22)):
        assert bytes(memory.read(offset, length)) == bytes(length)
    assert memory.allocated_bytes == 0


def test_answer_does_not_change_with_later_writes() -> None:
    memory = Memory(4 * PAGE)
    memory.write(0, b"a" * 4 * PAGE)
    answers = [memory.read(0, 4096), memory.read(0, PAGE), memory.read(100, 2 * PAGE), memory.read(0, 4 * PAGE)]
    copies = [bytes(answer) for answer in answers]
    for offset in range(0, 4 * PAGE, 1024):
        memory.write(offset, b"b" * 1024)           # into the pages
    memory.trim(10, 2 * PAGE)
    memory.write(0, b"b" * 4 * PAGE)                # in place of the pages
    memory.trim(0, 4 * PAGE)
    assert [bytes(answer) for answer in answers] == copies


def test_written_buffer_is_not_kept() -> None:
    memory = Memory(2 * PAGE)
    buffer = bytearray(b"x" * (PAGE + 10))
    memory.write(0, memoryview(buffer))
    buffer[:] = b"y" * len(buffer)          # BufferError here if a view of it were kept
    buffer.clear()
    assert bytes(memory.read(0, PAGE + 10)) == b"x" * (PAGE + 10)


@pytest.mark.parametrize("zero", ["trim", "write_zeroes", "write_zeroes_no_hole"])
def test_whole_pages_are_given_back_and_edges_zeroed(zero: str) -> None:
    memory = Memory(8 * PAGE)
    memory.write(0, b"x" * 8 * PAGE)
    offset, length = PAGE - 100, 3 * PAGE + 300        # the end of page 0, pages 1 to 3, the start of page 4
    if zero == "trim":
        memory.trim(offset, length)
    else:
        memory.write_zeroes(offset, length, may_trim=zero == "write_zeroes")
    assert memory.allocated_bytes == 5 * PAGE
    expected = b"x" * offset + bytes(length) + b"x" * (8 * PAGE - offset - length)
    assert bytes(memory.read(0, 8 * PAGE)) == expected


@pytest.mark.parametrize("pages", [0, 1, 100])
def test_trim_of_far_more_than_is_there(pages: int) -> None:
    memory = Memory(1 << 50)                # page by page this would take minutes
    for number in range(pages):
        memory.write(number << 30, b"x")
    memory.write((1 << 50) - 1, b"z")
    memory.trim(0, (1 << 50) - 1)
    assert memory.allocated_bytes == PAGE
    assert bytes(memory.read((1 << 50) - 2, 2)) == b"\0z"


def test_small_ranges_against_a_model(seed: int) -> None:
    chance = random.Random(seed)
    size = 3 * PAGE
    memory, model = Memory(size), bytearray(size)
    edges = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, size - 1, size]
    for _ in range(300):
        start, end = sorted(chance.choices(edges, k=2))
        if chance.random() < 0.5:
            data = chance.randbytes(end - start)
            memory.write(start, data)
            model[start:end] = data
        else:
            memory.trim(start, end - start)
            model[start:end] = bytes(end - start)
        start, end = sorted(chance.choices(edges, k=2))
        assert bytes(memory.read(start, end - start)) == model[start:end]


def test_close_gives_all_back() -> None:
    memory = Memory(PAGE)
    memory.write(0, b"x")
    memory.close()
    assert memory.allocated_bytes == 0


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_impossible_size(size: int) -> None:
    with pytest.raises(UsageError, match=f"memory of {size} bytes"):
        Memory(size)


def test_resize() -> None:
    """What was cut off does not come back."""
    memory = Memory(3 * PAGE)
    memory.write(0, b"x" * (3 * PAGE))
    memory.resize(PAGE + 100)
    assert memory.size == PAGE + 100
    assert memory.allocated_bytes == 2 * PAGE
    memory.resize(3 * PAGE)
    assert bytes(memory.read(PAGE, 2 * PAGE)) == b"x" * 100 + bytes(2 * PAGE - 100)
