"""Who waits for whom, right now: waits that would close a cycle are refused, with the whole cycle in the text.

Nodes are coroutines, asyncio tasks and sleeps (one blocking wait of one thread). An edge is written down by who
begins a wait, and only when it really is about to sleep: a call() that is driven to its end never comes here. All
other edges are read off what is there anyway when somebody looks: which thread runs a call, who holds a big lock,
what the home of a coroutine does.

    a sleeping thread, an awaiting coroutine      -> the coroutine, lock, call or end that it waits for
    a coroutine                                   -> what keeps its home from running it: the home's own sleep, or that
                                                     of who holds the big lock
    a coroutine in a synchronous wait             -> that wait, and those above it on the same stack
    a big lock, a Mutex                           -> what its holder waits for
    a call on a worker thread                     -> what the thread waits for; a queued one: all of the threads

Why whoever closes a cycle sees it: each writes his own edge first, then passes through `_fence`, then looks. Of those
who close a cycle together one passes last; the edges of all others were written before he did. Passing through a lock
is what orders the writes, with or without a GIL; the look itself takes no lock.

Why there is no false alarm: a cycle must be seen twice in a row, made of the very same waits. A wait has an object of
its own, which never comes back once it is over; so between the two looks all of them were there at once, each for
something that only the next could give. A wait with a timeout is not written down at all. Nor is what nobody can know
(an Event, a predicate, a future): there the way ends.

This module knows what to ask of contexts and locks, but calls nothing that waits, runs or locks.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from homeloop.core.current import thread
from homeloop.core.loop import current_task, may_be_cancelled_soon, running_loop
from homeloop.core.states import CoroutineState
from homeloop.errors import WouldDeadlock

if TYPE_CHECKING:
    from homeloop.core.biglock import BigLock
    from homeloop.core.context import AioContext
    from homeloop.core.coroutine import Coroutine

__all__ = [
    "AnyOf",
    "CoroutineEnd",
    "Hop",
    "Link",
    "LockTurn",
    "Sleep",
    "begin_await",
    "begin_join",
    "count_owner_wait",
    "cycles",
    "end_await",
    "forget_all",
    "needs_of_context",
    "needs_of_owner",
    "sleeps_of",
    "thread_name",
]

get_ident = threading.get_ident
_RUNNING = CoroutineState.RUNNING
TRIES = 100             # at a graph that moves while we look: each move is somebody's progress


class Hop(NamedTuple):
    """One thing that must go on first."""

    node: Any           # a Coroutine, an asyncio task, a Sleep
    why: str            # behind "waits for ...": {} is the node's name


class AnyOf(NamedTuple):
    """Several of which one suffices: it is in a cycle only if all of them are."""

    hops: tuple[Hop, ...]


class Link(Protocol):
    """What a wait is for. Its methods are asked from any thread, wait for nothing and lock nothing."""

    @property
    def passes_cancel(self) -> bool | None:
        """Cancelling the waiter: True, goes on to what is waited for; None, ends the wait; False, does not."""

    @property
    def refuses(self) -> bool:
        """Is the wait refused if it closes a cycle? Else only cycles() tells."""

    def pending(self) -> bool:
        """Is it still waited for? Once False it stays so."""

    def needs(self) -> Sequence[Hop | AnyOf]:
        """Who must go on before it is there."""

    def sought(self) -> str:
        """What it is, for people."""


class CoroutineEnd:
    """The end of a coroutine. cancelled: the waiter has asked it to end; perhaps it does not know yet."""

    __slots__ = ("cancelled", "co")

    passes_cancel = False               # a thread cannot be cancelled
    refuses = True

    def __init__(self, co: Coroutine[Any], *, cancelled: bool = False) -> None:
        self.co = co
        self.cancelled = cancelled

    def pending(self) -> bool:
        return not self.co.done()

    def needs(self) -> Sequence[Hop | AnyOf]:
        return (Hop(self.co, ""),)

    def sought(self) -> str:
        return repr(self.co)


class LockTurn:
    """A thread's turn at a big lock."""

    __slots__ = ("gate", "ident")

    passes_cancel = False
    refuses = True

    def __init__(self, gate: BigLock, ident: int) -> None:
        self.gate = gate
        self.ident = ident

    def pending(self) -> bool:
        return self.gate._holder not in (0, self.ident)

    def needs(self) -> Sequence[Hop | AnyOf]:
        return _needs_of_lock(self.gate, ", held by {}")

    def sought(self) -> str:
        return f"the big lock of {self.gate.context.name}"


