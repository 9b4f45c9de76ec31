r"""One client in transmission, at home with its export.

    readable -> RequestReader -> every request of the batch -> Device -> replies -> one sendmsg()

A raw socket and the loop's readers and writers, no transport: pieces stay apart (see sending.py), and a socket can
be moved between loops. Requests that the device answers at once cost no task; for the others the coroutine that the
device returned is run, and the replies of all that end in one turn of the loop go out together.

Back-pressure is reading no more: while too much is in flight, or the client does not take its replies, its requests
stay in the socket. One turn is bounded too, so that a connection which never pauses leaves room for others.

    NEW -> OPEN -> DRAINING (no new requests: DISC, end of stream, shutdown()) -> ENDING -> CLOSED
                \-> ENDING (socket closed, requests still run: abort(), reset, the peer's error)

A request that has begun is always run to its end; when nobody is there to take the answer, it is dropped.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import Any, Final, TypeAlias

from homeloop.block.device import Device
from homeloop.block.lending import LENT_BYTES_MIN
from homeloop.block.queueing import Queued
from homeloop.errors import BlockError, ConnectionDropped, ContextClosed, PeerError
from homeloop.nbd.answers import answers_for
from homeloop.nbd.budget import FREE_BYTES, Account, Budget
from homeloop.nbd.commands import Commands, failure_of, is_of_the_device
from homeloop.nbd.counting import ConnectionStatistics
from homeloop.nbd.handshake import Agreed
from homeloop.nbd.life import NEXT as _NEXT
from homeloop.nbd.life import State as _State
from homeloop.nbd.limits import ConnectionLimits
from homeloop.nbd.protocol import (
    CHUNK_DONE,
    DATA_CHUNK,
    PAYLOAD_BYTES_DEFAULT_MAX,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    CommandFlag,
    wire_errno,
)
from homeloop.nbd.sending import SendQueue
from homeloop.nbd.tls import TlsSocket, Watcher, Wire, watcher_of
from homeloop.nbd.transmission import Request, RequestReader

__all__ = ["Connection", "Spawn"]

Spawn: TypeAlias = Callable[[Coroutine[Any, Any, None]], object]
# command, command flags, cookie, offset, length: a request as its reply needs it
_Asked: TypeAlias = tuple[int, int, int, int, int]

_READ: Final = Command.READ.value
_DISC: Final = Command.DISC.value
_WRITE: Final = Command.WRITE.value
_BLOCK_STATUS: Final = Command.BLOCK_STATUS.value
_FAST_ZERO: Final = CommandFlag.FAST_ZERO.value
_DATA: Final = ChunkType.OFFSET_DATA.value
_pack_simple: Final = SIMPLE_REPLY.pack
_pack_data: Final = DATA_CHUNK.pack
# Gathered replies go out at the latest when they are this many bytes; limits are looked at as often. The client
# works on the first replies while we make the next: with 256 KiB, 64 reads of 4 KiB in flight are served at 90,000
# a second, with 64 KiB at 154,000, with 16 KiB at 76,000 (fio on a unix socket, two cores).
_FLUSH_BYTES: Final = 64 << 10


class Connection:
    """One client of one export. Made anywhere; everything else on the home thread of the export.

    on_closed(connection, error) is called once, at home, when the socket is closed and no request runs any more.
    `error` is None for an end in order (also a client that just went away), a PeerError for one that broke the
    protocol, and any other exception for our own mistake.
    """

    def __init__(
        self,
        sock: Wire,
        device: Device,
        *,
        peer: str,
        spawn: Spawn,
        on_closed: Callable[[Connection, BaseException | None], None],
        read_only: bool = False,
        on_error: Callable[[int, BlockError], object] | None = None,
        agreed: Agreed | None = None,
        limits: ConnectionLimits | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.peer = peer
        self._sock = sock  # non-blocking; ours from now on
        self._tls = sock.version() if isinstance(sock, TlsSocket) else None
        self._device = device
        self._spawn = spawn
        self._on_closed, self._on_error = on_closed, on_error
        self._limits = limits if limits is not None else ConnectionLimits()
        self._payload_bytes_max = min(device.block_size.maximum, self._limits.payload_bytes_max)
        self._lending, largest = device.lending, self._payload_bytes_max
        self._read_bytes_max = largest if self._lending is None else min(largest, LENT_BYTES_MIN - 1)
        self._agreed = agreed = agreed if agreed is not None else Agreed()
        self._answers = answers_for(agreed)
        self._commands = Commands(
            device, agreed, read_only=read_only, payload_bytes_max=self._payload_bytes_max
        )

        # Home thread only, all of them.
        self._loop: asyncio.AbstractEventLoop | None = None  # from start() on
        self._watcher: Watcher | None = None  # likewise
        self._state = _State.NEW
        self._error: BaseException | None = None  # what on_closed() will be told
        # Z9: up to 32 MiB a payload is taken even if we would answer it with EINVAL.
        self._reader = RequestReader(
            payload_bytes_max=max(self._payload_bytes_max, PAYLOAD_BYTES_DEFAULT_MAX), extended=agreed.extended
        )
        self._batch: list[Request] = []  # parsed; begins at _batch_next
        self._batch_next = 0
        self._out = SendQueue()
        self._running: dict[int, object] = {}  # number -> what spawn() returned: held, or a task may vanish
        self._started = 0  # requests that waited
        self._in_flight_bytes = 0  # payload of those that run
        self._account = Account(budget if budget is not None else Budget(sys.maxsize))
        self._writes_wait = False  # the last WRITE was not answered inline: the next gets its own copy
        self._reading = False  # the loop watches for readable
        self._writing = False  # ... for writable
        self._turn_queued = False
        self._flush_queued = False
        self._linger: asyncio.TimerHandle | None = None
        self._requests = self._errors = self._received_bytes = 0
        self._paused = 0

    def __repr__(self) -> str:
        return (
            f"<Connection {self.peer} {self._state.value} in_flight={len(self._running)} "
            f"unsent_bytes={self._out.unsent_bytes}>"
        )

    def start(self, leftover: bytes = b"") -> None:
        """Begin to serve; `leftover` is what the client sent behind the handshake. Home thread, once."""
        if self._state is not _State.NEW:  # shutdown() or abort() came first
            return
        self._loop = asyncio.get_running_loop()
        self._watcher = watcher_of(self._loop, self._sock)
        self._enter(_State.OPEN)
        if not leftover:
            self._read_more()
            return
        # It came in one receive of the handshake, which is smaller than the buffer.
        target = self._reader.targets()[0]
        assert len(leftover) <= len(target), (len(leftover), len(target))
        target[: len(leftover)] = leftover
        self._reader.received(len(leftover))
        self._queue_turn()

    def shutdown(self) -> None:
        """Take no new request; finish those in flight, send their replies, then close. Home thread."""
        if self._state is _State.NEW:
            self._close_socket()
        elif self._state is _State.OPEN:
            self._drain()

    def abort(self) -> None:
        """Close the socket now; what is in flight still runs to its end. Home thread."""
        self._close_socket()

    def expel(self, reason: str, seen: ConnectionStatistics) -> None:
        """Close the socket for that reason, unless anything has happened since `seen`. Home thread."""
        if self.statistics() == seen:
            self._close_socket(PeerError(reason))

    def abandon(self) -> None:
        """Close the socket after the end of the home: nothing else will, and nothing of ours runs. Any thread."""
        self._sock.close()
        self._account.is_over(0)

    def statistics(self) -> ConnectionStatistics:
        """Return the counts. Any thread; elsewhere than at home each value is right, but of its own moment."""
        return ConnectionStatistics(
            peer=self.peer,
            tls=self._tls,
            replies=self._answers.form,
            requests=self._requests,
            errors=self._errors,
            received_bytes=self._received_bytes,
            sent_bytes=self._out.sent_bytes,
            in_flight=len(self._running),
            unsent_bytes=self._out.unsent_bytes,
            buffered_bytes=self._reader.buffered_bytes,
            paused=self._paused,
        )

    # -- in ------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        # Twice: the client often sends its next requests while we answer, and going round the loop for them
        # costs more than looking once in vain (depth 16: 3.9 us of CPU a request against 6.8; a third look has
        # no use).
        for _ in range(2):
            if self._turn_queued or not self._reading or not self._receive():
                return  # queued: what is here comes first, and occupies the buffer
            self._turn()

    def _receive(self) -> bool:
        reader = self._reader
        try:
            count = self._sock.recvmsg_into(reader.targets())[0]
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self._close_socket()  # reset: nobody is left to answer
            return False
        except PeerError as error:  # of TLS
            self._close_socket(error)
            return False
        if not count:
            # Closed, or only its sending half: what it still takes it gets. In the middle of a request or not,
            # a client that dies is no event.
            self._drain()
            return False
        self._received_bytes += count
        reader.received(count)
        return True

    def _queue_turn(self) -> None:
        if not self._turn_queued:
            self._turn_queued = True
            self._home().call_soon(self._queued_turn)

    def _queued_turn(self) -> None:
        self._turn_queued = False
        if self._state is _State.OPEN:
            self._turn()

    def _turn(self) -> None:
        """Serve what has been received, within the limits, and send the replies."""
        queued, self._flush_queued = self._flush_queued, True  # what ends in here goes out with the rest
        try:
            if self._batch_next == len(self._batch):
                self._batch = self._reader.next_batch(self._limits.turn_requests_max)
                self._batch_next = 0
            self._serve_batch()
        except PeerError as error:
            self._flush()  # the replies to what was right
            self._close_socket(error)
        except ContextClosed:
            self._close_socket()  # the home is ending: no request can be run here any more
        except Exception as error:  # ours: this connection pays for it, no other
            self._close_socket(error)
        else:
            self._device.push()
            self._flush()
            self._go_on()
        finally:
            self._flush_queued = queued

    def _go_on(self) -> None:
        """Decide how the next turn comes about."""
        if self._state is not _State.OPEN:
            self._maybe_end()
        elif self._is_full():
            self._paused += self._reading
            self._read_no_more()  # _less() goes on
        elif self._batch_next < len(self._batch) or self._reader.has_more:
            self._queue_turn()
        else:
            self._read_more()

    def _is_full(self) -> bool:
        limits, out = self._limits, self._out
        return (
            len(self._running) >= limits.requests_max
            or self._in_flight_bytes >= limits.in_flight_bytes_max
            or out.unsent_bytes >= limits.unsent_bytes_max
            or len(out.pieces) >= limits.unsent_pieces_max
            or (self._in_flight_bytes + out.unsent_bytes > FREE_BYTES and self._is_over_budget())
        )

    def _is_over_budget(self) -> bool:
        """Tell the account. Who has told of more than what is free comes by here again: see _less()."""
        return self._account.is_over(self._in_flight_bytes + self._out.unsent_bytes)

    def _is_low(self) -> bool:
        """Half of every limit: else each completion would let one request in, at the price of a turn."""
        limits, out = self._limits, self._out
        return (
            len(self._running) <= limits.requests_max // 2
            and self._in_flight_bytes <= limits.in_flight_bytes_max // 2
            and out.unsent_bytes <= limits.unsent_bytes_max // 2
            and len(out.pieces) <= limits.unsent_pieces_max // 2
            and not (self._account.told_bytes and self._is_over_budget())
        )

    def _less(self) -> None:
        """After something has become less: say so, and read again if back-pressure had stopped us."""
        if self._account.told_bytes:
            self._is_over_budget()
        if self._state is _State.OPEN and not self._reading and not self._turn_queued and self._is_low():
            self._queue_turn()

    # -- requests ------------------------------------------------------------------------------------------

    def _serve_batch(self) -> None:
        """Ask the device for each request, until a limit is reached. READ without flags is the hot path."""
        batch, index = self._batch, self._batch_next
        begin = index
        out, append, read = self._out, self._out.pieces.append, self._device.read
        read_bytes_max, agreed, content = self._read_bytes_max, self._agreed, self._answers.content
        simple, structured = not agreed.structured, agreed.structured and not agreed.extended
        on_queued = self._on_queued
        turn_bytes = size = 0
        while index < len(batch):
            command, flags, cookie, offset, length, payload = batch[index]
            index += 1
            if command == _READ and not flags and length <= read_bytes_max:
                try:
                    answer = read(offset, length, on_queued)
                except BaseException as error:
                    out.unsent_bytes += size
                    turn_bytes += size
                    size = 0
                    self._refuse((_READ, 0, cookie, offset, length), failure_of(error))
                    if self._state is _State.OPEN:
                        continue
                    break
                kind = type(answer)
                if kind is CoroutineType:
                    self._start(answer, (_READ, 0, cookie, offset, length), length)
                elif kind is Queued:
                    self._wait_for(answer, (_READ, 0, cookie, offset, length), length)
                else:
                    # As pack_simple_reply() and pack_data_header() do, less 0.1 us for the call.
                    if simple:
                        head = _pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie)
                    elif structured and length and kind is not memoryview:
                        head = _pack_data(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _DATA, cookie, length + 8, offset)
                    else:
                        head, answer = content(0, cookie, offset, length, answer)
                    append(head)
                    append(answer)  # type: ignore[arg-type]
                    size += len(head) + len(answer)  # type: ignore[arg-type]
                    if size < _FLUSH_BYTES:
                        continue
                out.unsent_bytes += size
                turn_bytes += size
                size = 0
            else:
                out.unsent_bytes += size
                turn_bytes += size + length if payload is not None or command == _READ else size
                size = 0
                self._serve_other(command, flags, cookie, offset, length, payload)
            if out.unsent_bytes >= _FLUSH_BYTES:
                self._flush()
            if self._state is not _State.OPEN or turn_bytes >= self._limits.turn_bytes_max or self._is_full():
                break
        out.unsent_bytes += size
        self._requests += index - begin
        if self._state is _State.OPEN:  # else the rest of the batch was dropped already
            self._batch_next = index

    def _serve_other(
        self, command: int, flags: int, cookie: int, offset: int, length: int, payload: memoryview | None
    ) -> None:
        if command == _DISC:
            self._stop_requests()  # F2: nothing follows it
            return
        if command == _READ and not flags and length <= self._payload_bytes_max and self._lending is not None:
            pieces = self._lending.read(offset, length)
            if pieces is not None:
                self._out.extend((self._answers.content(0, cookie, offset, length, b"")[0], *pieces))
                return
        asked = command, flags, cookie, offset, length
        data = payload
        if payload is not None and self._writes_wait and self._reader.owns(payload):
            data = memoryview(bytes(payload))
        try:
            answer = self._commands.ask(command, flags, offset, length, data, self._on_queued)
        except BaseException as error:
            self._refuse(asked, failure_of(error))
            return
        kind = type(answer)
        waits = kind is CoroutineType or kind is Queued
        if payload is not None:
            self._settle_payload(payload, waits and command == _WRITE)
        if not waits:
            self._answer(asked, answer)
            return
        begin = self._wait_for if kind is Queued else self._start
        begin(answer, asked, length if payload is not None or command == _READ else 0)

    def _answer(self, asked: _Asked, result: Any) -> None:
        """Queue the reply to a request that succeeded. The hot path of READ has its own."""
        command, flags, cookie, offset, length = asked
        append = self._out.append
        if command == _READ:
            self._out.extend(self._answers.content(flags, cookie, offset, length, result))
        elif command == _BLOCK_STATUS and result is not None:  # None: of no context
            assert self._agreed.allocation_id is not None, "asked for a context that was not selected"
            append(self._answers.extents(cookie, offset, self._agreed.allocation_id, result))
        else:
            append(self._answers.done(cookie, offset))

    def _refuse(self, asked: _Asked, error: BlockError) -> None:
        """Queue the reply to a request that failed; or there is none, and no other from here on."""
        if isinstance(error, ConnectionDropped):
            self._flush()  # the replies to what came before
            self._close_socket()
            return
        command, flags, cookie, offset, _length = asked
        self._errors += 1
        if self._on_error is not None:
            self._on_error(command, error)
        number = wire_errno(error.errno, fast_zero=bool(flags & _FAST_ZERO))
        self._out.append(self._answers.refused(cookie, offset, number, error.text))

    def _settle_payload(self, payload: memoryview, waits: bool) -> None:
        """After a WRITE was handed to the device: whose is the memory of its payload now?"""
        if not waits:
            self._reader.give_back(payload)
        elif not self._writes_wait and self._reader.owns(payload):
            # The first write that waits after writes that did not: its data lies in the receive buffer. It
            # keeps that; we go on with a new one. Those to come get a copy of their own.
            self._reader.retire()
        self._writes_wait = waits

    def _start(self, answer: Any, asked: _Asked, payload_bytes: int) -> None:
        """Run a request that waits for something; its reply goes out when it is done."""
        self._started += 1
        number = self._started
        self._running[number] = None  # counted before spawn(), which may run the first step
        self._in_flight_bytes += payload_bytes
        try:
            task = self._spawn(self._finish(number, answer, asked, payload_bytes))
        except BaseException:
            answer.close()
            self._one_less(number, payload_bytes)
            raise
        if number in self._running:
            self._running[number] = task

    def _wait_for(self, queued: Any, asked: _Asked, payload_bytes: int) -> None:
        """A request is on its way to a worker: _on_queued() is called when it has ended."""
        self._started += 1
        self._running[self._started] = queued
        self._in_flight_bytes += payload_bytes
        queued.tag = self._started, asked, payload_bytes

    def _on_queued(self, queued: Queued) -> None:
        number, asked, payload_bytes = queued.tag
        self._one_less(number, payload_bytes)
        self._finished(asked, queued.answer, queued.error)

    async def _finish(self, number: int, answer: Any, asked: _Asked, payload_bytes: int) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = await answer
        except BaseException as error:
            if not is_of_the_device(error):
                if isinstance(error, asyncio.CancelledError):
                    # The home is ending. There will be no reply, and the client must not wait for one.
                    self._one_less(number, payload_bytes)
                    self._close_socket()
                raise
            failure = error
        self._one_less(number, payload_bytes)
        self._finished(asked, result, failure)

    def _finished(self, asked: _Asked, result: Any, failure: BaseException | None) -> None:
        """A request that waited has ended: queue its reply, if there is still somebody to take it."""
        if isinstance(failure, ContextClosed):
            self._close_socket()
            return
        if failure is not None:
            try:
                failure = failure_of(failure)
            except Exception as error:  # ours
                self._close_socket(error)
                return
        if self._state is not _State.OPEN and self._state is not _State.DRAINING:
            self._errors += failure is not None
        elif failure is not None:
            self._refuse(asked, failure)
        else:
            self._answer(asked, result)

    def _one_less(self, number: int, payload_bytes: int) -> None:
        del self._running[number]
        self._in_flight_bytes -= payload_bytes
        if not self._flush_queued:
            # Not now: what else ends in this turn of the loop goes out with it.
            self._flush_queued = True
            self._home().call_soon(self._after_completions)

    def _after_completions(self) -> None:
        self._flush_queued = False
        self._flush()
        self._less()
        self._maybe_end()

    # -- out -----------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send what is there; if the kernel does not take it all, go on when it does."""
        if self._writing or not self._out.pieces:
            return
        try:
            done = self._out.send(self._sock)
        except OSError:
            self._close_socket()  # the client went away
            return
        if not done:
            self._writing = True
            self._watch().add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        try:
            done = self._out.send(self._sock)
        except OSError:
            self._close_socket()
            return
        if done:
            self._write_no_more()
        self._less()
        self._maybe_end()

    # -- life ----------------------------------------------------------------------------------------------

    def _home(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "not started"
        return self._loop

    def _watch(self) -> Watcher:
        assert self._watcher is not None, "not started"
        return self._watcher

    def _enter(self, new: _State) -> None:
        assert new in _NEXT[self._state], f"{self._state.name} -> {new.name}"
        self._state = new

    def _read_more(self) -> None:
        if not self._reading:
            self._reading = True
            self._watch().add_reader(self._sock, self._on_readable)

    def _read_no_more(self) -> None:
        if self._reading:
            self._reading = False
            self._watch().remove_reader(self._sock)

    def _write_no_more(self) -> None:
        if self._writing:
            self._writing = False
            self._watch().remove_writer(self._sock)

    def _stop_requests(self) -> None:
        """No new requests; what has been received and not begun is forgotten."""
        self._enter(_State.DRAINING)
        self._read_no_more()
        self._batch = []
        self._batch_next = 0

    def _drain(self) -> None:
        self._stop_requests()
        self._flush()
        self._maybe_end()

    def _maybe_end(self) -> None:
        """Take the next step towards the end, if it is time for it."""
        if self._running:
            return
        if self._state is _State.DRAINING:
            if not self._out.pieces:
                self._close_socket()
            elif self._linger is None:
                self._linger = self._home().call_later(self._limits.linger_s, self._close_socket)
        elif self._state is _State.ENDING:
            self._enter(_State.CLOSED)
            self._account.is_over(0)
            self._on_closed(self, self._error)

    def _close_socket(self, error: BaseException | None = None) -> None:
        """Close the socket, whatever is in flight; CLOSED once nothing is. The first error counts."""
        if self._state is _State.ENDING or self._state is _State.CLOSED:
            return
        self._enter(_State.ENDING)
        self._error = error
        self._read_no_more()
        self._write_no_more()
        if self._linger is not None:
            self._linger.cancel()
        self._sock.close()
        self._out.clear()
        self._batch = []
        self._batch_next = 0
        self._maybe_end()
