"""The nodes of the daemon: devices with names, who uses them, and where they are at home.

    export e0 -> node r0 (raw) -> node n0 (file)            a node is one Device; a filter's driver asks its child's

A node's device is for one context only: its home. Without users a node is at home in the main context, and moves to
that of the IOThread of its first export, with all that is above and below it: a filter asks its child directly.

Everything here belongs to the main context. Images are opened and drivers made on workers; meanwhile the name is taken.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from homeloop.block.device import Device
from homeloop.block.driver import Driver
from homeloop.core.context import AioContext
from homeloop.core.workers import to_worker
from homeloop.errors import UsageError

__all__ = ["NAME_BYTES_MAX", "Node", "Nodes", "is_identifier", "run_at"]

logger = logging.getLogger(__name__)

NAME_BYTES_MAX: Final = 31          # QEMU's limit
_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


def is_identifier(text: str) -> bool:
    """QEMU's rule for the names of nodes, exports and objects: a letter, then letters, digits and -._"""
    return _IDENTIFIER.fullmatch(text) is not None


class Node:
    """One device in the graph. The main context's; its device is its home's."""

    def __init__(
        self, name: str, kind: str, device: Device, *, children: tuple[Node, ...] = (), home: AioContext,
        options: Mapping[str, object], owned: bool = True, movable: bool = True,
    ) -> None:
        self.name = name
        self.kind = kind                        # "file", "raw": QEMU's word for the driver
        self.device = device
        self.children = children                # what its driver asks
        self.parents: list[Node] = []
        self.exports: list[str] = []            # ids of those that offer it
        self.claims = 0                         # nodes that are being opened over it, resizes that are under way
        self.home = home
        self.options = options                  # as it was asked for
        self.owned = owned                      # blockdev-del may name it; False: it goes with its parent
        self.movable = movable                  # False: its driver keeps things of the context where it was used
        self.settled = False                    # it, or one of its family, has been asked something at its home
        self.offered = False                    # has been exported itself

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.kind} at {self.home.name} used by {', '.join(self.users()) or 'nobody'}>"

    def moved(self) -> tuple[int, int, int]:
        """Bytes read, bytes written, requests so far, of clients."""
        if not self.offered:
            return 0, 0, 0
        count = self.device.statistics()
        requests = count.reads + count.writes + count.flushes + count.trims + count.write_zeroes
        return count.read_bytes, count.written_bytes, requests

    def users(self) -> list[str]:
        """Who uses it, for texts."""
        return [f"export '{name}'" for name in self.exports] + [f"node '{parent.name}'" for parent in self.parents]


