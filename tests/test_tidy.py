"""Our own rules as tests: layers, purity, sizes, names, sleeps. Each finding says what to do instead.

A rule is a function from one parsed source to findings. test_tree() applies each to the files it is for;
test_rule_catches() plants a violation of each, so that a rule that sees nothing is seen.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 600

# Each line imports only what is below it; names on one line do not know each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("daemon", "testing"),
    ("nbd", "bridges", "debug"),
    ("block",),
    ("sync",),
    ("core",),
    ("errors",),
)
LEVEL_OF = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}

# Bytes in, events and bytes out. A module whose docstring calls it pure in the first line counts too.
PURE = {
    "homeloop.block.extents",
    "homeloop.daemon.qmp.arguments",
    "homeloop.daemon.qmp.parsing",
    "homeloop.daemon.qmp.session",
    "homeloop.nbd.chunks",
    "homeloop.nbd.client_handshake",
    "homeloop.nbd.protocol",
    "homeloop.nbd.handshake",
    "homeloop.nbd.replies",
    "homeloop.nbd.transmission",
    "homeloop.nbd.uri",
}
NOT_PURE = {
    "homeloop.block.extents",
    "asyncio", "concurrent", "logging", "multiprocessing", "os", "select", "selectors", "signal", "socket",
    "ssl", "subprocess", "threading", "time",
}

# The one module that touches asyncio's private parts, and the names by which others would.
MAY_TOUCH_ASYNCIO = "homeloop.core.loop"
ASYNCIO_PRIVATE = {
    "_asyncio_future_blocking", "_check_closed", "_check_running", "_csock", "_default_executor",
    "_fut_waiter", "_must_cancel", "_num_cancels_requested", "_process_events", "_ready",
    "_run_forever_cleanup", "_run_forever_setup", "_run_once", "_scheduled", "_selector", "_ssock",
    "_stopping", "_thread_id", "_write_to_self",
}

BANNED_NAMES = {"base", "common", "helper", "helpers", "misc", "util", "utils"}
ALLOW_SLEEP = re.compile(r"#\s*tidy: allow sleep: \S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One parsed file. `package` is the importable package the module lives in (itself, for __init__)."""

    path: str
    module: str
    lines: list[str]
    tree: ast.Module
    known: frozenset[str]       # every module of the package: tells a submodule from a name

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name: `from module import name`, or `import module` with name None."""

    line: int
    module: str
    name: str | None
    bound_as: str
    relative: bool
    in_function: bool
    typing_only: bool           # under `if TYPE_CHECKING:`: not there at run time


def at(source: Source, line: int, text: str) -> str:
    return f"{source.path}:{line}: {text}"


def imports_of(source: Source) -> list[Import]:
    """Every import of a file: nested ones and those under TYPE_CHECKING too."""
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typed = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import | ast.ImportFrom):
                whole = isinstance(child, ast.Import)
                for alias in child.names:
                    bound = alias.asname or (alias.name.partition(".")[0] if whole else alias.name)
                    found.append(Import(
                        line=child.lineno,
                        module=alias.name if isinstance(child, ast.Import) else child.module or "",
                        name=None if whole else alias.name,
                        bound_as=bound,
                        relative=isinstance(child, ast.ImportFrom) and child.level > 0,
                        in_function=in_function,
                        typing_only=typing_only,
                    ))
            visit(child, inside, typed)

    visit(source.tree, False, False)
    return found


def bindings_of(source: Source) -> dict[str, str]:
    """What each imported name of a file stands for: {"sleep": "asyncio.sleep"}."""
    bound: dict[str, str] = {}
    for imported in imports_of(source):
        if imported.name is not None:
            bound[imported.bound_as] = f"{imported.module}.{imported.name}"
        else:
            whole = imported.bound_as != imported.module.partition(".")[0]
            bound[imported.bound_as] = imported.module if whole else imported.bound_as
    return bound


def dotted(node: ast.AST, bound: dict[str, str]) -> str | None:
    """The absolute name of an expression such as `events._x`, or None if it does not start at an import."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, bound)
        return None if start is None else f"{start}.{node.attr}"
    return None


# The rules


def check_layers(source: Source) -> Iterator[str]:
    if source.module == "homeloop":
        return                          # the façade may name everything
    own = source.module.split(".")[1]
    if own not in LEVEL_OF:
        yield at(source, 1, f"{own!r} is in no layer: find its place in LAYERS and in docs/design.md")
        return
    for imported in imports_of(source):
        target = imported.module.split(".")
        if target[0] != "homeloop":
            continue
        if len(target) == 1:
            yield at(source, imported.line, "imports from the façade: name the module that defines it")
            continue
        other = target[1]
        if other not in LEVEL_OF:
            yield at(source, imported.line, f"imports {other!r}, which is in no layer")
        elif other != own and LEVEL_OF[other] >= LEVEL_OF[own]:
            yield at(source, imported.line, f"{own} may not know {other}, which is not below it: "
                                            "hand in what is needed, or move the code down")


