"""Exceptions wherever something is called back, and Ctrl-C in the middle of a wait: a clear end, no harm to others."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.proof.test_endings import finished, runs, started

POSITIONS = """
import asyncio, logging, socket
logging.disable()           # what handlers are given is looked at; asyncio logs what a handler raises itself

def raiser(kind, said):
    def raises(*_):
        said.set()
        raise kind("on purpose")
    return raises

async def raises_at(where, kind, said):
    # Let `raises` be called in that place of the running context.
    raises = raiser(kind, said)
    context, loop = homeloop.current_context(), asyncio.get_running_loop()
    kept = []
    if where == "post":
        context.post(raises)
    elif where == "bottom half":
        kept.append(context.bottom_half(raises))
        kept[0].schedule()
    elif where == "idle bottom half":
        kept.append(context.bottom_half(raises, idle=True))
        kept[0].schedule()
    elif where == "call_soon":
        loop.call_soon(raises)
    elif where == "call_soon_threadsafe":
        await homeloop.to_worker(loop.call_soon_threadsafe, raises)
    elif where == "timer":
        loop.call_later(0.001, raises)
    elif where == "reader":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            loop.add_reader(ours, lambda: (loop.remove_reader(ours), raises()))
            theirs.send(b"x")
            await seen(said)
        return
    elif where == "done callback":
        co = context.spawn(noop())
        co.add_done_callback(raises)
        await co
    elif where == "done callback of a task":
        task = asyncio.ensure_future(noop())
        task.add_done_callback(raises)
        await task
    elif where == "coroutine":
        async def body(): raises()
        kept.append(context.spawn(body()))
    elif where == "exception handler":
        loop.set_exception_handler(raises)
        loop.call_soon(lambda: 1 // 0)
    elif where == "nested poll":
        loop.call_soon(raises)
        context.poll(True)
    elif where == "worker":
        try:
            await homeloop.to_worker(raises)
        except ValueError:
            pass
    await seen(said)

async def seen(said):
    while not said.is_set():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.001)

WHERE = ["post", "bottom half", "idle bottom half", "call_soon", "call_soon_threadsafe", "timer", "reader",
         "done callback", "done callback of a task", "coroutine", "exception handler", "nested poll", "worker"]
"""


def test_an_exception_in_any_callback_is_told_and_the_loop_goes_on() -> None:
    """Of the main context and of an IOThread; what was beside it and comes after it runs."""
    out = runs("""
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        for context in (rt.main, io.context):
            beside = context.spawn(busy())
            for where in WHERE:
                said, told = threading.Event(), []
                context.post(context.loop.set_exception_handler, lambda loop, what: told.append(what))
                context.call(raises_at(where, ValueError, said), 20)
                context.call(noop())
                gc.collect()
                context.call(noop())
                expected = [] if where in ("worker", "exception handler") else [ValueError]
                assert [type(what["exception"]) for what in told] == expected, (where, told)
                context.post(context.loop.set_exception_handler, None)
                assert not beside.done(), where
                assert context.call(noop(3), 20) == 3
            beside.cancel()
    print("told")
    """, prelude=POSITIONS)
    assert out == "told\n"


@pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt"])
def test_what_ends_a_program_does_so_from_any_callback(kind: str) -> None:
    """SystemExit and KeyboardInterrupt come out of homeloop.run(), after everybody's clean-up."""
    out = runs("""
    kind = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}[sys.argv[1]]

    async def cleans_up(log):
        try:
            await homeloop.park()
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    async def main(where, log):
        beside = homeloop.current_context().spawn(cleans_up(log))
        await asyncio.sleep(0.001)
        await raises_at(where, kind, threading.Event())
        log.append("went on")

    for where in WHERE:
        log = []
        try:
            homeloop.run(main(where, log))
        except kind as error:
            log.append(str(error))
        assert log == ["cleaned up", "on purpose"], (where, log)
        gc.collect()
    assert threading.active_count() == 1, threading.enumerate()
    print("ended")
    """, kind, prelude=POSITIONS)
    assert out == "ended\n"


def interrupted(process: subprocess.Popen[str], times: int) -> tuple[int, str, str]:
    """Send that many Ctrl-C, each when the program says that it is ready."""
    assert process.stdout is not None
    for _ in range(times):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
    return finished(process)


def test_ctrl_c_in_stop() -> None:
    """It comes out of the stop() that waits; the IOThread goes on ending, and a second stop() waits for that."""
    assert interrupted(started("""
    gate, running = threading.Event(), threading.Event()
    def works():
        running.set()
        gate.wait()
    io = homeloop.IOThread().start()
    io.spawn(homeloop.to_worker(works))
    running.wait()
    sender = threading.Timer(0.05, print, ["ready"])
    sender.start()
    try:
        io.stop()
    except KeyboardInterrupt:
        print("interrupted")
    gate.set()
    io.stop()
    sender.join()
    assert threading.active_count() == 1, threading.enumerate()
    """), 1) == (0, "interrupted\n", "")


def test_ctrl_c_in_a_stop_that_the_main_home_waits_for() -> None:
    """The same in a coroutine of homeloop.run(), whose loop is served meanwhile."""
    assert interrupted(started("""
    gate, running = threading.Event(), threading.Event()
    def works():
        running.set()
        gate.wait()

    async def main():
        io = homeloop.IOThread().start()
        io.spawn(homeloop.to_worker(works))
        running.wait()
        asyncio.get_running_loop().call_later(0.05, print, "ready")
        try:
            io.stop()
        except KeyboardInterrupt:
            print("interrupted")
        gate.set()
        io.stop()
        assert await homeloop.current_context().run(noop(3)) == 3

    homeloop.run(main())
    assert threading.active_count() == 1, threading.enumerate()
    """), 1) == (0, "interrupted\n", "")


def test_ctrl_c_in_released() -> None:
    """What blocks without the big lock is not cut short by the first, which cancels; the second comes out of it, and
    the lock is the home's again."""
    assert interrupted(started("""
    def ready_twice(inbox):
        print("ready")
        while not inbox.entries:        # the cancellation of the first one
            time.sleep(0.001)
        print("ready")

    async def main():
        lock, inbox = homeloop.big_lock(), homeloop.current_context().inbox
        sender = threading.Thread(target=ready_twice, args=(inbox,))
        try:
            with lock.released():
                sender.start()
                threading.Event().wait()
        except KeyboardInterrupt:
            print("interrupted")
        assert lock.held()
        sender.join()
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            print("cancelled")
            raise

    try:
        homeloop.run(main())
    except KeyboardInterrupt:
        print("ended")
    """), 2) == (0, "interrupted\ncancelled\nended\n", "")
