"""fork, interpreter exit, extreme switch intervals, recursion limits, Ctrl-C: a clear end, no hang, no inner traceback.

Each test is a program of its own: what hangs is killed and fails, what a program prints to stderr is looked at.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

LIMIT_S = 40.0
SRC = Path(__file__).resolve().parents[2] / "src"
PRELUDE = """
import faulthandler; faulthandler.enable()
import asyncio, gc, os, random, signal, sys, threading, time
import homeloop

async def parks(reason="for ever"):
    await homeloop.park(reason)

async def noop(value=None):
    return value

async def busy():
    while True:
        await asyncio.sleep(0)
"""


# Between the making of a coroutine object and the call that takes it there is no one to close it.
MAY_BE_CUT_OFF = """
import warnings
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
"""


def started(program: str, *arguments: str, prelude: str = "") -> subprocess.Popen[str]:
    text = PRELUDE + prelude + textwrap.dedent(program)
    environment = os.environ | {"PYTHONPATH": str(SRC), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", text, *arguments], env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit status and what it wrote; a hang shows where its threads stand."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        out, err = process.communicate()
        pytest.fail(f"hangs\n{out}\n{err}", pytrace=False)
    return process.returncode, out, err


def runs(program: str, *arguments: str, prelude: str = "") -> str:
    """Run a program that must end well and say nothing on stderr; what it printed."""
    status, out, err = finished(started(program, *arguments, prelude=prelude))
    assert (status, err) == (0, ""), f"status {status}\n{out}\n{err}"
    return out


# -- fork (rule 19) ------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)         # 3.12: fork with threads

def forked(child):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            child()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as exc:
            print(f"child: {type(exc).__name__}: {exc}", flush=True)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed"

def refused(fn):
    try:
        fn()
    except homeloop.ContextClosed as exc:
        assert "parent process" in str(exc), exc
    else:
        raise AssertionError("was taken")
"""


@needs_fork
def test_rule19_a_forked_child_is_told_and_may_start_anew() -> None:
    out = runs("""
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        held = threading.Event()
        let_go = threading.Event()
        def hold():
            with rt.big_lock:
                held.set()
                let_go.wait()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()                     # the fork meets a lock that a thread holds which the child has not
        parked = io.spawn(parks())
        while parked.state is not homeloop.CoroutineState.PARKED:
            time.sleep(0.001)

        def child():
            assert homeloop.current_context() is None
            for context in (rt.main, io.context):
                refused(lambda: context.call(noop()))
                refused(lambda: context.spawn(noop()))
                refused(lambda: context.post(print))
            assert homeloop.run(noop(5)) == 5
            with homeloop.Runtime() as mine, homeloop.IOThread() as mine_too:
                assert mine.call(noop(6)) + mine_too.call(noop(7)) == 13
            print("child ended well")

        forked(child)
        let_go.set()
        holder.join()
        assert rt.call(noop(8)) == 8    # the parent goes on
        print("parent too")
    """, prelude=FORK)
    assert out.split("\n") == ["child ended well", "parent too", ""]


@needs_fork
@pytest.mark.parametrize("place", ["main coroutine", "IOThread", "plain thread with the big lock"])
def test_rule19_fork_from_anywhere(place: str) -> None:
    out = runs("""
    def child():
        assert homeloop.current_context() is None, homeloop.current_context()
        assert homeloop.run(noop(5)) == 5
        print("child ended well")

    async def forks():
        forked(child)

    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        if sys.argv[1] == "main coroutine":
            rt.main.spawn(forks()).result()
        elif sys.argv[1] == "IOThread":
            io.call(forks())
        else:
            with rt.big_lock:
                forked(child)
        assert rt.call(noop(8)) == io.call(noop(8)) == 8
    """, place, prelude=FORK)
    assert out == "child ended well\n"


# -- exit of the interpreter with everything running -----------------------------------------------------------


