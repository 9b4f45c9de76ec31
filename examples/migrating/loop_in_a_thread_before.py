"""docs/migrating.md: A loop in a thread of its own, before."""

import asyncio
import threading


async def where() -> str:
    return threading.current_thread().name


async def cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.run_until_complete(cancel_all())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def main() -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=serve, args=(loop,), name="disk")
    thread.start()
    print(await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(where(), loop)))
    loop.call_soon_threadsafe(loop.stop)
    await asyncio.to_thread(thread.join)


asyncio.run(main())
