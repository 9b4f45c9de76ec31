"""The futures of a home loop: only its home may settle them (rule 17)."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

__all__ = ["Future"]

get_ident = threading.get_ident

_set_result = asyncio.Future.set_result
_set_exception = asyncio.Future.set_exception
_cancel = asyncio.Future.cancel


class Future(asyncio.Future[Any]):
    """An asyncio future that only its loop's home may settle (rule 17).

    asyncio's own lets any thread change it and then never wakes the waiter.
    """

    __slots__ = ()

    def set_result(self, result: Any, /) -> None:
        """Settle with a result. Home thread (or big lock); WrongThread elsewhere, nothing changed."""
        loop: Any = self.get_loop()
        if get_ident() != loop.home_ident:
            loop.check_home("Future.set_result")
        _set_result(self, result)

    def set_exception(self, exception: Any, /) -> None:
        """Settle with an exception. Home thread (or big lock); WrongThread elsewhere, nothing changed."""
        loop: Any = self.get_loop()
        if get_ident() != loop.home_ident:
            loop.check_home("Future.set_exception")
        _set_exception(self, exception)

    def cancel(self, msg: Any = None) -> bool:
        """Cancel. Home thread (or big lock); WrongThread elsewhere, nothing changed."""
        loop: Any = self.get_loop()
        if get_ident() != loop.home_ident:
            loop.check_home("Future.cancel")
        return _cancel(self, msg)
