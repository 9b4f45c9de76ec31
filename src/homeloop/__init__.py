"""homeloop: coroutines with a home, any thread may join in.

QEMU's AioContext, IOThreads and big lock for asyncio; and block devices over NBD on top of them.
"""

import os

from homeloop.core.biglock import BigLock
from homeloop.core.bottom_half import BottomHalf
from homeloop.core.context import AioContext
from homeloop.core.coroutine import Coroutine, CoroutineState, current_coroutine, park
from homeloop.core.current import current_context
from homeloop.core.iothread import IOThread
from homeloop.core.registry import big_lock, main_context
from homeloop.core.runtime import Runtime, new_event_loop, run
from homeloop.core.statistics import ContextStatistics
from homeloop.core.waiting import kick
from homeloop.core.workers import to_worker
from homeloop.errors import (
    BlockError,
    ContextClosed,
    HomeloopError,
    NoRuntime,
    PeerError,
    UsageError,
    WouldDeadlock,
    WrongState,
    WrongThread,
)
from homeloop.sync.task_group import TaskGroup

__all__ = [
    "AioContext",
    "BigLock",
    "BlockError",
    "BottomHalf",
    "ContextClosed",
    "ContextStatistics",
    "Coroutine",
    "CoroutineState",
    "HomeloopError",
    "IOThread",
    "NoRuntime",
    "PeerError",
    "Runtime",
    "TaskGroup",
    "UsageError",
    "WouldDeadlock",
    "WrongState",
    "WrongThread",
    "big_lock",
    "current_context",
    "current_coroutine",
    "kick",
    "main_context",
    "new_event_loop",
    "park",
    "run",
    "to_worker",
]

__version__ = "0.1.0.dev0"

# Opted in by who starts the program: `homeloop ps` finds it.
if os.environ.get("HOMELOOP_DEBUG_SOCKET"):
    from homeloop.debug.listening import listen_if_asked

    listen_if_asked()
