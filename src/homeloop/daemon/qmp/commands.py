"""The commands of the control socket: what each takes, and what it does with the daemon.

Names, arguments, answers and error texts are those of QEMU 7.2's qemu-storage-daemon, where it has the command. A
handler runs on the main context, under the big lock, after all its arguments were found good.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from homeloop.daemon.building import find_node, open_node
from homeloop.daemon.exporting import Daemon, Exported, ListenConfig
from homeloop.daemon.iothreads import PROPERTIES, WRITABLE
from homeloop.daemon.kinds import NODE_OPTIONS
from homeloop.daemon.nodes import Node, is_identifier
from homeloop.daemon.qmp.arguments import ANY, BOOL, INT, STRING, Enum, Integer, Member, Shape, Struct, Union
from homeloop.daemon.qmp.session import COMMAND_NOT_FOUND, DEVICE_NOT_FOUND, GENERIC_ERROR
from homeloop.daemon.tls_objects import TLS_TYPES
from homeloop.errors import BlockError, HomeloopError, UsageError

__all__ = ["COMMANDS", "VERSION", "CommandFailed", "execute"]

# Clients look at it to know which commands there are: those of 7.2, as far as query-commands lists them.
VERSION: Final[dict[str, object]] = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "homeloop"}
_IOTHREAD: Final = "iothread"
_UINT32: Final = Integer(low=0, high=(1 << 32) - 1, says="Parameter '{name}' expects uint32_t")

Arguments = dict[str, Any]


class CommandFailed(Exception):
    """A command failed; kind is one of QEMU's error classes."""

    def __init__(self, text: str, kind: str = GENERIC_ERROR) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Entry:
    takes: Shape
    run: Callable[[Daemon, Arguments], Awaitable[object]]


async def execute(daemon: Daemon, name: str, arguments: dict[str, object]) -> object:
    """Run a command and return its result. CommandFailed for what cannot be; ArgumentError before anything is done.

    Cancelled: what it had begun is taken back, or goes on, as the command has it; never half done.
    """
    entry = COMMANDS.get(name)
    if entry is None:
        raise CommandFailed(f"The command {name} has not been found", COMMAND_NOT_FOUND)
    checked = entry.takes.check(arguments, "")
    try:
        return await entry.run(daemon, checked)
    except BlockError as error:
        raise CommandFailed(error.text) from error
    except HomeloopError as error:
        raise CommandFailed(str(error)) from error
    except OSError as error:
        raise CommandFailed(error.strerror or str(error)) from error


# -- the monitor ---------------------------------------------------------------------------------------------


async def _query_version(_daemon: Daemon, _arguments: Arguments) -> object:
    return VERSION


async def _query_commands(_daemon: Daemon, _arguments: Arguments) -> object:
    return [{"name": name} for name in ("qmp_capabilities", *COMMANDS)]


async def _quit(_daemon: Daemon, _arguments: Arguments) -> object:
    return {}                       # who sees the answer go out ends the daemon


# -- nodes ---------------------------------------------------------------------------------------------------


async def _blockdev_add(daemon: Daemon, arguments: Arguments) -> object:
    if "node-name" not in arguments:
        raise UsageError("'node-name' must be specified for the root node")
    await open_node(daemon.nodes, arguments)
    return {}


async def _blockdev_del(daemon: Daemon, arguments: Arguments) -> object:
    name = arguments["node-name"]
    node = daemon.nodes.get(name)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    daemon.nodes.check_unused(node)
    await daemon.nodes.close(node)
    return {}


async def _query_named_block_nodes(daemon: Daemon, _arguments: Arguments) -> object:
    return [_node_info(node) for node in reversed(list(daemon.nodes.values()))]


def _node_info(node: Node) -> dict[str, object]:
    filename = node.options.get("filename", node.options.get("source", f"{node.kind}://"))
    image: dict[str, object] = {"filename": filename, "format": node.kind, "virtual-size": node.device.size}
    if node.kind == "file" and isinstance(filename, str):
        try:
            image["actual-size"] = os.stat(filename).st_blocks * 512
        except OSError:
            pass
    limits = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
    return {
        "node-name": node.name, "drv": node.kind, "ro": node.device.read_only, "file": filename, "image": image,
        "cache": {"writeback": True, "direct": False, "no-flush": False}, "detect_zeroes": "off",
        "encrypted": False, "backing_file_depth": 0, "write_threshold": 0, **dict.fromkeys(limits, 0),
    }


async def _query_block(_daemon: Daemon, _arguments: Arguments) -> object:
    return []                       # devices of a guest: there is none