def check_imports(source: Source) -> Iterator[str]:
    for imported in imports_of(source):
        if imported.relative:
            yield at(source, imported.line, "relative import: write it out from homeloop")
            continue
        if imported.in_function:
            yield at(source, imported.line, f"import of {imported.module} inside a function: move it up; "
                                            "a cycle that this hides wants one of the two split")
        if imported.name == "*":
            yield at(source, imported.line, "import *: name what is used")
        package = imported.module.startswith("homeloop.") and f"{imported.module}.__init__" in source.known
        if package and f"{imported.module}.{imported.name}" not in source.known:
            yield at(source, imported.line, f"imports {imported.name} from the package {imported.module}: "
                                            "import from the module that defines it")


def check_pure(source: Source) -> Iterator[str]:
    if not is_pure(source):
        return
    for imported in imports_of(source):
        top = imported.module.partition(".")[0]
        ours = top == "homeloop" and imported.module != "homeloop.errors" and imported.module not in PURE
        if ours or top in NOT_PURE:
            yield at(source, imported.line, f"pure module imports {imported.module}: bytes in, events and "
                                            "bytes out; hand values in, let the caller do the I/O")


def is_pure(source: Source) -> bool:
    first_line = (ast.get_docstring(source.tree) or "").partition("\n")[0]
    return source.module in PURE or re.search(r"\bpure\b", first_line, re.IGNORECASE) is not None


def check_asyncio_private(source: Source) -> Iterator[str]:
    if source.module == MAY_TOUCH_ASYNCIO:
        return
    remedy = f"only {MAY_TOUCH_ASYNCIO} may: give it a method for what is needed"
    bound = bindings_of(source)
    for imported in imports_of(source):
        if imported.module.partition(".")[0] == "asyncio" and (imported.name or "").startswith("_"):
            yield at(source, imported.line, f"imports {imported.name}, private to asyncio: {remedy}")
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
            continue
        name = dotted(node, bound) or ""
        of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if name.startswith("asyncio.") or (node.attr in ASYNCIO_PRIVATE and not of_self):
            yield at(source, node.lineno, f"touches {name or node.attr}, private to asyncio: {remedy}")


def check_sizes(source: Source) -> Iterator[str]:
    if len(source.lines) > MODULE_LINES_MAX:
        yield at(source, 1, f"{len(source.lines)} lines, limit {MODULE_LINES_MAX}: split it by concept")
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES_MAX:
            yield at(source, node.lineno, f"{node.name}() has {length} lines, limit {FUNCTION_LINES_MAX}: "
                                          "keep conditions, move straight lines into functions with names")


def check_names(source: Source) -> Iterator[str]:
    for part in Path(source.path).with_suffix("").parts:
        if part.removeprefix("test_").strip("_") in BANNED_NAMES:
            yield at(source, 1, f"a file named {part!r}: name the concept, or leave it where it is used")


def check_sleeps(source: Source) -> Iterator[str]:
    bound = bindings_of(source)
    yields = {
        id(node.func)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == 0
    }
    for node in ast.walk(source.tree):
        name = dotted(node, bound)
        if name != "time.sleep" and (name != "asyncio.sleep" or id(node) in yields):
            continue
        around = source.lines[max(0, node.lineno - 2):node.lineno]
        if not any(ALLOW_SLEEP.search(line) for line in around):
            yield at(source, node.lineno, f"{name} in a test: wait for an event with a limit, force the "
                                          "order with a barrier; else `# tidy: allow sleep: reason`")


def check_docstring(source: Source) -> Iterator[str]:
    if not ast.get_docstring(source.tree):
        yield at(source, 1, "no docstring: say what the module owns before anything else")


def check_all(source: Source) -> Iterator[str]:
    """A public module lists its public names; what it lists it has."""
    last = source.module.rpartition(".")[2]
    defined = dict(top_level_names(source.tree))
    if (last.startswith("_") and not source.is_package) or not defined:
        return
    listed = list_in_all(source.tree)
    if listed is None:
        yield at(source, 1, "no __all__: list what others may import")
        return
    for name in sorted(listed - defined.keys()):
        yield at(source, 1, f"__all__ lists {name}, which is not defined here")
    for name, node in defined.items():
        own = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if own and not name.startswith("_") and name not in listed:
            yield at(source, node.lineno, f"{name} is public and not in __all__: list it, or start it with _")


