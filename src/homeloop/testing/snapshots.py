"""The picture of the runtime as text, where tests look for it: it is homeloop.debug.snapshots."""

from __future__ import annotations

from homeloop.debug.snapshots import context_lines, open_contexts, snapshot, tasks_of

__all__ = ["context_lines", "open_contexts", "snapshot", "tasks_of"]
