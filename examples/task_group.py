"""One group, its children in two threads: they begin and end with the block, and the first error ends them all."""

import asyncio

import homeloop


async def count(name: str, to: int) -> str:
    for number in range(to):
        if number == 3:
            raise ValueError(f"{name} met a 3")
        await asyncio.sleep(0)
    context = homeloop.current_context()
    return f"{name} at {context.name if context else 'home'}"


async def forever() -> None:
    await homeloop.park("nothing")


async def main(disk: homeloop.IOThread, net: homeloop.IOThread) -> None:
    async with homeloop.TaskGroup() as group:
        first = group.spawn(count("first", 1), context=disk.context)
        second = group.spawn(count("second", 2), context=net.context)
    print(first.result(), second.result(), sep=", ")            # both have ended

    try:
        async with homeloop.TaskGroup() as group:
            waiting = group.spawn(forever(), context=disk.context, name="waiting")
            group.spawn(count("third", 4), context=net.context)
    except* ValueError as errors:
        print(errors.exceptions[0], "and", waiting.name, "was cancelled:", waiting.cancelled())


with homeloop.IOThread("disk") as disk, homeloop.IOThread("net") as net:
    asyncio.run(main(disk, net))
