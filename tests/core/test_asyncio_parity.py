"""asyncio as its users know it, where CPython's own tests have no eye for contexts, Coroutines and IOThreads (rule 18).

tests/conformance runs CPython's tests on one loop alone, in its home; what is here is the rest: the same features in
a program of homeloop.run(), in an IOThread, from a Coroutine, and driven by a thread with the big lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import homeloop
from homeloop.errors import UsageError, WrongThread
from tests.core.bounded import LIMIT_S, in_plain_thread, until, wait
from tests.core.places import in_callback, returned
from tests.nbd.certificates import Certificates, make_certificates


def on_main(body: Callable[[], Any]) -> Any:
    """In a program of homeloop.run()."""
    return homeloop.run(body())


def on_iothread(body: Callable[[], Any]) -> Any:
    """In an IOThread of such a program, whose main loop goes on."""
    async def main() -> Any:
        with homeloop.IOThread("io") as io:
            return await io.run(body())

    return homeloop.run(main())


def on_iothread_alone(body: Callable[[], Any]) -> Any:
    """In an IOThread of a synchronous program."""
    with homeloop.IOThread("io") as io:
        return io.call(body(), timeout=3 * LIMIT_S)


def driven(body: Callable[[], Any]) -> Any:
    """In the main context, by a call() of a plain thread, which drives it."""
    with homeloop.Runtime() as rt:
        return rt.call(body(), timeout=3 * LIMIT_S)


PLACES = pytest.mark.parametrize("place", [on_main, on_iothread, on_iothread_alone, driven], ids=lambda f: f.__name__)
Place = Callable[[Callable[[], Any]], Any]


# Signals


def test_rule18_add_signal_handler_in_run() -> None:
    """It runs in the loop, at once though the loop sleeps; removed, the signal is as before."""
    before = signal.getsignal(signal.SIGUSR1)

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        seen: list[str] = []
        came = asyncio.Event()

        def handler(word: str) -> None:
            seen.append(f"{word} in {homeloop.main_context().is_current()}")
            came.set()

        loop.add_signal_handler(signal.SIGUSR1, handler, "first")
        for number in range(3):
            came.clear()
            # From elsewhere, once the loop sleeps: nothing but the signal can wake it.
            context = homeloop.main_context()
            killer = threading.Thread(target=kill_when_asleep, args=(context,))
            killer.start()
            async with asyncio.timeout(LIMIT_S):
                await came.wait()
            await asyncio.to_thread(killer.join)
            loop.add_signal_handler(signal.SIGUSR1, handler, str(number))
        assert loop.remove_signal_handler(signal.SIGUSR1)
        assert not loop.remove_signal_handler(signal.SIGUSR1)
        return seen

    assert homeloop.run(main()) == ["first in True", "0 in True", "1 in True"]
    assert signal.getsignal(signal.SIGUSR1) in (before, signal.SIG_DFL)


def kill_when_asleep(context: homeloop.AioContext) -> None:
    until(context.inbox.sleeping, context)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_rule18_add_signal_handler_replaces_ctrl_c() -> None:
    """homeloop.run's own way with Ctrl-C gives way to the program's, and is not in its way afterwards."""
    async def main() -> str:
        got = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, got.set_result, "graceful")
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(LIMIT_S):
            return await got

    before = signal.getsignal(signal.SIGINT)
    try:
        assert homeloop.run(main()) == "graceful"
    finally:
        signal.signal(signal.SIGINT, before)


def test_rule18_add_signal_handler_elsewhere_is_refused_as_in_asyncio() -> None:
    async def add() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: None)

    with homeloop.IOThread() as io, pytest.raises((ValueError, RuntimeError)):
        io.call(add())


# Subprocesses


async def echo_of_a_child() -> tuple[bytes, int | None]:
    code = "import sys; data = sys.stdin.read(); print(data.upper(), end=''); sys.exit(7)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", code, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(2 * LIMIT_S):
        out, _ = await process.communicate(b"child of a loop")
    return out, process.returncode


@PLACES
def test_rule18_subprocess(place: Place) -> None:
    """A child's output, and its exit status: on every loop, whichever thread is its home."""
    assert place(echo_of_a_child) == (b"CHILD OF A LOOP", 7)


@PLACES
def test_rule18_subprocess_that_is_killed(place: Place) -> None:
    async def body() -> int:
        process = await asyncio.create_subprocess_shell("exec cat", stdin=asyncio.subprocess.PIPE)
        process.kill()
        async with asyncio.timeout(2 * LIMIT_S):
            return await process.wait()

    assert place(body) == -signal.SIGKILL