async def _block_resize(daemon: Daemon, arguments: Arguments) -> object:
    node = find_node(daemon.nodes, arguments.get("node-name", ""), device=arguments.get("device", ""))
    if arguments["size"] < 0:
        raise UsageError("Parameter 'size' expects a >0 size")
    await daemon.resize(node, arguments["size"])
    return {}


# -- objects -------------------------------------------------------------------------------------------------


async def _object_add(daemon: Daemon, arguments: Arguments) -> object:
    id, qom_type = arguments["id"], arguments["qom-type"]
    if not is_identifier(id):
        raise UsageError("Parameter 'id' expects an identifier")
    if id in daemon.tls_objects.types or (qom_type != _IOTHREAD and id in daemon.objects):
        raise UsageError(f"attempt to add duplicate property '{id}' to object (type 'container')")
    if qom_type == _IOTHREAD:
        await daemon.objects.add(id, {name: value for name, value in arguments.items() if name in PROPERTIES})
    else:
        await daemon.tls_objects.add(id, qom_type, arguments)
    return {}


async def _object_del(daemon: Daemon, arguments: Arguments) -> object:
    id = arguments["id"]
    if id in daemon.tls_objects:
        daemon.tls_objects.delete(id)
    elif id in daemon.objects:
        await daemon.delete_iothread(id)
    else:
        raise UsageError(f"object '{id}' not found")
    return {}


async def _query_iothreads(daemon: Daemon, _arguments: Arguments) -> object:
    objects = daemon.objects
    shown = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch")
    return [
        {"id": id, "thread-id": objects.thread_id(id)} | {name: objects.value(id, name) for name in shown}
        for id in objects
    ]


async def _qom_list(daemon: Daemon, arguments: Arguments) -> object:
    path = arguments["path"]
    own = [{"name": "type", "type": "string"}]
    if path.strip("/") == "":
        return [*own, {"name": "objects", "type": "child<container>"}]
    if path.strip("/") == "objects":
        types = dict.fromkeys(daemon.objects, _IOTHREAD) | daemon.tls_objects.types
        return [*own, *({"name": id, "type": f"child<{kind}>"} for id, kind in types.items())]
    _find_object(daemon, path)
    return [*own, *({"name": name, "type": "int"} for name in PROPERTIES)]


def _find_object(daemon: Daemon, path: str) -> str:
    """An IOThread's id, from its path: /objects/ID, or the last part of it."""
    id = path.removeprefix("/objects/")
    if id not in daemon.objects:
        raise CommandFailed(f"Device '{path}' not found", DEVICE_NOT_FOUND)
    return id


async def _qom_get(daemon: Daemon, arguments: Arguments) -> object:
    id, name = _find_object(daemon, arguments["path"]), arguments["property"]
    if name == "type":
        return "iothread"
    if name not in PROPERTIES:
        raise UsageError(f"Property 'iothread.{name}' not found")
    return daemon.objects.value(id, name)


async def _qom_set(daemon: Daemon, arguments: Arguments) -> object:
    id, name = _find_object(daemon, arguments["path"]), arguments["property"]
    if name != "type" and name not in PROPERTIES:
        raise UsageError(f"Property 'iothread.{name}' not found")
    if name not in WRITABLE:
        raise UsageError(f"Property 'iothread.{name}' is not writable")
    daemon.objects.set(id, name, INT.check(arguments["value"], name))
    return {}


# -- exports -------------------------------------------------------------------------------------------------


async def _nbd_server_start(daemon: Daemon, arguments: Arguments) -> object:
    address, host, port = arguments["addr"], "", ""
    where = address["data"]
    if address["type"] == "unix":
        listen, failed = ListenConfig(socket=where["path"]), f"Failed to bind socket to {where['path']}"
    else:
        host, port = where["host"], where["port"]
        if not port.isascii() or not port.isdigit() or int(port[:6]) > 65535:
            text = "Servname not supported for ai_socktype"
            raise UsageError(f"address resolution failed for {host}:{port}: {text}")
        listen, failed = ListenConfig(host=host, port=int(port)), "Failed to bind socket"
    tls = daemon.tls_objects.find(arguments["tls-creds"]) if "tls-creds" in arguments else None
    try:
        await daemon.start_server([listen], arguments.get("max-connections"), tls=tls)
    except OSError as error:
        if isinstance(error.__cause__, socket.gaierror | UnicodeError):
            raise UsageError(f"address resolution failed for {host}:{port}: {error.__cause__.args[-1]}") from error
        text = os.strerror(error.errno) if error.errno else str(error)
        raise UsageError(f"{failed}: {text}") from error
    return {}


async def _nbd_server_stop(daemon: Daemon, _arguments: Arguments) -> object:
    await daemon.stop_server()
    return {}


