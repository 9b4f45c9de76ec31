"""One lock and one channel, shared by an IOThread's coroutines, a stock asyncio loop and a plain thread."""

import asyncio
import threading

import homeloop
from homeloop.sync import Channel, Mutex

mutex = Mutex("ledger")
letters: Channel[str] = Channel(2)              # two may wait in it; a third send() waits


async def deposit(who: str) -> None:
    async with mutex:                           # in a coroutine, of any loop
        await letters.send(who)


def thread() -> None:
    with mutex:                                 # in a thread
        letters.send("a thread")


async def mistake() -> str:
    try:
        with mutex:                             # would stop a whole loop: refused at once
            return "got it"
    except homeloop.UsageError as error:
        return type(error).__name__


with homeloop.IOThread("io") as io:
    thread_ = threading.Thread(target=thread)
    thread_.start()
    got = {letters.receive()}
    io.spawn(deposit("an IOThread"))
    got.add(letters.receive())
    asyncio.run(deposit("asyncio.run"))
    got.add(letters.receive())
    thread_.join()
    print(*sorted(got), sep=", ")
    print("with, in a coroutine:", io.call(mistake()))