class Sleep:
    """One blocking wait of one thread. Made by that thread; alive as long as its frame holds it."""

    __slots__ = ("__weakref__", "asleep", "below", "held", "ident", "link", "serves")

    def __init__(self, link: Link) -> None:
        self.link: Link | None = link           # None: it is over
        self.ident = get_ident()
        loop = running_loop()
        # The coroutine or task that waits, and those further down on the stack: they cannot go on either.
        self.below: tuple[Any, ...] = (None if loop is None else current_task(loop), *thread.below)
        self.held = _locks_held()               # big locks that stay with the thread, unless `serves` is their context
        self.serves: AioContext | None = None   # the context that is served meanwhile, or whose lock is given up
        self.asleep = True                      # no code runs on the thread meanwhile

    def begin(self, serves: AioContext | None = None, asleep: bool = True) -> None:
        """Write it down and look: WouldDeadlock if it closes a cycle. Undone by end(), whatever happens."""
        self.serves = serves
        self.asleep = asleep
        stack = thread.sleeps
        stack.append(weakref.ref(self))
        _stacks[self.ident] = stack
        with _fence:
            pass
        assert self.link is not None
        way = _cycle(self) if self.link.refuses else None
        if way is not None:
            raise WouldDeadlock(_text(way))

    def end(self) -> None:
        """It is over, or did not begin."""
        self.link = None
        stack = thread.sleeps
        while stack and ((top := stack[-1]()) is None or top.link is None):
            stack.pop()
        if not stack:
            _stacks.pop(self.ident, None)


_fence = threading.RLock()          # a leaf; orders writes and looks, see above; re-entrant for signal handlers
# Weak, so that a wait that was torn down by a Ctrl-C leaves nothing behind, and a loop that nobody closed is no leak.
_stacks: dict[int, list[weakref.ref[Sleep]]] = {}       # by thread ident: its sleeps, the innermost last
_awaits: dict[int, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}     # by id of a coroutine or task: it, its link
_owner_waits = 0                    # under _fence: waits for what a coroutine or task may own


def forget_all() -> None:
    """In a forked child: the parent's threads do not wait here."""
    global _fence, _owner_waits
    _fence = threading.RLock()
    _owner_waits = 0
    _stacks.clear()
    _awaits.clear()


def count_owner_wait(step: int) -> None:
    """A wait for what coroutines own begins (1) or ends (-1): before and behind begin_await() or Sleep."""
    global _owner_waits
    with _fence:
        _owner_waits += step


def begin_await(link: Link, fresh: bool = False) -> Any:
    """The running coroutine or task is about to await link: write it down and look. Returns it, for end_await().

    WouldDeadlock if it closes a cycle, and link refuses. fresh: link is known to need nobody now. None where no task
    runs: then nobody waits.
    """
    loop = running_loop()
    me: Any = None if loop is None else current_task(loop)
    if me is None:
        return None
    _awaits[id(me)] = weakref.ref(me), weakref.ref(link)
    with _fence:
        awaited = _owner_waits
    # Nobody waits for it, so that no way leads back. Who begins to right now passes the fence behind us and looks.
    if fresh or not link.refuses or not (awaited or getattr(me, "has_waiters", _never)()) or _goes_on(link):
        return me
    way = _cycle(me)
    if way is not None:
        end_await(me)
        raise WouldDeadlock(_text(way))
    return me


def end_await(me: Any) -> None:
    """It goes on."""
    _awaits.pop(id(me), None)


def begin_join(me: Coroutine[Any], link: Link, fresh: bool) -> None:
    """begin_await() of a Coroutine that is known: it holds its link itself, which is 1 us less than the dict.

    WouldDeadlock if it closes a cycle. The caller sets me.link back to None, whatever happens. cycles() needs no list
    of these waits: they are always refused, so that a cycle that is there has a wait of another kind in it.
    """
    me.link = link
    with _fence:
        awaited = _owner_waits
    if fresh or not (awaited or me.has_waiters()) or _goes_on(link):
        return
    way = _cycle(me)
    if way is not None:
        raise WouldDeadlock(_text(way))