def test_rule18_subprocesses_of_several_contexts_at_once() -> None:
    """Main loop and two IOThreads wait for children of their own; each hears of its own."""
    async def child(status: int) -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", f"raise SystemExit({status})")
        return await process.wait()

    async def main() -> list[int]:
        with homeloop.IOThread() as one, homeloop.IOThread() as two:
            async with asyncio.timeout(3 * LIMIT_S):
                return await asyncio.gather(child(1), one.run(child(2)), two.run(child(3)), one.run(child(4)))

    assert homeloop.run(main()) == [1, 2, 3, 4]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="child watchers are gone")
@pytest.mark.parametrize("name", ["ThreadedChildWatcher", "PidfdChildWatcher", "SafeChildWatcher"])
def test_rule18_child_watchers(name: str) -> None:
    """Those that asyncio offers, set as it says; SafeChildWatcher works in the main thread's loop only."""
    async def main() -> tuple[bytes, int | None]:
        with quiet():
            watcher = getattr(asyncio, name)()
            asyncio.set_child_watcher(watcher)
            watcher.attach_loop(asyncio.get_running_loop())
        try:
            return await echo_of_a_child()
        finally:
            with quiet():
                watcher.close()
                asyncio.set_child_watcher(None)

    assert homeloop.run(main()) == (b"CHILD OF A LOOP", 7)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Child watchers are deprecated since 3.12."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


# SSL


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def tls(folder: Path, *, server: bool) -> ssl.SSLContext:
    if server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
        return context
    return ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))


async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write(line.upper())
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def ask(port: int, context: ssl.SSLContext) -> tuple[bytes, str]:
    """Two megabytes and a line: more than any buffer, so that both sides pause and resume."""
    async with asyncio.timeout(3 * LIMIT_S):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname="localhost", limit=4 << 20)
        lines = [b"x" * (2 << 20) + b"\n", b"end\n"]
        writer.writelines(lines)
        await writer.drain()
        long, short = await reader.readline(), await reader.readline()
        assert long == lines[0].upper()
        version = writer.get_extra_info("ssl_object").version()
        writer.close()
        await writer.wait_closed()
        return short, version


@pytest.mark.foreign("openssl")
@pytest.mark.parametrize("apart", [False, True], ids=["one loop", "server in an IOThread"])
def test_rule18_ssl_streams(certificates: Certificates, apart: bool) -> None:
    """Server and client over TLS with a certificate of our own making; a client that does not trust it is refused."""
    server_tls, client_tls = tls(certificates.all, server=True), tls(certificates.all, server=False)

    async def serve() -> tuple[asyncio.Server, int]:
        server = await asyncio.start_server(shout, "127.0.0.1", 0, ssl=server_tls, limit=4 << 20)
        return server, server.sockets[0].getsockname()[1]

    async def close(server: asyncio.Server) -> None:
        server.close()
        await server.wait_closed()

    async def main() -> tuple[bytes, str]:
        with homeloop.IOThread("server") as io:
            there = io.context if apart else homeloop.main_context()
            server, port = await there.run(serve())
            answer = await ask(port, client_tls)
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(port, tls(certificates.stranger, server=False))
            await there.run(close(server))
            return answer

    assert homeloop.run(main()) == (b"END\n", "TLSv1.3")


# add_reader and add_writer


@PLACES
def test_rule18_add_reader_and_add_writer(place: Place) -> None:
    """Called while the descriptor is ready, not after they are removed; both on one descriptor."""
    async def body() -> list[str]:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        log: list[str] = []
        written, read = loop.create_future(), loop.create_future()

        def can_write() -> None:
            log.append("writable")
            if len(log) == 2:
                assert loop.remove_writer(ours)
                written.set_result(None)

        def can_read(word: str) -> None:
            log.append(f"{word} {ours.recv(1)!r}")
            if log[-1].endswith("b'c'"):
                assert loop.remove_reader(ours)
                read.set_result(None)

        with ours, theirs:
            async with asyncio.timeout(LIMIT_S):
                loop.add_writer(ours, can_write)
                await written
                loop.add_reader(ours.fileno(), can_read, "got")
                theirs.sendall(b"abcd")
                await read
            assert not loop.remove_reader(ours)
            assert not loop.remove_writer(ours)
            assert ours.recv(1) == b"d", "left where it was"
        return log

    assert place(body) == ["writable", "writable", "got b'a'", "got b'b'", "got b'c'"]


