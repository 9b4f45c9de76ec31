"""The IOThreads of the daemon as objects with ids and properties, as QEMU has them. The main context's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from homeloop.core.context import AioContext
from homeloop.core.iothread import IOThread
from homeloop.core.polling import default_poll_max_ns
from homeloop.core.workers import to_worker
from homeloop.errors import UsageError, WrongState

__all__ = ["PROPERTIES", "WRITABLE", "IOThreads"]

WORKERS_MAX: Final = 64             # QEMU's default
PROPERTIES: Final = ("thread-pool-min", "aio-max-batch", "thread-pool-max", "poll-max-ns", "poll-grow", "poll-shrink")
WRITABLE: Final = frozenset(PROPERTIES) - {"aio-max-batch"}
_POOL: Final = ("thread-pool-min", "thread-pool-max")
_VALUE_MAX: Final = (1 << 63) - 1


class IOThreads(Mapping[str, IOThread]):
    """All IOThreads, by id."""

    def __init__(self) -> None:
        self._threads: dict[str, IOThread] = {}
        self._values: dict[str, dict[str, int]] = {}        # id -> property -> value

    def __getitem__(self, id: str) -> IOThread:
        return self._threads[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._threads)

    def __len__(self) -> int:
        return len(self._threads)

    def adopt(self, iothread: IOThread) -> None:
        """List one that is started and stopped by somebody else."""
        self._threads[iothread.name] = iothread
        self._values[iothread.name] = _defaults()

    async def add(self, id: str, values: Mapping[str, int]) -> IOThread:
        """Make one and start it, in a worker. UsageError, in QEMU's words, for an id or values that cannot be."""
        if id in self._threads:
            raise UsageError(f"attempt to add duplicate property '{id}' to object (type 'container')")
        for name, value in values.items():
            _check_range(name, value)
        found = _defaults() | dict(values)
        low, high = _pool_limits(found)
        iothread = IOThread(
            id, poll_max_ns=found["poll-max-ns"], poll_grow=found["poll-grow"], poll_shrink=found["poll-shrink"],
            worker_min=low, worker_max=high,
        )
        self._threads[id] = iothread        # before it runs: nobody else may take the id meanwhile
        self._values[id] = found
        try:
            await to_worker(iothread.start)
        except BaseException:
            del self._threads[id], self._values[id]
            await to_worker(iothread.stop)
            raise
        return iothread

    async def delete(self, id: str) -> None:
        """End one that nobody uses."""
        iothread = self._threads.pop(id)
        del self._values[id]
        await to_worker(iothread.stop)

    async def stop(self, *, but: Collection[IOThread] = ()) -> None:
        """End all that add() made, but for those. Twice is fine."""
        threads = [iothread for iothread in self._threads.values() if iothread not in but]
        await asyncio.gather(*(to_worker(iothread.stop) for iothread in threads))

    def at(self, home: AioContext) -> IOThread | None:
        """The IOThread that serves a context; None: it is none of ours."""
        for iothread in self._threads.values():
            if _runs(iothread) and iothread.context is home:
                return iothread
        return None

    def value(self, id: str, name: str) -> int:
        """A property's value."""
        return self._values[id][name]

    def thread_id(self, id: str) -> int:
        """The system's number of its thread; 0 while it does not run."""
        iothread = self._threads[id]
        return _native_id(iothread.name) if _runs(iothread) else 0

    def set(self, id: str, name: str, value: int) -> None:
        """Change a property; it holds from the next sleep of the thread on. UsageError for a value out of range."""
        _check_range(name, value)
        values = self._values[id] | {name: value}
        low, high = _pool_limits(values)
        self._values[id] = values
        context = self._threads[id].context
        if name in _POOL:
            context.post(lambda: context.pool().set_limits(low, high))      # made there, if nobody has used it yet
        else:
            context.set_polling(values["poll-max-ns"], values["poll-grow"], values["poll-shrink"])


def _runs(iothread: IOThread) -> bool:
    try:
        return iothread.context is not None
    except WrongState:
        return False


def _native_id(name: str) -> int:
    return next((thread.native_id or 0 for thread in threading.enumerate() if thread.name == name), 0)


def _defaults() -> dict[str, int]:
    return {
        "poll-max-ns": default_poll_max_ns(), "poll-grow": 0, "poll-shrink": 0, "aio-max-batch": 0,
        "thread-pool-min": 0, "thread-pool-max": WORKERS_MAX,
    }


def _pool_limits(values: Mapping[str, int]) -> tuple[int, int]:
    low, high = values["thread-pool-min"], values["thread-pool-max"]
    if low > high or high < 1:
        raise UsageError("bad thread-pool-min/thread-pool-max values")
    return low, high


def _check_range(name: str, value: int) -> None:
    if not 0 <= value <= _VALUE_MAX:
        raise UsageError(f"{name} value must be in range [0, {_VALUE_MAX}]")
