"""Synchronous calls: a plain thread asks an idle loop on another thread to run a coroutine, and waits for it.

Who does it how:
  asyncio, uvloop   run_coroutine_threadsafe(coro, loop).result()
  anyio             portal.call(fn) of a blocking portal that is already running
  asgiref           async_to_sync(fn)() on a thread that its sync_to_async() started from the loop: only there
                    does it use a running loop. From any other thread it makes a loop and a thread for each
                    call, which is many times slower and not the same job.
  homeloop          rt.call(coro): under the big lock, on the calling thread, until it has to wait; and where it
                    waits for an event of the loop, the calling thread serves the loop

The row with I/O: 4 KiB to another process over a socket pair, and 4 KiB back. "blocking socket" is the same by
send() and recv() in the calling thread, without any loop: what the job costs at least.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager

from bench.measure import MICROSECONDS, Contender, Round, Row
from bench.peers import (
    LoopFactory,
    Rounds,
    asyncio_loop,
    loop_thread,
    need_anyio,
    need_asgiref,
    need_homeloop,
    round_thread,
    uvloop_loop,
)

Job = Callable[[], Coroutine[object, object, None]]


async def noop() -> None:
    pass


async def hop() -> None:
    await asyncio.sleep(0)


@contextlib.contextmanager
def threadsafe_calls(factory: LoopFactory, job: Job) -> Iterator[Round]:
    with loop_thread(factory) as loop:
        submit = asyncio.run_coroutine_threadsafe

        def round_(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                submit(job(), loop).result()
            return time.perf_counter() - start

        yield round_


@contextlib.contextmanager
def portal_calls(job: Job) -> Iterator[Round]:
    with need_anyio().from_thread.start_blocking_portal() as portal:

        def round_(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                portal.call(job)
            return time.perf_counter() - start

        yield round_


def asgiref_calls(job: Job) -> AbstractContextManager[Round]:
    sync = need_asgiref().sync

    def serve(rounds: Rounds) -> None:
        call = sync.async_to_sync(job)
        for count in rounds:
            start = time.perf_counter()
            for _ in range(count):
                call()
            rounds.answer(time.perf_counter() - start)

    async def main(rounds: Rounds) -> None:
        await sync.sync_to_async(serve, thread_sensitive=False)(rounds)

    return round_thread(lambda rounds: asyncio.run(main(rounds)))


@contextlib.contextmanager
def homeloop_calls(job: Job) -> Iterator[Round]:
    with need_homeloop().Runtime(name="bench") as rt:

        def round_(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                rt.call(job())
            return time.perf_counter() - start

        yield round_


MESSAGE = bytes(4096)
ECHO = """
import socket, sys
with socket.socket(fileno=int(sys.argv[1])) as sock:
    while data := sock.recv(4096, socket.MSG_WAITALL):
        sock.sendall(data)
"""

@contextlib.contextmanager
def echo() -> Iterator[socket.socket]:
    """A socket to a process that sends each 4 KiB back."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-c", ECHO, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        try:
            yield ours
        finally:
            ours.close()
            process.wait()


async def ask(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    await loop.sock_sendall(sock, MESSAGE)
    missing = len(MESSAGE)
    while missing:
        missing -= len(await loop.sock_recv(sock, missing))


@contextlib.contextmanager
def blocking_asks() -> Iterator[Round]:
    with echo() as sock:
        def round_(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                sock.sendall(MESSAGE)
                missing = len(MESSAGE)
                while missing:
                    missing -= len(sock.recv(missing))
            return time.perf_counter() - start

        yield round_


@contextlib.contextmanager
def threadsafe_asks(factory: LoopFactory) -> Iterator[Round]:
    with loop_thread(factory) as loop, echo() as sock:
        sock.setblocking(False)

        def round_(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                asyncio.run_coroutine_threadsafe(ask(loop, sock), loop).result()
            return time.perf_counter() - start

        yield round_


def homeloop_asks() -> AbstractContextManager[Round]:
    """In a thread that is not the main one: there, Ctrl-C must be taken over for each call."""
    def body(rounds: Rounds) -> None:
        with need_homeloop().Runtime(name="bench") as rt, echo() as sock:
            sock.setblocking(False)
            loop = rt.main.loop
            for count in rounds:
                start = time.perf_counter()
                for _ in range(count):
                    rt.call(ask(loop, sock))
                rounds.answer(time.perf_counter() - start)

    return round_thread(body)


def io_row() -> Row:
    return Row(
        name="call(4 KiB out and back over a socket pair)",
        unit=MICROSECONDS,
        contenders=[
            Contender(name="homeloop", open=homeloop_asks, ours=True),
            Contender(name="blocking socket", open=blocking_asks),
            Contender(name="asyncio", open=functools.partial(threadsafe_asks, asyncio_loop)),
            Contender(name="uvloop", open=functools.partial(threadsafe_asks, uvloop_loop)),
        ],
        targets={"blocking socket": 0.5, "asyncio": 4.0},
    )


def call_row(name: str, job: Job, asyncio_target: float) -> Row:
    return Row(
        name=name,
        unit=MICROSECONDS,
        contenders=[
            Contender(name="homeloop", open=functools.partial(homeloop_calls, job), ours=True),
            Contender(name="asyncio", open=functools.partial(threadsafe_calls, asyncio_loop, job)),
            Contender(name="uvloop", open=functools.partial(threadsafe_calls, uvloop_loop, job)),
            Contender(name="anyio", open=functools.partial(portal_calls, job)),
            Contender(name="asgiref", open=functools.partial(asgiref_calls, job)),
        ],
        # "Faster than all": 1 against the others.
        targets={"asyncio": asyncio_target, "uvloop": 1.0, "anyio": 1.0, "asgiref": 1.0},
    )


def rows() -> list[Row]:
    return [
        call_row("call(noop) from a plain thread, main idle", noop, 25.0),
        call_row("call(one sleep(0)) from a plain thread, main idle", hop, 15.0),
        io_row(),
    ]
