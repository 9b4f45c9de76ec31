"""From options to nodes, and from a checked configuration to a daemon that serves it."""

from __future__ import annotations

import itertools
from typing import Any

from homeloop.block.device import Device
from homeloop.core.iothread import IOThread
from homeloop.daemon.config import ConfiguredExport, ServeConfig
from homeloop.daemon.exporting import Daemon, ExportConfig
from homeloop.daemon.kinds import KINDS
from homeloop.daemon.nodes import Node, Nodes
from homeloop.errors import UsageError

__all__ = ["deploy", "find_node", "open_node"]


def find_node(nodes: Nodes, name: str, *, device: str = "") -> Node:
    """Return the node of that name. UsageError, in QEMU's words, if there is none."""
    node = nodes.get(name)
    if node is None:
        raise UsageError(f"Cannot find device='{device}' nor node-name='{name}'")
    return node


async def open_node(nodes: Nodes, options: dict[str, Any], *, owned: bool = True) -> Node:
    """Open a node with all that is inline below it; if it cannot be opened, what was opened for it is closed.

    options: checked by NODE_OPTIONS of homeloop.daemon.kinds. owned: blockdev-del may name it. The main context;
    UsageError or BlockError if it cannot be, and nothing has changed.
    """
    kind = KINDS[options["driver"]]
    if "node-name" in options:
        nodes.check_new(options["node-name"])
    name = options.get("node-name") or nodes.free_name()
    children: dict[str, Node] = {}
    for member in kind.children:
        below = options[member]
        if isinstance(below, str):
            children[member] = find_node(nodes, below, device=below)
        else:
            inherited = {"read-only": options["read-only"]} if "read-only" in options else {}
            children[member] = await open_node(nodes, inherited | below, owned=False)
    try:
        if "node-name" in options:      # again: what is below it may have taken the name, or somebody else meanwhile
            nodes.check_new(name)
        devices: dict[str, Device] = {member: child.device for member, child in children.items()}
        home = next((child.home for child in children.values()), nodes.context)
        if kind.asks:
            for child in children.values():
                nodes.settle(child, child.home)
        return await nodes.open(
            name, options["driver"], lambda _made: kind.make(options, devices, home),
            children=tuple(children.values()), options=options, read_only=bool(options.get("read-only")), owned=owned,
            movable=kind.movable, home=home,
        )
    except BaseException:
        for child in children.values():
            if not child.owned and not child.users():
                await nodes.close(child)
        raise


async def deploy(daemon: Daemon, config: ServeConfig) -> None:
    """Open the nodes and exports of a configuration. It does not listen yet.

    Exports without an IOThread of their own are dealt to those that there are. UsageError or BlockError, naming the
    node or export, for the first that cannot be; what is there by then close() ends.
    """
    for id, values in config.iothreads.items():
        if id not in daemon.objects:
            await daemon.objects.add(id, values)
    for options in config.nodes:
        await open_node(daemon.nodes, options)
    named = [daemon.objects[id] for id in config.iothreads] or list(daemon.iothreads)
    turn = itertools.cycle(named)
    for export in config.exports:
        iothread = next(turn) if export.iothread is None else daemon.objects[export.iothread]
        await _add(daemon, export, iothread)


async def _add(daemon: Daemon, export: ConfiguredExport, iothread: IOThread) -> None:
    if export.source is not None:
        wanted = ExportConfig(
            source=export.source, name=export.name, read_only=not export.writable, size=export.size,
            description=export.description, filters=export.filters,
        )
        await daemon.add_export(wanted, iothread=iothread)
        return
    assert export.node is not None, export
    node = find_node(daemon.nodes, export.node)
    await daemon.offer(
        node, name=export.name, iothread=iothread, description=export.description,
        writable=export.writable and not node.device.read_only,
    )