def cycles() -> list[str]:
    """Each cycle that is there, described. Any thread, for people: waits for nothing, takes no lock."""
    found: dict[frozenset[int], str] = {}
    tasks = [task() for task, _link in list(_awaits.values())]
    sleeps = [sleep for ident in list(_stacks) for sleep in sleeps_of(ident)]
    for node in [*filter(None, tasks), *sleeps]:
        way = _cycle(node)
        if way is not None:
            members = frozenset(id(step.node) for step in way)
            found.setdefault(members, _text(way, "a cycle of waits, which will never end:"))
    return list(found.values())


def needs_of_context(context: AioContext) -> list[Hop | AnyOf]:
    """What keeps a context from running its code: its home, or who holds its big lock, sleeps without serving it."""
    if context.gate is not None:
        return _needs_of_lock(context.gate, "can run only when {} lets the big lock of " + context.name + " go")
    home = context.home
    sleeps = [] if home is None or home.home_ident is None else sleeps_of(home.home_ident)
    if sleeps and sleeps[-1].serves is not context:
        return [Hop(sleeps[-1], "can run only when its home, {}, goes on")]
    return []


def needs_of_owner(owner: Any, why: str) -> list[Hop | AnyOf]:
    """What keeps the owner of a lock (a coroutine, a task, a thread's ident) from releasing it."""
    if not isinstance(owner, int):
        return [Hop(owner, why)]
    # A thread that serves a loop may run the release right there; what it took before an older sleep, nobody knows.
    return [Hop(sleep, why) for sleep in sleeps_of(owner)[-1:] if sleep.asleep]


def sleeps_of(ident: int) -> list[Sleep]:
    """The sleeps of a thread, the innermost last."""
    stack = _stacks.get(ident)
    if not stack:
        return []
    found = [ref() for ref in list(stack)]
    return [sleep for sleep in found if sleep is not None and sleep.link is not None]


def thread_name(ident: int | None) -> str:
    """A thread, for people."""
    known = [t.name for t in threading.enumerate() if t.ident == ident]
    return f"thread {known[0] if known else ident!r}"


# -- inside ---------------------------------------------------------------------------------------------------


_Edge = tuple[Link | None, Hop | AnyOf]
_Graph = dict[int, tuple[Any, list[_Edge]]]     # by id: a node, and what it cannot go on without


class _Step(NamedTuple):
    """One line of a cycle: node waits for link (None: for its home), which needs the next step's node."""

    node: Any
    link: Link | None
    why: str


def _never() -> bool:
    return False


def _locks_held() -> tuple[BigLock, ...]:
    held = []
    gate = thread.held
    while gate is not None:
        held.append(gate)
        gate = gate._outer[0]
    mine = thread.context
    if mine is not None and mine.gate is not None and mine.gate.held():
        held.append(mine.gate)
    return tuple(held)


def _needs_of_lock(gate: BigLock, why: str) -> list[Hop | AnyOf]:
    """What keeps the holder of a big lock from letting it go. A sleep that serves the context gives it up."""
    needs: list[Hop | AnyOf] = []
    for sleep in reversed(sleeps_of(gate._holder)):
        if sleep.serves is gate.context:
            break
        if gate in sleep.held:
            needs.append(Hop(sleep, why))
    return needs


def _link_of(node: Any) -> Link | None:
    """What a node waits for, if that is known and not there yet."""
    if isinstance(node, Sleep):
        link = node.link
    else:
        link = getattr(node, "link", None)      # a Coroutine's
        if link is None:
            entry = _awaits.get(id(node))
            link = None if entry is None or entry[0]() is not node else entry[1]()
    return link if link is not None and link.pending() else None


def _edges(node: Any) -> Iterator[_Edge]:
    """What node cannot go on without."""
    link = _link_of(node)
    if link is not None:
        for need in link.needs():
            yield link, need
    if isinstance(node, Sleep) or node.done():
        return
    on_stacks = list(_stacks) if getattr(node, "state", _RUNNING) is _RUNNING else ()
    for ident in on_stacks:
        for sleep in sleeps_of(ident):
            if any(below is node for below in sleep.below):
                yield None, Hop(sleep, "stands on the stack of {}")
    context: AioContext | None = getattr(node.get_loop(), "context", None)
    if context is not None:
        for need in needs_of_context(context):
            yield None, need


def _cycle(start: Any) -> list[_Step] | None:
    """A cycle that start is in, if there is one that nobody will leave."""
    leaving: dict[int, Any] = {}
    for _ in range(TRIES):
        graph = _reached(start, leaving)
        # The second look. What both have seen was there at the moment between them.
        graph = None if graph is None else _in_both(graph, _reached(start, leaving))
        way = None if graph is None else _way_round(start, graph)
        if way is None:
            return None
        loose = _who_leaves(way)
        if loose is None:
            return way
        leaving[id(loose)] = loose
    return None