EVERYTHING = """
    rt = homeloop.Runtime().__enter__()
    ios = [homeloop.IOThread().start() for _ in range(3)]
    contexts = [rt.main, *(io.context for io in ios)]
    def post_on(context):
        if not context.closed:
            context.post(post_on, context)
    for context in contexts:
        context.spawn(busy())
        context.spawn(parks())
        context.post(post_on, context)
        context.spawn(homeloop.to_worker(threading.Event().wait))
    def call(rt):
        while True:
            rt.call(noop())
    threading.Thread(target=call, args=(rt,), daemon=True).start()
    threading.Thread(target=rt.call, args=(parks(),), daemon=True).start()
    threading.Thread(target=rt.call, args=(asyncio.sleep(1000),), daemon=True).start()
    for context in contexts[:2]:
        context.post(lambda context: context.wait_while(lambda: True), context)         # nested, for ever
    for context in contexts:
        assert context.call(noop(1), 20) == 1           # it runs
    print("all run")
"""


@pytest.mark.parametrize("ending", [
    "pass", "sys.exit(0)", "with rt.big_lock: sys.exit(0)", "del rt, ios, contexts, context; gc.collect()",
], ids=["falls off the end", "exit", "exit with the big lock", "forgotten"])
def test_exit_with_everything_running(ending: str) -> None:
    assert runs(EVERYTHING + f"    {ending}\n") == "all run\n"


def test_exit_while_loops_are_made_and_never_run() -> None:
    runs("""
    loops = [homeloop.new_event_loop() for _ in range(5)]
    runtime = homeloop.Runtime()
    runtime.main.post(print, "never")
    for loop in loops:
        loop.close()
    runtime.close()
    """)


# -- switch intervals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["1e-6", "0.1", "1"])
def test_switch_interval(interval: str, seed: int) -> None:
    """A microsecond: a switch between nearly any two bytecodes. A tenth of a second, and a second: who wants the GIL
    starves. Calls, hops, posts, wakes and the big lock are counted."""
    rounds = {"1e-6": "2000", "0.1": "30", "1": "5"}[interval]
    out = runs("""
    sys.setswitchinterval(float(sys.argv[1]))
    rounds, seed = int(sys.argv[2]), int(sys.argv[3])
    counts = {"calls": 0, "hops": 0, "posts": 0, "parks": 0, "takes": 0}

    async def hops(io, rounds):
        for number in range(rounds):
            assert await io.run(noop(number)) == number
            counts["hops"] += 1

    async def parked(rounds, woken):
        for _ in range(rounds):
            await homeloop.park()
            counts["parks"] += 1
            woken.release()

    def count_post():
        counts["posts"] += 1

    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        woken = threading.Semaphore(0)
        hopper = rt.main.spawn(hops(io, rounds))
        sleeper = io.spawn(parked(rounds, woken))
        def wakes():
            for _ in range(rounds):
                assert sleeper.wake()
                assert woken.acquire(timeout=30), "lost"
        def posts():
            for _ in range(rounds):
                rt.main.post(count_post)
        def takes():
            for number in range(rounds):
                with rt.big_lock:
                    counts["takes"] += 1
                    assert homeloop.current_context() is rt.main
        threads = [threading.Thread(target=fn) for fn in (wakes, posts, takes)]
        for thread in threads:
            thread.start()
        for number in range(rounds):
            assert rt.call(noop(number)) == number
            counts["calls"] += 1
        for thread in threads:
            thread.join()
        hopper.result()
        sleeper.result()
        rt.call(noop())
    assert set(counts.values()) == {rounds}, counts
    print("all")
    """, interval, rounds, str(seed))
    assert out == "all\n"