async def _block_export_add(daemon: Daemon, arguments: Arguments) -> object:
    id, iothread = arguments["id"], None
    if not is_identifier(id):
        raise UsageError("Invalid block export id")
    daemon.check_new_id(id)
    node = find_node(daemon.nodes, arguments["node-name"])
    if "iothread" in arguments:
        iothread = daemon.objects.get(arguments["iothread"])
        if iothread is None:
            raise UsageError(f'iothread "{arguments["iothread"]}" not found')
    if not daemon.listening:
        raise UsageError("NBD server not running")
    name = arguments.get("name", node.name)
    if name in daemon.exported:
        raise UsageError(f"NBD server already has export named '{name}'")
    await daemon.offer(
        node, name=name, id=id, iothread=iothread, writable=arguments.get("writable", False),
        description=arguments.get("description", ""), fixed=arguments.get("fixed-iothread", False),
    )
    return {}


async def _block_export_del(daemon: Daemon, arguments: Arguments) -> object:
    id = arguments["id"]
    exported = daemon.exports.get(id)
    if exported is None:
        raise UsageError(f"Export '{id}' is not found")
    await daemon.take_down(exported, hard=arguments.get("mode") == "hard")
    return {}


async def _query_block_exports(daemon: Daemon, _arguments: Arguments) -> object:
    return [_export_info(exported) for exported in reversed(list(daemon.exports.values()))]


def _export_info(exported: Exported) -> dict[str, object]:
    return {
        "id": exported.id, "type": "nbd", "node-name": exported.node.name,
        "shutting-down": exported.removal is not None,
    }


_NOTHING: Final = Struct()
_INET: Final = Struct(Member("host", STRING), Member("port", STRING))
_UNIX: Final = Struct(Member("path", STRING))
_ADDRESS: Final = Union("type", {"inet": (Member("data", _INET),), "unix": (Member("data", _UNIX),)})
_TLS_OPTIONS: Final = tuple(
    Member(name, shape, optional=True)
    for name, shape in (("dir", STRING), ("endpoint", Enum("client", "server")), ("verify-peer", BOOL))
)
_OBJECTS: Final[dict[str, tuple[Member, ...]]] = {
    _IOTHREAD: tuple(Member(name, INT, optional=True) for name in PROPERTIES),
    **dict.fromkeys(TLS_TYPES, _TLS_OPTIONS),
}
_NBD_EXPORT: Final = (
    Member("name", STRING, optional=True), Member("description", STRING, optional=True),
)

COMMANDS: Final[dict[str, _Entry]] = {
    "query-version": _Entry(_NOTHING, _query_version),
    "query-commands": _Entry(_NOTHING, _query_commands),
    "quit": _Entry(_NOTHING, _quit),
    "blockdev-add": _Entry(NODE_OPTIONS, _blockdev_add),
    "blockdev-del": _Entry(Struct(Member("node-name", STRING)), _blockdev_del),
    "query-named-block-nodes": _Entry(Struct(Member("flat", BOOL, optional=True)), _query_named_block_nodes),
    "query-block": _Entry(_NOTHING, _query_block),
    "block_resize": _Entry(
        Struct(
            Member("device", STRING, optional=True), Member("node-name", STRING, optional=True), Member("size", INT)
        ),
        _block_resize,
    ),
    "object-add": _Entry(Union("qom-type", _OBJECTS, Member("id", STRING)), _object_add),
    "object-del": _Entry(Struct(Member("id", STRING)), _object_del),
    "query-iothreads": _Entry(_NOTHING, _query_iothreads),
    "qom-list": _Entry(Struct(Member("path", STRING)), _qom_list),
    "qom-get": _Entry(Struct(Member("path", STRING), Member("property", STRING)), _qom_get),
    "qom-set": _Entry(Struct(Member("path", STRING), Member("property", STRING), Member("value", ANY)), _qom_set),
    "nbd-server-start": _Entry(
        Struct(
            Member("addr", _ADDRESS), Member("tls-creds", STRING, optional=True),
            Member("max-connections", _UINT32, optional=True),
        ),
        _nbd_server_start,
    ),
    "nbd-server-stop": _Entry(_NOTHING, _nbd_server_stop),
    "block-export-add": _Entry(
        Union(
            "type", {"nbd": _NBD_EXPORT}, Member("id", STRING), Member("fixed-iothread", BOOL, optional=True),
            Member("iothread", STRING, optional=True), Member("node-name", STRING),
            Member("writable", BOOL, optional=True),
        ),
        _block_export_add,
    ),
    "block-export-del": _Entry(
        Struct(Member("id", STRING), Member("mode", Enum("safe", "hard"), optional=True)), _block_export_del
    ),
    "query-block-exports": _Entry(_NOTHING, _query_block_exports),
}
