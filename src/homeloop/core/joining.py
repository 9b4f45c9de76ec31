"""Waiting for a coroutine of any context: what `await co` awaits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from homeloop.core.current import current_context
from homeloop.core.states import CoroutineState
from homeloop.core.waitgraph import Hop, begin_await, begin_join, end_await

if TYPE_CHECKING:
    from homeloop.core.coroutine import Coroutine

__all__ = ["Joined", "wait_for_end"]


class Joined(asyncio.Future[None]):
    """A future of the waiter's loop that ends with a coroutine of any context.

    cancel() goes to that coroutine and the future stays pending until it has ended: so the waiter's
    timeouts, task groups and uncancel() counts work as with an asyncio task (rule 10). A request that
    found the coroutine ended already must not be lost: the future waits for the answer to each request,
    and is cancelled itself if one came too late.
    """

    def __init__(self, co: Coroutine[Any]) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._co = co
        self._post = _poster(self.get_loop())
        self._unanswered = 0            # waiter's home: requests on their way
        self._too_late: Any = None      # waiter's home: the arguments of a request that came too late
        self._ended = False             # waiter's home
        co.when_done(self._end)

    # As a link of the wait graph (see waitgraph.Link): what it waits for is the coroutine.
    passes_cancel = True
    refuses = True

    def pending(self) -> bool:
        return not self._co.done()

    def needs(self) -> Sequence[Hop]:
        return (Hop(self._co, ""),)

    def sought(self) -> str:
        return repr(self._co)

    def withdraw(self) -> None:
        """Nobody will await it."""
        self._co.forget_when_done(self._end)

    def _end(self, _co: Coroutine[Any]) -> None:    # the coroutine's home
        self._post(self._settle)

    def cancel(self, msg: Any = None) -> bool:
        """Ask the coroutine to end; False if this future is done, or the coroutine has ended."""
        if self.done():
            return False
        context = self._co.context
        if context.may_enter():
            return self._co.cancel(msg)
        if not context.try_post(self._forward, msg):
            return False
        self._unanswered += 1
        return True

    def _forward(self, msg: Any) -> None:           # the coroutine's home
        self._post(self._answer, self._co.cancel(msg), msg)

    def _answer(self, delivered: bool, msg: Any) -> None:
        self._unanswered -= 1
        if not delivered:
            self._too_late = (msg,)
        if self._ended:
            self._settle()

    def _settle(self) -> None:
        self._ended = True
        if self._unanswered or self.done():
            return
        if self._too_late is not None:
            super().cancel(*self._too_late)
        else:
            self.set_result(None)


def wait_for_end(co: Coroutine[Any], me: Coroutine[Any] | None) -> Generator[Any, Any, None]:
    """What `await co` does in me (None: in an asyncio task) while co has not ended."""
    joined = Joined(co)
    task = None
    try:
        if me is None:
            task = begin_await(joined)
        else:
            # Just spawned, where we run: it waits for nothing, and its home is us.
            begin_join(me, joined, co.context is me.context and co.state is CoroutineState.SCHEDULED)
        yield from joined
    except BaseException:
        joined.withdraw()       # for one that was refused, or will never be resumed
        raise
    finally:
        if me is None:
            end_await(task)
        else:
            me.link = None


def _poster(loop: asyncio.AbstractEventLoop) -> Callable[..., object]:
    """A function that posts (fn, *args) to the running loop from any thread, and does nothing once it is closed."""
    context = current_context()
    if context is not None and context.loop is loop:
        return context.try_post

    def post(fn: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):     # closed: nobody waits there any more
            loop.call_soon_threadsafe(fn, *args)

    return post
