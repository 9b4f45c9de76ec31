"""Both codecs as state machines: whatever is said, in whatever order, three ears hear the same.

One is told each message whole, one byte by byte, one in random pieces. Events are what the codecs hand out, up to the
end or to the PeerError; nothing else may come out of them. STARTTLS and extended headers are among the moves.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from homeloop.errors import PeerError
from homeloop.nbd.chunks import ChunkReader
from homeloop.nbd.client_handshake import ClientHandshake, Entered
from homeloop.nbd.handshake import Handshake, Negotiated, TlsMode
from homeloop.nbd.transmission import ReplyReader, RequestReader
from tests.nbd import wire
from tests.nbd.test_handshake import DISK, LIMITS, OTHER
from tests.nbd.test_transmission import DIRECT, PAYLOAD_BYTES_MAX, RECEIVE_BYTES, receive

Cut = Callable[[bytes], Iterator[bytes]]
EXPORTS = {"disk": DISK, "other": OTHER, "secret": replace(DISK, name="secret", tls_only=True)}
NAMES = st.sampled_from(["", "disk", "other", "secret", "none"])
SMALL = st.integers(0, 40)
PAYLOADS = st.sampled_from([b"", b"x" * 7, b"y" * 700, b"z" * DIRECT])


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def single(data: bytes) -> Iterator[bytes]:
    for index in range(len(data)):
        yield data[index:index + 1]


class Pieces:
    """Cuts at random, the same way in each run of an example."""

    def __init__(self) -> None:
        self._dice = random.Random(1)

    def __call__(self, data: bytes) -> Iterator[bytes]:
        while data:
            size = self._dice.choice([1, 3, 17, 28, 1000])
            yield data[:size]
            data = data[size:]


class Ear:
    """One codec from the first byte on: handshake, then transmission; and what came out of it."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self.events: list[Any] = []
        self.said = b""
        self.over = False

    def hear(self, data: bytes) -> None:
        for piece in self._cut(data):
            if self.over:
                return
            try:
                self.take(piece)
            except PeerError as error:
                self.events.append(("peer error", str(error)))
                self.over = True

    def take(self, piece: bytes) -> None:
        raise NotImplementedError


class ServerEar(Ear):
    """The server's side."""

    def __init__(self, cut: Cut, mode: TlsMode) -> None:
        super().__init__(cut)
        self._handshake = Handshake(EXPORTS, limits=LIMITS, tls=mode)
        self.reader: RequestReader | None = None
        self.extended = False
        self.secure = False

    def take(self, piece: bytes) -> None:
        if self.reader is not None:
            self._requests(piece)
            return
        self._handshake.feed(piece)
        while (turn := self._handshake.next_turn()) is not None:
            self.said += turn.data
            self.secure |= turn.starttls
            if isinstance(turn.end, Negotiated):
                self.extended = turn.end.agreed.extended
                self.events.append((turn.end.export.name, turn.end.agreed))
                self.reader = RequestReader(
                    payload_bytes_max=PAYLOAD_BYTES_MAX, receive_bytes=RECEIVE_BYTES, extended=self.extended
                )
                self._requests(turn.end.leftover)
                return
            if turn.end is not None:
                self.events.append(turn.end)
                self.over = True
                return

    def _requests(self, data: bytes) -> None:
        assert self.reader is not None
        for _ in receive(self.reader, data):
            while batch := self.reader.next_batch(5):
                self.events += [(*fields, None if data is None else bytes(data)) for *fields, data in batch]


class ClientEar(Ear):
    """The client's side; in transmission these requests are in flight, cookie by cookie."""

    LENGTHS = (1000, 0, 0, 2 * DIRECT, 4)
    STATUS = 2
    OFFSET = 1 << 20

    def __init__(self, cut: Cut, tls: bool) -> None:
        super().__init__(cut)
        self._handshake = ClientHandshake("disk", tls=tls)
        self.reader: ChunkReader | ReplyReader | None = None
        self.info: Any = None

    def take(self, piece: bytes) -> None:
        if self.reader is not None:
            self._replies(piece)
            return
        self._handshake.feed(piece)
        while (turn := self._handshake.next_turn()) is not None:
            self.said += turn.data
            if isinstance(turn.end, Entered):
                self.info = info = turn.end.info
                self.events.append(info)
                self.reader = (
                    ChunkReader(info.allocation_id, RECEIVE_BYTES, extended=info.extended)
                    if info.structured else ReplyReader(RECEIVE_BYTES)
                )
                for cookie, length in enumerate(self.LENGTHS):
                    wants = cookie == self.STATUS and info.structured
                    self.reader.expect(cookie, length, offset=self.OFFSET, wants_extents=wants)
                self._replies(turn.end.leftover)
                return
            if turn.end is not None:
                self.events.append(turn.end)
                self.over = True
                return

    def _replies(self, data: bytes) -> None:
        assert self.reader is not None
        for _ in receive(self.reader, data):
            while batch := self.reader.next_batch():
                self.events += batch