# -- recursion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["result", "wait_while in a task", "poll"])
def test_recursion_limit_in_nested_waits_is_an_error_of_who_recursed(wait: str) -> None:
    """A wait inside a wait inside a wait ...: RecursionError reaches its caller, and the loop is whole behind it."""
    out = runs("""
    depth = 0
    async def deeper(context):
        global depth
        depth += 1
        if sys.argv[1] == "result":
            return context.spawn(deeper(context)).result()
        task = context.loop.create_task(deeper(context))
        if sys.argv[1] == "poll":
            while not task.done():
                context.poll(True)
        else:
            context.wait_while(lambda: not task.done())
        return task.result()

    async def main():
        context = homeloop.current_context()
        context.loop.set_exception_handler(lambda loop, what: None)
        try:
            await deeper(context)
        except RecursionError:
            print("told")
        await asyncio.sleep(0.01)
        assert await context.run(noop(3)) == 3
        return depth

    assert homeloop.run(main()) > 10
    """, wait, prelude=MAY_BE_CUT_OFF)
    assert out == "told\n"


def test_recursion_limit_in_a_callback_and_in_a_coroutine() -> None:
    runs("""
    def endless():
        endless()
    async def endless_too():
        await endless_too()
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        seen = threading.Event()
        io.context.loop.set_exception_handler(lambda loop, what: seen.set())
        io.post(endless)
        assert seen.wait(20)
        for context in (rt.main, io.context):
            try:
                context.call(endless_too())
            except RecursionError:
                pass
            else:
                raise AssertionError("no RecursionError")
            assert context.call(noop(4)) == 4
        with rt.big_lock:
            assert rt.call(noop(5)) == 5
    """)


# -- Ctrl-C ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("work", [
    "rt.call(noop())",
    "io.call(noop())",
    "rt.main.spawn(noop()).result()",
    "rt.main.wait_while(lambda: False)",
    "io.post(noop)",
], ids=["call", "call to an IOThread", "result", "wait_while", "post"])
def test_ctrl_c_at_random_moments_ends_the_block(work: str, seed: int) -> None:
    """A script in a loop, interrupted somewhere: its `with` blocks end, and KeyboardInterrupt is what comes out.

    Not among them: `with big_lock:`. Python may interrupt any context manager at the start of its __exit__.
    """
    moves = random.Random(seed)
    program = f"""
    def interrupt():
        time.sleep(float(sys.argv[1]))
        os.kill(os.getpid(), signal.SIGINT)
    interrupted = 0
    with homeloop.Runtime() as rt, homeloop.IOThread() as io:
        for delay in sys.argv[1:]:
            sys.argv[1] = delay
            sender = threading.Thread(target=interrupt)
            try:
                sender.start()
                while True:
                    {work.replace("io.post(noop)", "io.post(int)")}
            except KeyboardInterrupt:
                interrupted += 1
            sender.join()
            assert rt.call(noop(1), 20) == io.call(noop(1), 20) == 1
    print(interrupted)
    """
    delays = [str(moves.uniform(0.0, 0.02)) for _ in range(6)]
    assert runs(program, *delays, prelude=MAY_BE_CUT_OFF) == "6\n"


@pytest.mark.parametrize("main", [
    "await asyncio.sleep(100)",
    "await homeloop.park()",
    "await homeloop.to_worker(time.sleep, 0.3)",
    "while True: await asyncio.sleep(0)",
    "io.call(parks())",
    "await io.run(parks())",
], ids=["sleep", "park", "worker", "busy", "call in main", "run"])
def test_ctrl_c_ends_a_program(main: str) -> None:
    """One Ctrl-C: KeyboardInterrupt out of homeloop.run(), all cleaned up, no frames of ours logged beside it."""
    process = started(f"""
    async def main():
        io = homeloop.IOThread().start()
        try:
            asyncio.get_running_loop().call_later(0.02, print, "ready")
            {main}
        finally:
            print("cleaned up")
            await homeloop.to_worker(io.stop)
    try:
        homeloop.run(main())
    except KeyboardInterrupt:
        print("interrupted")
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    status, out, err = finished(process)
    assert (status, out, err) == (0, "cleaned up\ninterrupted\n", ""), f"{status}\n{out}\n{err}"
