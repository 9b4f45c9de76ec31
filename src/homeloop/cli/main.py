"""The command's arguments, and who answers them.

Exit status: 0 all went well, 1 it failed (a sentence says how), 2 the arguments make no sense, 128 + a signal's
number when that ended it before its time (130: Ctrl-C).
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from homeloop.cli.words import StatusAwareHandler, screen, sentence
from homeloop.errors import BlockError, PeerError, UsageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status. The main thread.

    Arguments that argparse refuses, and --help, end in SystemExit.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")       # a name may be what the terminal cannot show
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        options.arguments = rest
    elif rest:
        parser.error(f"{options.command} has no option or argument {rest[0]!r}")
    logging.basicConfig(format="homeloop: %(message)s", level=logging.WARNING, handlers=[StatusAwareHandler()])
    failure, status = "", 1
    try:
        return int(options.run(options))
    except UsageError as exc:
        if not _is_of_arguments(exc):
            raise                   # a wrong thread or state: our mistake, and its traceback tells where
        failure, status = str(exc), 2
    except BlockError as exc:
        failure = exc.text
    except PeerError as exc:
        failure = str(exc)
    except OSError as exc:
        failure = sentence(exc)
    except KeyboardInterrupt:
        failure, status = "interrupted", 130
    screen.complain(f"homeloop {options.command}: {failure}")
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line: the usage that argparse puts before it takes more room than the reason."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')} ({self.prog} --help explains)\n")


def _parser() -> argparse.ArgumentParser:
    # Abbreviations would bind us: --s is --socket until there is a --sync.
    parser = _Parser(prog="homeloop", description="Serve block devices over NBD.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, help="show program's version number and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "serve",
        help="serve disk images to NBD clients",
        description="Serve disk images, or memory, to NBD clients until Ctrl-C or SIGTERM; then finish what is "
        "in flight, flush, and exit 0. A second Ctrl-C gives up on that.",
        allow_abbrev=False,
    )
    command.add_argument("source", nargs="*", metavar="SOURCE", help="a raw image or what else docs/block.md lists")
    command.add_argument("--name", help="the export's name (default: the file's name; one SOURCE only)")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on this unix socket (default: one in a private folder)")
    where.add_argument(
        "--listen", metavar="HOST:PORT", help="listen on TCP; no HOST: this machine only; port 0: any free one"
    )
    command.add_argument(
        "--iothreads", type=_count, default=1, metavar="N", help="IOThreads that the exports are dealt to (default: 1)"
    )
    command.add_argument("--read-only", action="store_true", help="refuse every change")
    command.add_argument(
        "--filter", action="append", default=[], metavar="NAME:OPTION=VALUE,...",
        help="put a filter over each device, such as delay:read=5ms; the last is what clients see (docs/filters.md)",
    )
    command.add_argument(
        "--size", type=_size, metavar="SIZE",
        help="make the image if it is missing, with so many bytes; k, M, G and T are powers of 1024",
    )
    _add_tls(command)
    _add_control(command)
    command.set_defaults(run=_later("serve", "serve"))

    _add_copy(commands)
    command = commands.add_parser(
        "demo",
        help="show what homeloop is: an image, an IOThread, real clients, plain threads under the big lock",
        description="Serve an image from an IOThread and copy it out, while plain threads read blocks of it with "
        "call(), and a coroutine hops between contexts. Prints who ran what where.",
        allow_abbrev=False,
    )
    command.add_argument("image", nargs="?", help="a raw image, which is only read (default: one of 64 MiB is made)")
    command.set_defaults(run=_later("demo", "demo"))

    _add_ps(commands)

    command = commands.add_parser(
        "bench",
        help="run the benchmarks of the source checkout",
        description="Run the benchmarks of the source checkout: `homeloop bench --quick` for a look.",
        add_help=False,
        allow_abbrev=False,
    )
    command.set_defaults(run=_later("bench", "bench"))
    return parser


def _add_control(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--control", metavar="PATH", help="take commands on this unix socket, as qemu-storage-daemon does (QMP)"
    )
    command.add_argument("--config", metavar="FILE", help="serve what this file says (TOML; see docs/daemon.md)")
    command.add_argument("--check", action="store_true", help="only check --config FILE, and say all that is wrong")
    command.add_argument(
        "--switch-interval-ms", type=float, metavar="MS",
        help="how long a busy thread keeps the others from running at most (default: 0.5; Python's own is 5)",
    )
    command.add_argument(
        "--watchdog-s", type=float, metavar="S",
        help="name a device in the log that blocks its thread for longer, with the stack (default: 1; 0: never)",
    )


def _add_ps(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "ps",
        help="show what running homeloop programs do",
        description="Ask this user's running programs that listen (homeloop.debug.listen(), HOMELOOP_DEBUG_SOCKET=1 or "
        "`homeloop serve --control`): contexts, coroutines and what they wait for, the big lock, exports.",
        allow_abbrev=False,
    )
    command.add_argument("socket", nargs="*", metavar="SOCKET", help="ask there (default: all in the usual place)")
    command.add_argument("--json", action="store_true", help="print values instead of text")
    command.set_defaults(run=_later("ps", "ps"))


def _add_tls(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tls-certificates", metavar="FOLDER",
        help="serve nobody without TLS; ca-cert.pem, server-cert.pem and server-key.pem are in this folder",
    )
    command.add_argument("--tls-verify-peer", action="store_true", help="clients need a certificate of ca-cert.pem")
    command.add_argument(
        "--tls-psk", metavar="FILE", help="the same with pre-shared keys instead: lines of user:key in hex digits"
    )
    command.add_argument(
        "--tls-only", metavar="EXPORT", action="append", default=[],
        help="only this export needs TLS, the others are for everybody (may be given several times)",
    )


def _add_copy(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "copy",
        help="copy one device to another: images, NBD exports, memory",
        description="Copy SOURCE to the beginning of TARGET: each a raw image, an NBD URI, or any other device that "
        "serve takes. An image that is missing is made; one that is there must be large enough. Holes stay holes. Ends "
        "with a flush.",
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="SOURCE")
    command.add_argument("target", metavar="TARGET")
    command.add_argument(
        "--connections", type=_count, default=2, metavar="N",
        help="threads that copy, each with a connection of its own to an export that allows several (default: 2)",
    )
    command.add_argument(
        "--requests", type=_count, default=16, metavar="N", help="requests in flight on each of them (default: 16)"
    )
    command.add_argument(
        "--request-size", type=_size, default=256 << 10, metavar="SIZE", help="of one request (default: 256k)"
    )
    command.add_argument("--no-sparse", action="store_true", help="do not ask the source for holes: copy every byte")
    command.add_argument(
        "--detect-zeroes", action="store_true", help="make holes of zeroes that the source calls data, 64 KiB at least"
    )
    command.add_argument("--no-flush", action="store_true", help="do not wait until the target is on stable storage")
    after = command.add_mutually_exclusive_group()
    after.add_argument("--verify", action="store_true", help="compare the two afterwards")
    after.add_argument(
        "--compare-only", action="store_true", help="copy nothing, compare: exit status 1 if they differ"
    )
    command.set_defaults(run=_later("copy", "copy_command"))


class _Version(argparse.Action):
    """--version. argparse's own wants the text when the parser is made, and to find it takes 20 ms."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"homeloop {_version()}")
        parser.exit()


def _version() -> str:
    metadata = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version("homeloop"))
    except metadata.PackageNotFoundError:
        return "(not installed: it runs from its source)"


def _later(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A subcommand that is imported when it is run: `homeloop copy` need not wait for the daemon."""

    def run(options: argparse.Namespace) -> int:
        return int(getattr(importlib.import_module(f"homeloop.cli.{module}"), function)(options))

    return run


def _is_of_arguments(error: UsageError) -> bool:
    """Whether it is about what the user said, and no mistake of ours."""
    # A ConfigError cannot be without its module.
    config = sys.modules.get("homeloop.daemon.config")
    return type(error) is UsageError or (config is not None and type(error) is config.ConfigError)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def _size(text: str) -> int:
    sizes = importlib.import_module("homeloop.block.sizes")      # with all of homeloop.block: --help needs none
    try:
        return int(sizes.parse_size(text))
    except UsageError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