def top_level_names(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a module binds at its top level, under `if` and `try` too."""
    pending = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name != "annotations":
                    yield alias.asname or alias.name.partition(".")[0], node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        yield name.id, node
        else:
            pending[:0] = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            if isinstance(node, ast.Try):
                pending[:0] = [stmt for handler in node.handlers for stmt in handler.body]


def list_in_all(tree: ast.Module) -> set[str] | None:
    """The names in __all__, or None if it is not assigned a plain list."""
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.List | ast.Tuple):
            continue
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return {str(e.value) for e in node.value.elts if isinstance(e, ast.Constant)}
    return None


def check_print(source: Source) -> Iterator[str]:
    if source.module.startswith("homeloop.cli"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield at(source, node.lineno, "print() outside cli: raise, return a value, or log at debug level")


Rule = Callable[[Source], Iterator[str]]
EVERYWHERE = ("src/homeloop", "tests", "bench", "examples")
RULES: dict[Rule, tuple[str, ...]] = {
    check_layers: ("src/homeloop",),
    check_imports: ("src/homeloop", "bench"),
    check_pure: ("src/homeloop",),
    check_asyncio_private: ("src/homeloop",),
    check_sizes: EVERYWHERE,
    check_names: EVERYWHERE,
    check_sleeps: ("tests",),
    check_docstring: EVERYWHERE,
    check_all: ("src/homeloop",),
    check_print: ("src/homeloop",),
}


# The tree


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "src" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path: Path, text: str, known: frozenset[str]) -> Source:
    tree = ast.parse(text, filename=str(path))
    lines = text.splitlines()
    return Source(path=path.as_posix(), module=module_of(path), lines=lines, tree=tree, known=known)


def known_modules() -> frozenset[str]:
    files = [path.relative_to(ROOT) for path in (ROOT / "src" / "homeloop").rglob("*.py")]
    packages = {f"{module_of(path)}.__init__" for path in files if path.name == "__init__.py"}
    return frozenset(packages | {module_of(path) for path in files})


def sources(folder: str) -> list[Source]:
    known = known_modules()
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not text and folder == "tests":
            continue                    # an __init__.py that only marks a folder
        found.append(parsed(path.relative_to(ROOT), text, known))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("check_"))
def test_tree(rule: Rule) -> None:
    findings = [finding for folder in RULES[rule] for source in sources(folder) for finding in rule(source)]
    assert not findings, "\n" + "\n".join(findings)


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, or nothing."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_cycles() -> None:
    known = known_modules()
    imports: dict[str, set[str]] = {}
    for source in sources("src/homeloop"):
        if source.is_package:
            continue                    # gathers names; check_imports keeps the others out of it
        real = [imported for imported in imports_of(source) if not imported.typing_only]
        names = {imported.module for imported in real} | {f"{i.module}.{i.name}" for i in real}
        imports[source.module] = names & known
    cycle = find_cycle(imports)
    assert not cycle, f"modules import each other: {' -> '.join(cycle)}. Split out what both need"


def test_the_tree_is_there() -> None:
    """An empty folder would pass every rule."""
    assert {"homeloop.errors", "homeloop.core.__init__"} <= known_modules()
    assert any(source.path == "tests/test_tidy.py" for source in sources("tests"))


# The rules, tested


def planted(where: str, text: str) -> Source:
    """A file that is not there; `where` is its module, or its path."""
    path = where if "/" in where else f"src/{where.replace('.', '/')}.py"
    known = frozenset({"homeloop.core.__init__", "homeloop.core.inbox", "homeloop.errors"})
    return parsed(Path(path), text, known)


CORE = "homeloop.core.x"
LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60
CAUGHT: list[tuple[Rule, str, str, str]] = [
    (check_layers, CORE, "import homeloop.sync.mutex", "core may not know sync"),
    (check_layers, "homeloop.bridges.x", "from homeloop.nbd import server", "bridges may not know nbd"),
    (check_layers, "homeloop.cli.main", "from homeloop import run", "façade"),
    (check_layers, CORE, "def f():\n    from homeloop.block.x import D", "core may not know block"),
    (check_layers, CORE, "if TYPE_CHECKING:\n    from homeloop.cli.x import main", "core may not know cli"),
    (check_layers, "homeloop.extras.x", "x = 1", "in no layer"),
    (check_layers, CORE, "from homeloop.extras import x", "in no layer"),
    (check_imports, CORE, "from . import inbox", "relative"),
    (check_imports, CORE, "from ..errors import PeerError", "relative"),
    (check_imports, CORE, "async def f():\n    import json", "inside a function"),
    (check_imports, CORE, "from json import *", "import *"),
    (check_imports, CORE, "from homeloop.core import Inbox", "the module that defines it"),
    (check_pure, "homeloop.nbd.protocol", "import socket", "imports socket"),
    (check_pure, "homeloop.nbd.uri", "from time import monotonic", "imports time"),
    (check_pure, "homeloop.nbd.uri", "from homeloop.core.inbox import I", "imports homeloop.core.inbox"),
    (check_pure, "homeloop.nbd.codec", '"""A pure codec."""\nimport os', "imports os"),
    (check_asyncio_private, CORE, "from asyncio import _enter_task", "imports _enter_task"),
    (check_asyncio_private, CORE, "from asyncio.events import _set_running_loop", "imports _set_r"),
    (check_asyncio_private, CORE, "import asyncio as a\na.events._x(None)", "touches asyncio.events._x"),
    (check_asyncio_private, CORE, "from asyncio import tasks\ntasks._leave()", "asyncio.tasks._leave"),
    (check_asyncio_private, CORE, "def f(loop):\n    return loop._ready", "touches _ready"),
    (check_sizes, CORE, LONG_FUNCTION, "f() has 61 lines, limit 60"),
    (check_sizes, CORE, "x = 1\n" * 601, "601 lines, limit 600"),
    (check_names, "src/homeloop/core/utils.py", "", "'utils'"),
    (check_names, "tests/test_helpers.py", "", "'test_helpers'"),
    (check_names, "src/homeloop/common/x.py", "", "'common'"),
    (check_sleeps, CORE, "import time\ntime.sleep(0)", "time.sleep in a test"),
    (check_sleeps, CORE, "from time import sleep as nap\nrun(nap, 1)", "time.sleep in a test"),
    (check_sleeps, CORE, "import asyncio\nasyncio.sleep(0.1)", "asyncio.sleep in a test"),
    (check_sleeps, CORE, "import asyncio\nasyncio.sleep(delay)", "asyncio.sleep in a test"),
    (check_sleeps, CORE, "import time\ntime.sleep(1)  # tidy: allow sleep:", "time.sleep in a test"),
    (check_docstring, CORE, "x = 1", "no docstring"),
    (check_all, CORE, "x = 1", "no __all__"),
    (check_all, CORE, "__all__ = ['gone']", "lists gone"),
    (check_all, CORE, "__all__ = ['x']\nx = 1\ndef f(): pass", "f is public"),
    (check_all, "src/homeloop/core/__init__.py", "from homeloop.core.inbox import Inbox", "no __all__"),
    (check_print, "homeloop.daemon.x", "print('x')", "print() outside cli"),
]
PASSED: list[tuple[Rule, str, str]] = [
    (check_layers, CORE, "from homeloop.errors import PeerError\nfrom homeloop.core.inbox import I"),
    (check_layers, "homeloop", "from homeloop.cli.main import main"),
    (check_layers, "homeloop.__main__", "from homeloop.cli.main import main"),
    (check_imports, CORE, "from homeloop.core import inbox\nfrom homeloop.errors import PeerError"),
    (check_pure, "homeloop.nbd.protocol", "import struct\nfrom homeloop.errors import PeerError"),
    (check_pure, "homeloop.nbd.server", "import socket"),
    (check_asyncio_private, CORE, "import asyncio\nasyncio.events.__name__\nself._ready"),
    (check_asyncio_private, MAY_TOUCH_ASYNCIO, "from asyncio import _enter_task"),
    (check_sizes, CORE, LONG_FUNCTION.replace("    x = 1\n", "", 1)),
    (check_names, "tests/core/test_database.py", ""),
    (check_sleeps, CORE, "import asyncio\nasyncio.sleep(0)\nself.sleep(1)"),
    (check_sleeps, CORE, "import time\n# tidy: allow sleep: the kernel's timer is tested\ntime.sleep(1)"),
    (check_docstring, CORE, '"""One door."""'),
    (check_all, "src/homeloop/sync/__init__.py", '"""Only a docstring."""'),
    (check_all, CORE, "__all__ = ['f']\nimport os\ndef f(): pass\ndef _g(): pass"),
    (check_print, "homeloop.cli.serve", "print('x')"),
]


@pytest.mark.parametrize(("rule", "where", "text", "says"), CAUGHT)
def test_rule_catches(rule: Rule, where: str, text: str, says: str) -> None:
    findings = list(rule(planted(where, text)))
    assert len(findings) == 1, findings
    assert says in findings[0]


@pytest.mark.parametrize(("rule", "where", "text"), PASSED)
def test_rule_lets_pass(rule: Rule, where: str, text: str) -> None:
    assert list(rule(planted(where, text))) == []


def test_every_rule_is_tested_both_ways() -> None:
    assert {rule for rule, *_ in CAUGHT} == RULES.keys() == {rule for rule, *_ in PASSED}


def test_find_cycle() -> None:
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
