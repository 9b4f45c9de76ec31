"""Coroutine objects in wrong hands: what is refused, and what the error says.

A coroutine object is run by one Coroutine or task, from its beginning. A second one would resume it in the middle of
what the first waits for. In debug mode the errors name both call sites; the first is noted where a Coroutine is made.
"""

from __future__ import annotations

import collections.abc
import inspect
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

from homeloop.core.loop import take_awaited
from homeloop.errors import UsageError, WrongState

if TYPE_CHECKING:
    from homeloop.core.context import AioContext
    from homeloop.core.coroutine import Coroutine

__all__ = ["UNBORN", "bad_yield", "begun_error", "check_given", "forget_all", "is_begun", "not_at_home", "sites"]


class _Unborn:
    """Stands for the future that a Coroutine awaits, until its first step: then its object must not have begun."""

    __slots__ = ()

    def cancel(self, _msg: Any) -> bool:
        return False


UNBORN: Final = _Unborn()
SITES_MAX: Final = 4           # of one coroutine object: the first ones

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_lock = threading.RLock()       # a leaf; re-entrant for a signal handler that spawns
_given: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()     # under _lock, debug mode only


def is_begun(coro: Any) -> bool:
    """Does somebody run it: is it suspended somewhere, or on some stack? Any thread."""
    return bool(getattr(coro, "cr_suspended", False) or getattr(coro, "cr_running", False))


def check_given(context: AioContext, coro: Any) -> None:
    """Refuse what is no coroutine object (TypeError), or has begun (WrongState). In debug mode note who gives it."""
    if not isinstance(coro, collections.abc.Coroutine):
        raise TypeError(f"a coroutine object is needed, got {coro!r}")
    debug = context.debug
    ended = debug and inspect.iscoroutine(coro) and coro.cr_frame is None
    if is_begun(coro) or ended:
        what = "has ended" if ended else "has begun already"
        raise WrongState(f"{coro!r} {what}, it cannot be given to {context.name}: a coroutine object runs once"
                         f"{sites(coro, 'given') if debug else ''}")
    if debug:
        with _lock:
            places = _given.setdefault(coro, [])
            if len(places) < SITES_MAX:
                places.append(f"{_caller()} to {context.name}")


def begun_error(co: Coroutine[Any]) -> WrongState:
    """For the second Coroutine of one object, whose turn it is to begin it."""
    coro = co.get_coro()
    with _lock:
        places = list(_given.get(coro, ()))
    text = "".join(f"; given at {place}" for place in places)
    return WrongState(f"{co!r} cannot begin: another has begun its coroutine object, which runs once{text}")


def not_at_home(co: Coroutine[Any], context: AioContext) -> UsageError:
    """For one that is entered or scheduled in another context than its own."""
    return UsageError(f"{co!r} is not at home in {context.name}; a coroutine's home never changes"
                      f"{sites(co.get_coro(), 'entered or scheduled')}")


def sites(coro: Any, what: str) -> str:
    """Where a coroutine object was first given, and where the caller of ours stands; "" if the first is not known."""
    with _lock:
        places = list(_given.get(coro, ()))
    return f" (first given at {places[0]}, now {what} at {_caller()})" if places else ""


def forget_all() -> None:
    """In a forked child: another thread may have held the lock."""
    global _lock
    _lock = threading.RLock()


def _caller() -> str:
    """File and line of the innermost frame that is not ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def bad_yield(co: Coroutine[Any], yielded: Any) -> str | None:
    """What is wrong with what co awaits, as asyncio says it; None: nothing. Home thread."""
    awaited = take_awaited(yielded)
    if awaited is None:
        return f"{co!r} got bad yield: {yielded!r}"
    if not awaited:
        return f"yield was used instead of yield from in {co!r} with {yielded!r}"
    if yielded is co:
        return f"{co!r} cannot await on itself"
    if yielded.get_loop() is not co.context.loop:
        return f"{co!r} got future {yielded!r} attached to a different loop"
    return None
