"""docs/migrating.md: A queue between threads and coroutines, after."""

import homeloop
from homeloop.sync import Channel


async def main() -> None:
    channel: Channel[int] = Channel(2)

    def produce() -> None:
        for number in range(5):
            channel.send(number)
        channel.close()

    producing = homeloop.main_context().worker(produce)
    async for number in channel:
        print(number)
    await producing


homeloop.run(main())