# Debug mode


def test_rule18_debug_mode_is_silent_about_what_is_quick(caplog: pytest.LogCaptureFixture) -> None:
    """slow_callback_duration is a limit, also for Coroutines and posted callbacks; what is over it is named."""
    caplog.set_level(logging.WARNING, logger="asyncio")
    with homeloop.Runtime(debug=True) as rt:
        loop = rt.main.loop
        assert loop.get_debug()
        assert loop.slow_callback_duration == 0.1
        in_callback(rt.main, lambda: setattr(loop, "slow_callback_duration", 3600))
        rt.main.post(lambda: None)
        rt.main.spawn(returned(lambda: None)).result(LIMIT_S)
        assert "Executing" not in caplog.text
        in_callback(rt.main, lambda: setattr(loop, "slow_callback_duration", 1e-9))
        rt.main.spawn(returned(lambda: None), name="dawdler").result(LIMIT_S)
        until(lambda: "dawdler" in caplog.text)
    assert "took" in caplog.text


def test_rule18_debug_mode_by_argument() -> None:
    async def debug() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert homeloop.run(debug(), debug=True)
    assert not homeloop.run(debug(), debug=False)
    with asyncio.Runner(debug=True, loop_factory=homeloop.new_event_loop) as runner:
        assert runner.run(debug())