class Machine(RuleBasedStateMachine):
    """What the two machines share: three ears."""

    ears: tuple[Any, ...]

    def hear(self, data: bytes) -> None:
        for ear in self.ears:
            ear.hear(data)

    @invariant()
    def all_hear_the_same(self) -> None:
        if hasattr(self, "ears"):
            first, *others = self.ears
            for other in others:
                assert other.events == first.events
                assert other.said == first.said
                assert other.over == first.over

    def shaking_hands(self) -> bool:
        return not self.ears[0].over and self.ears[0].reader is None

    def transmitting(self) -> bool:
        return not self.ears[0].over and self.ears[0].reader is not None

    @rule(data=st.binary(max_size=60), really=st.sampled_from([False] * 9 + [True]))
    def garbage(self, data: bytes, really: bool) -> None:
        """The last word: behind it nothing is framed any more, and where STARTTLS ends would depend on the cut."""
        if not really:
            return
        self.hear(data)
        for ear in self.ears:
            ear.over = True


class ServerMachine(Machine):
    """A client says things to our server."""

    @initialize(mode=st.sampled_from(TlsMode), flags=st.sampled_from([0, 1, 2, 3, 3, 3, 7]), entered=st.booleans(),
                options=st.sampled_from([(), (wire.STRUCTURED,), (wire.EXT,), (wire.STARTTLS, wire.EXT)]))
    def begin(self, mode: TlsMode, flags: int, entered: bool, options: tuple[int, ...]) -> None:
        """entered: go on in transmission, if the server has these options."""
        self.ears = tuple(ServerEar(cut, mode) for cut in (whole, single, Pieces()))
        self.hear(wire.client_flags(3 if entered else flags))
        if entered:
            for number in options:
                self.hear(wire.option(number))
            self.hear(wire.meta(wire.SET_META, "disk", ("base:allocation",)))
            self.hear(wire.info(wire.GO, "disk"))

    @precondition(Machine.shaking_hands)
    @rule(number=st.sampled_from([wire.LIST, wire.STRUCTURED, wire.EXT, wire.STARTTLS, wire.PEEK, 12, 0x7654321]),
          data=st.sampled_from([b"", b"", b"", b"x" * 9]))
    def option(self, number: int, data: bytes) -> None:
        self.hear(wire.option(number, data))

    @precondition(Machine.shaking_hands)
    @rule(number=st.sampled_from([wire.LIST_META, wire.SET_META]), name=NAMES,
          queries=st.lists(st.sampled_from(["base:allocation", "base:", "qemu:x", "x"]), max_size=3))
    def meta(self, number: int, name: str, queries: list[str]) -> None:
        self.hear(wire.meta(number, name, tuple(queries)))

    @precondition(Machine.shaking_hands)
    @rule(number=st.sampled_from([wire.INFO, wire.INFO, wire.GO]), name=NAMES,
          types=st.lists(st.integers(0, 4), max_size=3))
    def info(self, number: int, name: str, types: list[int]) -> None:
        self.hear(wire.info(number, name, tuple(types)))

    @precondition(Machine.shaking_hands)
    @rule(number=st.sampled_from([wire.EXPORT_NAME, wire.ABORT, wire.GO, wire.SET_META, 0xFFFFFFFF]),
          data=st.binary(max_size=30))
    def any_option(self, number: int, data: bytes) -> None:
        self.hear(wire.option(number, data))

    @precondition(Machine.transmitting)
    @rule(command=st.integers(0, 9), flags=st.sampled_from([0, 0, 1, 4, 8, 32, 0xFFFF]), cookie=SMALL,
          offset=st.sampled_from([0, 512, (1 << 64) - 1]), payload=PAYLOADS)
    def request(self, command: int, flags: int, cookie: int, offset: int, payload: bytes) -> None:
        if self.ears[0].extended:
            if not flags & wire.PAYLOAD_LEN:
                payload = b""
            data = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, len(payload)) + payload
        else:
            data = wire.request(command, cookie, offset, len(payload), flags)
            data += payload if command == wire.WRITE else b""
        self.hear(data)

    @precondition(Machine.transmitting)
    @rule(length=st.sampled_from([1, PAYLOAD_BYTES_MAX + 1, 0xFFFFFFFF]))
    def a_payload_that_does_not_come(self, length: int) -> None:
        make = wire.ext_request if self.ears[0].extended else wire.request
        self.hear(make(wire.WRITE, 1, 0, length, wire.PAYLOAD_LEN))
        for ear in self.ears:
            ear.over = True


