"""How a driver's method is called: at once, as a coroutine, or on a worker; and what its errors become.

The Device decides what to call; a Method knows how. Nothing here knows about ranges, rights or counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import inspect
from collections import deque
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import Any, Final, TypeVar, cast

from homeloop.block.driver import BytesLike, Driver, ThreadModel
from homeloop.block.lane import Lane
from homeloop.errors import BlockError, UsageError

__all__ = [
    "Method",
    "Turns",
    "Unrun",
    "Way",
    "block_error_of",
    "drive",
    "has_option",
    "method_of",
    "plain_bytes",
    "quick_path_of",
    "reject_awaitable",
    "shown",
]

T = TypeVar("T")

# NBD E2: to the writer, a full quota and a full file are a full device.
_NO_SPACE: Final = frozenset({errno.EDQUOT, errno.EFBIG})


# What methods return, as a rule: isawaitable() takes 0.5 us to say so.
_NO_AWAITABLES: Final = frozenset({bytes, bytearray, memoryview, int, bool})


class Way(enum.Enum):
    """Where a method of a driver runs."""

    INLINE = "inline"            # plain, on the home thread, now
    DIRECT = "direct"            # plain, on the home thread: the answer, or a coroutine object whose result it is
    COROUTINE = "coroutine"      # async, on the home thread
    WORKER = "worker"            # plain, on a worker thread


class Turns:
    """One at a time, first come first served. Home thread only.

    The turn is handed over, never put up for grabs: who comes later cannot overtake. A waiter that is
    cancelled leaves the line; one that is cancelled in the same step in which it got the turn hands it on.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()    # grows by one for each request in flight

    async def take(self) -> None:
        if not self._taken:
            self._taken = True
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                with contextlib.suppress(ValueError):           # give() may have dropped it
                    self._waiting.remove(waiter)
            else:
                self.give()
            raise

    def give(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():                               # done: cancelled, its task has yet to run
                waiter.set_result(None)
                return
        self._taken = False


class Unrun:
    """A coroutine object that nobody runs yet, and perhaps nobody ever will: then it is closed, without a warning.

    A coroutine that was never run drops its arguments, and with them what they hold; so a request that is not wanted
    any more is forgotten layer by layer.
    """

    __slots__ = ("coroutine",)

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.coroutine = coroutine

    def __del__(self) -> None:
        self.coroutine.close()       # of one that has ended: nothing


def block_error_of(error: Exception, where: str) -> BlockError:
    """What a driver's exception is to the client: OSError keeps its errno, anything else is EIO.

    where: the method that raised, for the text. A BlockError keeps its text too: it was made for the client.
    """
    if isinstance(error, BlockError):
        return BlockError(errno.ENOSPC, error.text) if error.errno in _NO_SPACE else error
    number = error.errno if isinstance(error, OSError) else None
    if type(number) is not int or number <= 0:
        number = errno.EIO
    if number in _NO_SPACE:
        number = errno.ENOSPC
    return BlockError(number, f"{where}: {type(error).__name__}: {shown(error)}")


def shown(error: BaseException) -> str:
    """Return an exception's text; it is somebody else's, and may have none to give."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be shown)"


def reject_awaitable(result: object, label: str) -> None:
    """Raise EIO for the awaitable that a plain method returned: nobody would run it."""
    if result is None or type(result) in _NO_AWAITABLES or not inspect.isawaitable(result):
        return
    if inspect.iscoroutine(result):
        result.close()               # or a "never awaited" warning follows the error
    kind = type(result).__name__
    raise BlockError(errno.EIO, f"{label} is a plain function but returned a {kind}: write `async def`")


def plain_bytes(data: object, label: str, offset: int, length: int) -> BytesLike:
    """Return a driver's answer to a read as bytes, bytearray or a memoryview of bytes; EIO if it is wrong."""
    reject_awaitable(data, label)
    try:
        view = memoryview(data)         # type: ignore[arg-type]
    except Exception as error:          # as a rule TypeError; a class of the driver's may raise anything
        text = f"{label} returned {type(data).__name__} for {length} bytes at {offset}"
        raise BlockError(errno.EIO, text) from (None if type(error) is TypeError else error)
    if view.nbytes != length:
        raise BlockError(errno.EIO, f"{label} returned {view.nbytes} of {length} bytes at {offset}")
    if type(data) is bytes or type(data) is bytearray:
        return data
    if not view.c_contiguous:
        return view.tobytes()
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


class Method:
    """One method of a driver and the way it runs.

    now() is for Way.INLINE and Way.DIRECT, later() for the other two, call() for any, finish() for what now() began.
    All raise BlockError and nothing else, but for CancelledError and what ends a program (KeyboardInterrupt and its
    like).
    """

    __slots__ = ("_lane", "fn", "label", "way")

    def __init__(self, fn: Callable[..., object], label: str, way: Way, lane: Lane | None) -> None:
        self.fn = fn
        self.label = label           # "Noise.read": for the text of errors
        self.way = way
        self._lane = lane            # Way.WORKER: shared by all methods of the driver; else None

    def now(self, *args: object, **options: object) -> object:
        """Call a plain method on this thread. Way.DIRECT: an Unrun, for finish(), is no answer yet."""
        try:
            result = self.fn(*args, **options)
        except Exception as error:
            raise block_error_of(error, self.label) from error
        if type(result) is CoroutineType and self.way is Way.DIRECT:
            return Unrun(result)
        reject_awaitable(result, self.label)
        return result

    async def finish(self, begun: Unrun) -> object:
        """Run what a direct method returned to its end."""
        try:
            result = await begun.coroutine
        except Exception as error:
            raise block_error_of(error, self.label) from error
        reject_awaitable(result, self.label)
        return result

    async def later(self, *args: object, **options: object) -> object:
        """Run a method that may wait, at the home of the running loop.

        Cancelled: an async method sees it; a plain one that waits for its turn or for a worker is not called;
        one that runs is waited for, so that the caller may release `args` when this ends.
        """
        if self.way is Way.COROUTINE:
            try:
                # The type as text: made anew for each call, it would take 2 us.
                return await cast("Callable[..., Coroutine[object, object, object]]", self.fn)(*args, **options)
            except Exception as error:
                raise block_error_of(error, self.label) from error
        # now() and not fn on the worker: a StopIteration could not pass through a future.
        return await self.running(self.now, *args, **options)

    async def running(self, fn: Callable[..., object], *args: object, **options: object) -> object:
        """Way.WORKER: run fn on a worker in this method's turn. It must not raise StopIteration."""
        assert self._lane is not None, "no lane to the workers"
        return await self._lane.run(fn, *args, **options)

    async def call(self, *args: object, **options: object) -> object:
        """now() or later(), as the method needs it."""
        if self.way is not Way.INLINE and self.way is not Way.DIRECT:
            return await self.later(*args, **options)
        result = self.now(*args, **options)
        return await self.finish(result) if type(result) is Unrun else result


def method_of(driver: Driver, name: str, thread_model: ThreadModel, lane: Lane) -> Method | None:
    """Return the driver's method of that name, ready to be called; None if it has none.

    lane: one for all methods of one driver. Raises UsageError if the name stands for something else.
    """
    fn = getattr(driver, name, None)
    if fn is None:
        return None
    label = f"{type(driver).__name__}.{name}"
    if not callable(fn):
        raise UsageError(f"{label} is {fn!r}, not a method")
    if inspect.iscoroutinefunction(fn):
        return Method(fn, label, Way.COROUTINE, None)
    if thread_model in ("inline", "direct"):
        return Method(fn, label, Way(thread_model), None)
    return Method(fn, label, Way.WORKER, lane)


def has_option(method: Method | None, name: str) -> bool:
    """Does the driver's method take this keyword? False for one whose signature Python does not know."""
    if method is None:
        return False
    try:
        parameters = inspect.signature(method.fn).parameters
    except (TypeError, ValueError):
        return False
    found = parameters.get(name)
    return found is not None and found.kind in (found.KEYWORD_ONLY, found.POSITIONAL_OR_KEYWORD)


def quick_path_of(driver: Driver, name: str) -> Callable[..., object] | None:
    """Return the driver's quick path of that name, or None; UsageError for one that cannot be quick."""
    fn = getattr(driver, name, None)
    if fn is None:
        return None
    if not callable(fn) or inspect.iscoroutinefunction(fn):
        raise UsageError(f"{type(driver).__name__}.{name} must be a plain function that does not block")
    return cast(Callable[..., object], fn)


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that does not wait for anything."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise AssertionError(f"{coroutine!r} has waited")