def _goes_on(link: Link) -> bool:
    """Can what is waited for go on as it is, so that no way leads anywhere? Nearly always: it was just spawned."""
    for need in link.needs():
        if isinstance(need, AnyOf) or isinstance(need.node, Sleep):
            return False
        for _edge in _edges(need.node):
            return False
    return True


def _reached(start: Any, leaving: dict[int, Any]) -> _Graph | None:
    """All that start cannot go on without; None if that does not lead back to it, as nearly always."""
    graph: _Graph = {}
    todo, back = [start], False
    while todo:
        node = todo.pop()
        if id(node) in graph:
            continue
        edges = [] if id(node) in leaving else list(_edges(node))
        graph[id(node)] = node, edges
        for _link, need in edges:
            for hop in _hops(need):
                back |= hop.node is start
                todo.append(hop.node)
    return graph if back else None


def _in_both(one: _Graph, two: _Graph | None) -> _Graph | None:
    """The edges that are in both, made of the same waits."""
    if two is None:
        return None
    both: _Graph = {}
    for key, (node, edges) in one.items():
        others = two[key][1] if key in two else []
        both[key] = node, [edge for edge in edges if any(_same(edge, other) for other in others)]
    return both


def _same(one: _Edge, two: _Edge) -> bool:
    hops, others = _hops(one[1]), _hops(two[1])
    return one[0] is two[0] and type(one[1]) is type(two[1]) and len(hops) == len(others) and all(
        hop.node is other.node for hop, other in zip(hops, others, strict=True)
    )


def _way_round(start: Any, graph: _Graph) -> list[_Step] | None:
    """The shortest way from start back to it, along nodes that can none of them go on."""
    stuck = set(graph)
    before = None
    while before != len(stuck):             # strike out who can go on, until nobody is left who can
        before = len(stuck)
        for key in reversed(graph):         # the ends of long chains first
            if not any(all(id(hop.node) in stuck for hop in _hops(need)) for _link, need in graph[key][1]):
                stuck.discard(key)
    if id(start) not in stuck:
        return None
    trails: deque[tuple[Any, Any]] = deque([(start, None)])
    seen: set[int] = set()
    while trails:
        node, trail = trails.popleft()
        for link, need in graph[id(node)][1]:
            for hop in _hops(need):
                onward = _Step(node, link, hop.why), trail
                if hop.node is start:
                    return _unwound(onward)
                if id(hop.node) in stuck and id(hop.node) not in seen:
                    seen.add(id(hop.node))
                    trails.append((hop.node, onward))
    return None


def _hops(need: Hop | AnyOf) -> tuple[Hop, ...]:
    return need.hops if isinstance(need, AnyOf) else (need,)


def _unwound(trail: Any) -> list[_Step]:
    way: list[_Step] = []
    while trail is not None:
        step, trail = trail
        way.append(step)
    way.reverse()
    return way


def _who_leaves(way: list[_Step]) -> Any:
    """The first of a cycle who will be out of it without the others, by a cancellation that is due or on its way."""
    asked = [step.link.co for step in way if isinstance(step.link, CoroutineEnd) and step.link.cancelled]
    for index, step in enumerate(way):
        if isinstance(step.node, Sleep) or step.link is None:
            continue
        # It travels along coroutines that await each other, up to a wait that it ends.
        for onward in (*way[index:], *way[:index]):
            if onward.link is None or onward.link.passes_cancel is False:
                break
            if onward.link.passes_cancel is None:
                if step.node in asked or may_be_cancelled_soon(step.node):
                    return step.node
                break
    return None


def _name_of(node: Any) -> str:
    if isinstance(node, Sleep):
        return thread_name(node.ident)
    context = getattr(node.get_loop(), "context", None)
    where = "" if context is None else f" of {context.name}"
    return f"coroutine {node.get_name()}{where}"


def _text(way: list[_Step], head: str = "this wait would close a cycle, in which nobody can go on:") -> str:
    """A cycle, each link on its own line."""
    lines = [head]
    for step, following in zip(way, [*way[1:], way[0]], strict=True):
        sought = "" if step.link is None else f"waits for {step.link.sought()}"
        lines.append(f"  {_name_of(step.node)} {sought}{step.why.format(_name_of(following.node))}")
    return "\n".join(lines)
