"""docs/migrating.md: A lock for several loops, after."""

import asyncio

import homeloop
from homeloop.sync import Mutex

mutex = Mutex()                 # for coroutines of any loop, and for threads
balance = 0


async def deposit() -> None:
    global balance
    for _ in range(10):
        async with mutex:
            before = balance
            await asyncio.sleep(0)
            balance = before + 1


with homeloop.IOThread() as one, homeloop.IOThread() as two:
    for co in [one.spawn(deposit()), two.spawn(deposit())]:
        co.result()
print(balance)
