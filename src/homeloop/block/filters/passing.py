"""What every filter is: a driver over a driver, which passes on what it does not change.

The driver below is behind a Device of the filter's own, so it keeps its contract whoever is above it. What it cannot
do the filter does not offer. A filter answers inline what the driver below answers inline (see steps.py): a chain of
filters over memory costs no task and no thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from homeloop.block.device import Answer, Device
from homeloop.block.driver import BytesLike, Driver, ThreadModel
from homeloop.block.extents import Extent
from homeloop.block.filters.requests import Request, perform

__all__ = ["Filter", "Funnel"]


class Filter:
    """Passes every request on, unchanged; subclasses change what they are about. A driver: see the contract.

    driver: what is below; a driver, or a Device that nobody else uses. The filter takes it over and closes it.
    Home thread.
    """

    thread_model: ThreadModel = "direct"

    def __init__(self, driver: Driver | Device) -> None:
        self.inner = driver if isinstance(driver, Device) else Device(driver)
        block_size = self.inner.block_size
        self.size = self.inner.size
        self.read_only = self.inner.read_only
        self.block_size_min = block_size.minimum
        self.block_size_preferred = block_size.preferred
        self.multi_conn = self.inner.can_multi_conn
        self._offer_no_more_than(self.inner)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.inner!r}>"

    def _offer_no_more_than(self, inner: Device) -> None:
        """A method that is None is not there: so the Device above does not offer it."""
        offered = {
            "write": inner.can_write,
            "write_fua": inner.can_fua,
            "flush": inner.can_flush,
            "trim": inner.can_trim,
            "write_zeroes": inner.can_write_zeroes,
            "cache": inner.can_cache,
            "resize": inner.can_resize,
        }
        for name, is_offered in offered.items():
            if not is_offered:
                setattr(self, name, None)
        if inner.can_write_zeroes and not inner.can_fast_zero:
            setattr(self, "write_zeroes", _never_fast(self.write_zeroes))   # noqa: B010 - mypy: it is a method

    def read(self, offset: int, length: int) -> Answer[BytesLike]:
        return self.inner.read(offset, length)

    def write(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.inner.write(offset, data)

    def write_fua(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.inner.write(offset, data, fua=True)

    def flush(self) -> Answer[None]:
        return self.inner.flush()

    def trim(self, offset: int, length: int) -> Answer[None]:
        return self.inner.trim(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Answer[None]:
        return self.inner.write_zeroes(offset, length, may_trim=may_trim, fast=fast)

    def cache(self, offset: int, length: int) -> Answer[None]:
        return self.inner.cache(offset, length)

    def extents(self, offset: int, length: int) -> Answer[list[Extent]]:
        return self.inner.extents(offset, length)

    async def resize(self, size: int) -> None:
        try:
            await self.inner.resize(size)
        finally:
            self.size = self.inner.size

    async def close(self) -> None:
        await self.inner.close()


class Funnel(Filter):
    """A filter that treats requests of all kinds alike: each passes through ask(). Home thread."""

    def ask(self, request: Request) -> Answer[Any]:
        """Answer a request; here: pass it on."""
        return perform(self.inner, request)

    def read(self, offset: int, length: int) -> Answer[BytesLike]:
        return self.ask(Request("read", offset, length))

    def write(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.ask(Request("write", offset, len(data), data))

    def write_fua(self, offset: int, data: BytesLike) -> Answer[None]:
        return self.ask(Request("write", offset, len(data), data, fua=True))

    def flush(self) -> Answer[None]:
        return self.ask(Request("flush"))

    def trim(self, offset: int, length: int) -> Answer[None]:
        return self.ask(Request("trim", offset, length))

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool = False) -> Answer[None]:
        return self.ask(Request("write_zeroes", offset, length, may_trim=may_trim, fast=fast))

    def cache(self, offset: int, length: int) -> Answer[None]:
        return self.ask(Request("cache", offset, length))

    def extents(self, offset: int, length: int) -> Answer[list[Extent]]:
        return self.ask(Request("extents", offset, length))


def _never_fast(write_zeroes: Callable[..., Any]) -> Callable[..., Any]:
    """The same without the option: a driver that takes it promises to tell fast from slow."""

    def plain(offset: int, length: int, *, may_trim: bool) -> Any:
        return write_zeroes(offset, length, may_trim=may_trim)

    return plain
