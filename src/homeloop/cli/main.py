"""The command's arguments, and who answers them.

Exit status: 0 all went well, 1 it failed (a sentence says how), 2 the arguments make no sense, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from homeloop import __version__
from homeloop.block.opening import parse_size
from homeloop.cli.demo import demo
from homeloop.cli.serve import serve
from homeloop.errors import BlockError, UsageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status. The main thread."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="homeloop: %(message)s", level=logging.WARNING)
    try:
        return int(options.run(options))
    except UsageError as exc:
        print(f"homeloop {options.command}: {exc}", file=sys.stderr)
        return 2
    except BlockError as exc:
        print(f"homeloop {options.command}: {exc.text}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"homeloop {options.command}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="homeloop", description="Serve block devices over NBD.")
    parser.add_argument("--version", action="version", version=f"homeloop {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "serve",
        help="serve disk images to NBD clients",
        description="Serve disk images, or memory, to NBD clients until Ctrl-C or SIGTERM; then finish what is "
        "in flight, flush, and exit 0.",
    )
    command.add_argument("source", nargs="+", metavar="SOURCE", help="a raw image or block device, or memory:SIZE")
    command.add_argument("--name", help="the export's name (default: the file's name; one SOURCE only)")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on this unix socket")
    where.add_argument("--listen", metavar="HOST:PORT", help="listen on TCP; port 0: any free one")
    command.add_argument("--iothreads", type=int, default=1, metavar="N", help="IOThreads to deal exports to (1)")
    command.add_argument("--read-only", action="store_true", help="refuse every change")
    command.add_argument("--size", type=_size, metavar="SIZE", help="make the image, this large, if it is missing")
    command.set_defaults(run=serve)

    command = commands.add_parser(
        "demo",
        help="show what homeloop is: an image, an IOThread, real clients, plain threads under the big lock",
        description="Serve an image from an IOThread and copy it out, while plain threads read blocks of it with "
        "call(), and a coroutine hops between contexts. Prints who ran what where.",
    )
    command.add_argument("image", nargs="?", help="a raw image (default: one of 64 MiB is made)")
    command.set_defaults(run=demo)
    return parser


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