def test_rule18_debug_mode_finds_a_coroutine_that_was_never_awaited(recwarn: pytest.WarningsRecorder) -> None:
    async def forgotten() -> None:
        pass

    async def main() -> None:
        forgotten()  # type: ignore[unused-coroutine]

    homeloop.run(main(), debug=True)
    assert any("forgotten' was never awaited" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("debug", [False, True])
def test_rule18_an_iteration_keeps_nothing(debug: bool) -> None:
    """Its frame, which a traceback may keep, does not keep the last callback, its arguments and their exceptions."""
    class Argument:
        pass

    frames: list[Any] = []
    with homeloop.Runtime(debug=debug) as rt:
        loop = rt.main.loop

        def callback(argument: Argument) -> None:
            frames.append(sys._getframe(2))

        def queue() -> weakref.ref[Argument]:
            argument = Argument()
            loop.call_soon(callback, argument)
            return weakref.ref(argument)

        seen = in_callback(rt.main, queue)
        until(lambda: frames, rt.main)
        until(lambda: seen() is None, rt.main)
        assert frames[0].f_code.co_name.startswith("_run_"), "it is the iteration's"


# asyncio.Runner


def test_rule18_runner_runs_several_times_on_one_loop() -> None:
    """One runtime for all of them: what is shared on the loop stays, contextvars too."""
    async def where() -> tuple[Any, Any, bool]:
        return asyncio.get_running_loop(), homeloop.main_context(), homeloop.big_lock().held()

    with asyncio.Runner(loop_factory=homeloop.new_event_loop) as runner:
        first, second = runner.run(where()), runner.run(where())
        assert first == second
        assert first[0] is runner.get_loop()
        assert first[2]
    assert first[0].is_closed()
    assert first[1].closed


# Executors


@PLACES
@pytest.mark.parametrize("first", ["to_thread", "nothing"])
def test_rule18_shutdown_default_executor(place: Place, first: str) -> None:
    """It waits for what runs, refuses what comes then, and leaves no thread; the loop goes on."""
    async def body() -> list[str]:
        loop = asyncio.get_running_loop()
        log: list[str] = []
        before = set(threading.enumerate())
        if first == "to_thread":
            begun, end = threading.Event(), threading.Event()

            def work() -> None:
                begun.set()
                wait(end)
                log.append("worked")

            future = loop.run_in_executor(None, work)
            await loop.run_in_executor(None, wait, begun)
            loop.call_soon(end.set)
        await loop.shutdown_default_executor()
        if first == "to_thread":
            assert future.done()
        with pytest.raises(RuntimeError, match="shutdown"):
            await asyncio.to_thread(log.append, "too late")
        assert set(threading.enumerate()) <= before
        await asyncio.sleep(0)
        return log

    assert place(body) == (["worked"] if first == "to_thread" else [])


@pytest.mark.skipif(sys.version_info < (3, 12), reason="it takes no timeout before")
def test_rule18_shutdown_default_executor_takes_a_timeout() -> None:
    async def main() -> str:
        await asyncio.to_thread(lambda: None)
        await asyncio.get_running_loop().shutdown_default_executor(LIMIT_S)
        return "done"

    assert homeloop.run(main()) == "done"


# Tasks


@PLACES
def test_rule18_all_tasks_has_coroutines(place: Place) -> None:
    """Tasks and Coroutines of this loop that wait, the running one, and none of another loop."""
    async def sleeper() -> None:
        await homeloop.park("for the test")

    async def body() -> None:
        here = homeloop.current_context()
        assert here is not None
        other = homeloop.IOThread().start()
        stranger = other.spawn(sleeper())
        co = here.spawn(sleeper(), name="sleeper")
        task = asyncio.ensure_future(asyncio.Event().wait())
        for _ in range(3):
            await asyncio.sleep(0)      # they begin, and wait
        everybody = asyncio.all_tasks()
        assert everybody == {co, task, asyncio.current_task()}
        assert stranger not in everybody
        assert {each.get_name() for each in everybody} >= {"sleeper", task.get_name()}
        for each in (co, task):
            each.cancel()
        await asyncio.gather(co, task, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await homeloop.to_worker(other.stop)        # an IOThread may not wait for another

    place(body)


def test_rule18_what_asyncio_shows_of_a_task() -> None:
    """get_coro(), get_name(), get_loop(), get_context() and repr() of a Coroutine."""
    async def waits() -> None:
        await homeloop.park("until the end")

    with homeloop.Runtime(name="app") as rt:
        coro = waits()
        co = rt.main.spawn(coro, name="waiter")
        until(lambda: "parked" in repr(co), co)
        assert co.get_coro() is coro
        assert co.get_name() == "waiter"
        assert co.get_loop() is rt.main.loop
        assert repr(co) == (
            "<Coroutine waiter test_rule18_what_asyncio_shows_of_a_task.<locals>.waits parked (until the end) "
            "at app-main>")
        assert not asyncio.iscoroutine(co)
        assert rt.call(returned(lambda: asyncio.isfuture(co))) is True, "in its own context it passes for a future"
        co.wake()
        co.result(LIMIT_S)


# Loops of another make: each thing that needs our own says so


def uvloop_thread(**options: Any) -> homeloop.IOThread:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    return homeloop.IOThread("uv", loop_factory=uvloop.new_event_loop, **options)


def test_rule18_uvloop_cannot_poll_adaptively() -> None:
    """Neither asked for at the start, which fails and leaves no thread, nor later."""
    with pytest.raises(UsageError, match=r"uv runs .*uvloop.*adaptive polling needs homeloop's own loop"):
        uvloop_thread(poll_max_ns=1000).start()
    with uvloop_thread() as io, pytest.raises(UsageError, match="adaptive polling needs homeloop's own loop"):
        io.context.set_polling(1000)
    with uvloop_thread(poll_max_ns=0) as io:
        assert io.context.statistics().polling is None


def test_rule18_uvloop_cannot_be_polled() -> None:
    with uvloop_thread() as io:
        for blocking in (True, False):
            with pytest.raises(UsageError, match="uv runs a uvloop loop: nested polls need homeloop's own"):
                in_callback(io.context, lambda blocking=blocking: io.context.poll(blocking))
        with pytest.raises((UsageError, WrongThread)):
            in_plain_thread(io.context.poll, False)


@pytest.mark.parametrize("what", ["call", "result", "wait_while"])
def test_rule18_uvloop_cannot_wait_inside_itself(what: str) -> None:
    """A synchronous wait of its home thread would have to serve the loop meanwhile."""
    with uvloop_thread() as io:
        waits: dict[str, Callable[[], Any]] = {
            "call": lambda: io.context.call(returned(lambda: 1)),
            "result": lambda: io.context.spawn(returned(lambda: 1)).result(LIMIT_S),
            "wait_while": lambda: io.context.wait_while(lambda: True, LIMIT_S),
        }
        with pytest.raises(UsageError, match="nested polls need homeloop's own"):
            in_callback(io.context, waits[what])
        assert io.call(returned(lambda: "goes on")) == "goes on"


def test_rule18_uvloop_does_what_a_user_of_it_expects() -> None:
    """Subprocesses, readers, streams, to_thread and the default executor's end, in an IOThread."""
    async def body() -> str:
        assert await echo_of_a_child() == (b"CHILD OF A LOOP", 7)
        assert await asyncio.to_thread(lambda: "worker") == "worker"
        server = await asyncio.start_server(shout, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"line\n")
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        await asyncio.get_running_loop().shutdown_default_executor()
        return line.decode()

    with uvloop_thread() as io:
        assert io.call(body(), timeout=3 * LIMIT_S) == "LINE\n"
