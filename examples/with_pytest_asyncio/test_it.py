"""A test for pytest-asyncio."""

import threading

import pytest

import homeloop


async def where() -> str:
    return threading.current_thread().name


@pytest.mark.asyncio
async def test_from_io_thread_and_back() -> None:
    main = homeloop.main_context()              # of the runtime whose loop this is
    assert main.is_current()
    with homeloop.IOThread("disk") as disk:
        assert await disk.run(where()) == "disk"
        assert await homeloop.to_worker(main.call, where()) != "disk"   # driven by the worker, under the big lock
