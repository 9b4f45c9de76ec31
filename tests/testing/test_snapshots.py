"""The picture has a thin name here; tests/debug/test_snapshots.py has its tests."""

from __future__ import annotations

from homeloop import debug, testing


def test_one_picture() -> None:
    assert testing.snapshot is debug.snapshot