class Nodes(Mapping[str, Node]):
    """All nodes, by name, oldest first. The main context's."""

    def __init__(self, context: AioContext) -> None:
        self.context = context                  # the main context
        self._nodes: dict[str, Node] = {}
        self._opening: set[str] = set()         # names that are taken by what is being opened, or closed
        self._numbers = itertools.count(1)
        self._gone = (0, 0, 0)                  # what nodes that are closed had moved

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def check_new(self, name: str) -> None:
        """UsageError, in QEMU's words, for a name that cannot be a new node's."""
        if len(name.encode(errors="replace")) > NAME_BYTES_MAX:
            raise UsageError("Node name too long")
        if not is_identifier(name):
            raise UsageError(f"Invalid node-name: '{name}'")
        if not self.is_free(name):
            raise UsageError(f"Duplicate nodes with node-name='{name}'")

    def is_free(self, name: str) -> bool:
        """Is there no node of that name, nor one that comes or goes?"""
        return name not in self._nodes and name not in self._opening

    def free_name(self) -> str:
        """A name for a node that nobody named; no one can ask for it: '#' begins no identifier."""
        return f"#block{next(self._numbers):03}"

    async def open(
        self, name: str, kind: str, make: Callable[[list[Device]], Driver | Device | None], *,
        children: tuple[Node, ...] = (), options: Mapping[str, object], read_only: bool = False, owned: bool = True,
        movable: bool = True, home: AioContext | None = None,
    ) -> Node:
        """Make a node: make() runs on a worker. What it raises is raised, and nothing has changed.

        make(made) returns a driver or a device, or puts a device into the list. The name has been checked. home: None
        for its children's, else the main context. Cancelled or failed: waits for make(), and closes what it made.
        """
        if home is None:
            home = children[0].home if children else self.context
        made: list[Device] = []

        def opening() -> None:
            found = make(made)
            if found is not None:
                made.append(found if isinstance(found, Device) else _guarded(found, name, read_only))

        self._opening.add(name)
        for child in children:
            child.claims += 1                   # another client of the control socket must not delete it meanwhile
        try:
            await to_worker(opening)
        except BaseException:
            for device in made:
                await run_at(home, self.context, device.close())
            raise
        finally:
            self._opening.discard(name)
            for child in children:
                child.claims -= 1
        node = Node(
            name, kind, made[0], children=children, home=home, options=options, owned=owned, movable=movable
        )
        for child in children:
            child.parents.append(node)
        self._nodes[name] = node
        return node

    def check_unused(self, node: Node) -> None:
        """UsageError, in QEMU's words, for a node that cannot be deleted now."""
        if node.exports:
            raise UsageError(f"Node {node.name} is in use")
        if not node.owned:
            raise UsageError(f"Node {node.name} is not owned by the monitor")
        if node.parents or node.claims:
            raise UsageError(f"Block device {node.name} is in use")

    async def close(self, node: Node) -> None:
        """Take a node that nobody uses out, close its device at its home, then the children that are only its.

        Raises what the close of the first device raised that failed; all are closed and gone all the same.
        """
        assert not node.exports, node
        assert not node.parents, node
        failure: Exception | None = None
        going = [node]
        while going:
            node = going.pop()
            del self._nodes[node.name]
            self._opening.add(node.name)        # an image is locked until it is closed
            try:
                await run_at(node.home, self.context, node.device.close())
            except Exception as exc:
                failure = failure or exc
            finally:
                self._opening.discard(node.name)
                self._gone = _sum(self._gone, node.moved())
            for child in node.children:
                child.parents.remove(node)
                if not child.owned and not child.parents and not child.exports:
                    going.append(child)
        if failure is not None:
            raise failure

    def moved(self) -> tuple[int, int, int]:
        """Bytes read, bytes written, requests, over all exported nodes since the start, closed ones included."""
        total = self._gone
        for node in self._nodes.values():
            total = _sum(total, node.moved())
        return total

    def family(self, node: Node) -> list[Node]:
        """The nodes that must share a home with this one, itself included."""
        found = [node]
        for member in found:
            found += [other for other in (*member.children, *member.parents) if other not in found]
        return found

    def settle(self, node: Node, home: AioContext) -> None:
        """Move a node and its family to the home of a new export. UsageError if one of them cannot move."""
        family = self.family(node)
        if node.home is not home:
            for member in family:
                if member.exports:
                    raise UsageError("Cannot change iothread of active block backend")
                if member.claims:
                    raise UsageError(f"Node {member.name} is busy at home in {member.home.name}, and cannot move now")
                if member.settled and not member.movable:
                    raise UsageError(f"Node {member.name} is at home in {member.home.name}, and cannot move")
        for member in family:
            member.home = home
            member.settled = True

    def move_out(self, home: AioContext) -> list[str]:
        """Move all nodes that are at home there to the main context; or none, and return which cannot."""
        there = [node for node in self._nodes.values() if node.home is home]
        stay = [
            f"node '{node.name}'" for node in there
            if node.exports or node.claims or (node.settled and not node.movable)
        ]
        if not stay:
            for node in there:
                node.home = self.context
        return stay

    async def run_at_home(self, node: Node, coro: Any) -> Any:
        """Run a coroutine of a node's device where that is at home; it stays there so long."""
        node.claims += 1
        try:
            return await run_at(node.home, self.context, coro)
        finally:
            node.claims -= 1


async def run_at(home: AioContext, here: AioContext, coro: Any) -> Any:
    """Run a coroutine at a home from a coroutine of another, or of the same, context."""
    return await (coro if home is here else home.run(coro))


def _sum(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _guarded(driver: Driver, name: str, read_only: bool) -> Device:
    try:
        return Device(driver, name=name, read_only=read_only or None)
    except BaseException:
        close = getattr(driver, "close", None)
        if callable(close) and not asyncio.iscoroutinefunction(close):
            close()
        raise