class ClientMachine(Machine):
    """A server says things to our client."""

    @initialize(tls=st.booleans(), flags=st.sampled_from([3, 3, 1, 0, 0xFFFF]),
                entered=st.sampled_from([None, (), (wire.STRUCTURED,), (wire.EXT,)]))
    def begin(self, tls: bool, flags: int, entered: tuple[int, ...] | None) -> None:
        """entered: go on in transmission, with these headers; None: shake hands."""
        self.ears = tuple(ClientEar(cut, tls) for cut in (whole, single, Pieces()))
        self.hear(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3 if entered is not None else flags))
        if entered is not None:
            self.enter(entered)

    def reply(self, kind: int, data: bytes = b"", number: int | None = None) -> None:
        """To the option that the client has asked last, unless it is said to another one."""
        if number is None:
            position = self.ears[0].said.rfind(b"IHAVEOPT")
            if position < 0:
                return
            (number,) = struct.unpack_from(">I", self.ears[0].said, position + 8)
        self.hear(struct.pack(">QIII", 0x0003E889045565A9, number, kind, len(data)) + data)

    @precondition(Machine.shaking_hands)
    @rule()
    def acknowledge(self) -> None:
        self.reply(wire.ACK)

    @precondition(Machine.shaking_hands)
    @rule(kind=st.sampled_from([wire.UNSUP, wire.POLICY, wire.SHUTDOWN, wire.UNKNOWN, (1 << 31) + 4711]))
    def refuse(self, kind: int) -> None:
        self.reply(kind, b"text")

    @precondition(Machine.shaking_hands)
    @rule(size=st.sampled_from([0, 4096, (1 << 64) - 1]), flags=st.sampled_from([1, 0xFFFF]))
    def told(self, size: int, flags: int) -> None:
        self.reply(wire.INFO_REPLY, struct.pack(">HQH", 0, size, flags))

    @precondition(Machine.shaking_hands)
    @rule(number=st.sampled_from([0, 1, 0xFFFFFFFF]), name=st.sampled_from([b"base:allocation", b"x:y", b"\xff"]))
    def context(self, number: int, name: bytes) -> None:
        self.reply(wire.META_REPLY, struct.pack(">I", number) + name)

    @precondition(Machine.shaking_hands)
    @rule(kind=st.sampled_from([wire.ACK, wire.SERVER, wire.INFO_REPLY, wire.META_REPLY, 99]),
          number=st.sampled_from([None, None, wire.GO, wire.LIST]), data=st.binary(max_size=20))
    def any_reply(self, kind: int, number: int | None, data: bytes) -> None:
        self.reply(kind, data, number)

    def enter(self, headers: tuple[int, ...]) -> None:
        """Say what a good server says that has these."""
        while self.shaking_hands():
            position = self.ears[0].said.rfind(b"IHAVEOPT")
            (asked,) = struct.unpack_from(">I", self.ears[0].said, position + 8)
            if asked == wire.GO:
                self.told(SIZE, 0x1FED)
            if asked == wire.SET_META:
                self.context(7, b"base:allocation")
            refused = asked in (wire.EXT, wire.STRUCTURED) and asked not in headers
            self.reply(wire.UNSUP if refused else wire.ACK)

    @precondition(Machine.transmitting)
    @rule(cookie=st.integers(0, 5), error=st.sampled_from([0, 0, 5, 4711]), extended=st.booleans(),
          flags=st.sampled_from([1, 1, 0, 0x8001]))
    def answer(self, cookie: int, error: int, extended: bool, flags: int) -> None:
        """One that is right for its request, as the headers have it."""
        info = self.ears[0].info
        length = ClientEar.LENGTHS[cookie] if cookie < len(ClientEar.LENGTHS) else 0
        offset = ClientEar.OFFSET
        if not info.structured:
            self.hear(wire.simple_reply(cookie, error, b"" if error else b"s" * length))
        elif error:
            text = struct.pack(">IH", error, 4) + b"text"
            make = wire.ext_chunk(cookie, 32769, offset, text, flags) if info.extended else wire.chunk(
                cookie, 32769, text, flags
            )
            self.hear(make)
        elif cookie == ClientEar.STATUS:
            number = info.allocation_id or 0
            self.hear(
                wire.ext_extents(cookie, offset, number, (1 << 40, 3)) if info.extended
                else wire.chunk(cookie, 5, struct.pack(">III", number, 512, 3), flags)
            )
        elif length:
            self.hear(
                wire.ext_data(cookie, offset, b"e" * length, flags=flags) if info.extended
                else wire.data_chunk(cookie, offset, b"d" * length, flags)
            )
        else:
            self.hear(wire.ext_chunk(cookie, 0, offset) if info.extended else wire.chunk(cookie, 0))

    @precondition(Machine.transmitting)
    @rule(cookie=st.integers(0, 5), begin=st.sampled_from([0, 300, 999, DIRECT]),
          length=st.sampled_from([1, 300, DIRECT]), hole=st.booleans(), extended=st.booleans())
    def part(self, cookie: int, begin: int, length: int, hole: bool, extended: bool) -> None:
        """Some of the data, maybe where none belong, maybe with the wrong headers."""
        offset = ClientEar.OFFSET
        if hole:
            payload = struct.pack(">QI", offset + begin, length)
            data = wire.ext_chunk(cookie, 2, offset, payload, 0) if extended else wire.chunk(cookie, 2, payload, 0)
        elif extended:
            data = wire.ext_data(cookie, offset, b"p" * length, begin, 0)
        else:
            data = wire.data_chunk(cookie, offset + begin, b"p" * length, 0)
        self.hear(data)


SIZE = 1 << 30
FEW = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestServer = ServerMachine.TestCase
TestServer.settings = FEW
TestClient = ClientMachine.TestCase
TestClient.settings = FEW
