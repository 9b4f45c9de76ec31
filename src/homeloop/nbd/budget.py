"""What all clients of a server may occupy together, shared fairly by those that occupy much.

Each connection has an account and says there how many bytes it holds, once it holds more than `free_bytes`: small
requests cost no lock. Beyond the total whoever holds that much waits until what it holds has become less; beyond half
of it, who holds more than an equal share. So one client alone may have all, and gives way to others that come; while it
has all, they go on with what is free.
"""

from __future__ import annotations

import threading
from typing import Final

__all__ = ["FREE_BYTES", "Account", "Budget"]

FREE_BYTES: Final = 1 << 20  # of each connection: not counted


class Budget:
    """The total of a server. Any thread."""

    def __init__(self, total_bytes: int, free_bytes: int = FREE_BYTES) -> None:
        self.free_bytes = free_bytes
        self._total_bytes = total_bytes
        self._lock = threading.Lock()  # a leaf
        self._held_bytes = 0  # under _lock: the sum over accounts
        self._holders = 0  # under _lock: accounts that are not at 0

    @property
    def held_bytes(self) -> int:
        """What is held now, but for what is free."""
        return self._held_bytes

    def change(self, before: int, now: int) -> bool:
        """An account goes from one value to another: is it to wait?"""
        with self._lock:
            self._held_bytes += now - before
            self._holders += bool(now) - bool(before)
            if not now or self._held_bytes <= self._total_bytes // 2:
                return False
            return self._held_bytes > self._total_bytes or now > self._total_bytes // self._holders


class Account:
    """What one connection has said. Its home thread only."""

    __slots__ = ("_budget", "told_bytes")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.told_bytes = 0  # 0: no more than what is free

    def is_over(self, held_bytes: int) -> bool:
        """Say what is held now; True: begin nothing new until it is less."""
        now = held_bytes if held_bytes > self._budget.free_bytes else 0
        before, self.told_bytes = self.told_bytes, now
        return self._budget.change(before, now)
