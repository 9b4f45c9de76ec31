"""How the command writes numbers, tables and status lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["amount", "clear_line", "status_line", "table"]


def amount(count: float) -> str:
    """A number of bytes for people: 512 B, 64.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def status_line(text: str) -> None:
    """Show text in place of the last one; nothing where stdout is no terminal."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\x1b[K{text}")
        sys.stdout.flush()


def clear_line() -> None:
    """Take the status line away."""
    status_line("")


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns, the second to the right."""
    left = max(len(name) for name, _value in rows)
    right = max(len(value) for _name, value in rows)
    return "\n".join(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)
