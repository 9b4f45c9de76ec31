"""Locks, queues and events for coroutines of any context, of any asyncio loop, and plain threads."""

from homeloop.sync.barrier import Barrier
from homeloop.sync.channel import UNBOUNDED, Channel
from homeloop.sync.condition import Condition
from homeloop.sync.event import Event
from homeloop.sync.mutex import Mutex
from homeloop.sync.one_shot import OneShot
from homeloop.sync.rwlock import RwLock, RwLockSide
from homeloop.sync.units import Semaphore, SharedResource

__all__ = [
    "UNBOUNDED",
    "Barrier",
    "Channel",
    "Condition",
    "Event",
    "Mutex",
    "OneShot",
    "RwLock",
    "RwLockSide",
    "Semaphore",
    "SharedResource",
]
