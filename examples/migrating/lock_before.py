"""docs/migrating.md: A lock for several loops, before."""

import asyncio
import threading

lock = threading.Lock()         # an asyncio.Lock is for one loop: shared by two, it hangs once both want it
balance = 0


async def deposit() -> None:
    global balance
    for _ in range(10):
        await asyncio.to_thread(lock.acquire)           # a thread for each wait
        try:
            before = balance
            await asyncio.sleep(0)
            balance = before + 1
        finally:
            lock.release()


threads = [threading.Thread(target=lambda: asyncio.run(deposit())) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(balance)
