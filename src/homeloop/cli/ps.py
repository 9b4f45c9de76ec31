"""`homeloop ps`: what running programs do just now."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any, Final

from homeloop.cli.words import amount, plural, screen
from homeloop.debug.listening import runtime_folder

__all__ = ["ask", "ps", "text_of"]

_ANSWER_S: Final = 5.0
_ANSWER_BYTES_MAX: Final = 64 << 20


def ps(options: argparse.Namespace) -> int:
    """Ask every program of this user, or the sockets that are named, and print what they say; 1 if one is silent."""
    paths = [Path(path) for path in options.socket] or sorted(runtime_folder().glob("*.sock"))
    found, failed = [], 0
    for path in paths:
        try:
            found.append(ask(path))
        except ConnectionRefusedError:
            if not options.socket:
                with contextlib.suppress(OSError):
                    os.unlink(path)             # its program is dead
            else:
                failed += 1
                screen.complain(f"homeloop ps: {path}: nobody answers")
        except (OSError, ValueError) as error:
            failed += 1
            screen.complain(f"homeloop ps: {path}: {error}")
    if options.json:
        screen.say(json.dumps(found, indent=2))
    else:
        for shown in found:
            screen.say(text_of(shown))
        if not found and not failed:
            screen.say("no program answers: it needs homeloop.debug.listen(), or HOMELOOP_DEBUG_SOCKET=1")
    return 1 if failed else 0


def ask(path: Path) -> dict[str, Any]:
    """Return the picture of the program that listens there. OSError or ValueError if there is none."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_ANSWER_S)
        sock.connect(str(path))
        said = bytearray()
        while piece := sock.recv(1 << 20):
            said += piece
            if len(said) > _ANSWER_BYTES_MAX:
                raise ValueError("the answer has no end")
    shown = json.loads(said)
    if not isinstance(shown, dict):
        raise ValueError("the answer is no picture")
    return shown


def text_of(shown: dict[str, Any]) -> str:
    """A picture for people."""
    lines = [f"{shown.get('pid', '?')}  {' '.join(map(str, shown.get('command', [])))}"]
    if "error" in shown:
        lines.append(f"  could not be shown in full: {shown['error']}")
    for context in shown.get("contexts", []):
        served = context["served_by"] or "nobody"
        kind = "main context" if context["main"] else "context"
        count = plural(len(context["coroutines"]), "coroutine")
        lines.append(f"  {kind} {context['name']}, served by {served}, {count}")
        lock = context.get("big_lock")
        if lock is not None:
            waiting = f", waiting: {', '.join(lock['waiting'])}" if lock["waiting"] else ""
            lines.append(f"    big lock: {'held by ' + lock['holder'] if lock['holder'] else 'free'}{waiting}")
        for task in context["coroutines"]:
            reason = f" ({task['reason']})" if task["reason"] else ""
            lines.append(f"    {task['name']}: {task['state']}{reason}" + (f", {task['at']}" if task["at"] else ""))
    for export in shown.get("exports", []):
        lines.append(
            f"  export {export['name']!r} of node {export['node']}, {amount(export['size'])}, at home in "
            f"{export['home']}, {export['in_flight']} in flight"
        )
        lines += [
            f"    {one['peer']}: {one['tls'] or 'no TLS'}, {one['replies']} replies, "
            f"{plural(one['requests'], 'request')}, {one['in_flight']} in flight, "
            f"{amount(one['received_bytes'])} received, {amount(one['sent_bytes'])} sent"
            for one in export["connections"]
        ]
    return "\n".join(lines)
