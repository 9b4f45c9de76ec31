"""A test for anyio's pytest plugin, and anyio.run()."""

import anyio
import anyio.lowlevel
import pytest

import homeloop

ON_HOMELOOP = {"loop_factory": homeloop.new_event_loop}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", ON_HOMELOOP


@pytest.mark.anyio
async def test_task_group() -> None:
    assert homeloop.main_context().is_current()
    answers = []

    async def ask(disk: homeloop.IOThread) -> None:
        answers.append(await disk.run(anyio.lowlevel.checkpoint()))

    with homeloop.IOThread("disk") as disk:
        async with anyio.create_task_group() as group:
            group.start_soon(ask, disk)
            group.start_soon(ask, disk)
    assert answers == [None, None]


def test_run() -> None:
    async def main() -> bool:
        return await anyio.to_thread.run_sync(anyio.from_thread.run_sync, homeloop.main_context().is_current)

    assert anyio.run(main, backend_options=ON_HOMELOOP)
