"""Extended headers, rule by rule (X-1 to X-10 of the checklist), from the server's and from the client's side.

The bytes are written by hand: few clients ask for extended headers yet. What both of ours make of each other, and
lengths that need more than 32 bits, come last.
"""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeloop.block.memory import Memory
from homeloop.core.runtime import run
from homeloop.errors import BlockError, PeerError
from homeloop.nbd.chunks import ChunkReader
from homeloop.nbd.client import connect
from homeloop.nbd.client_handshake import ClientHandshake, Entered
from homeloop.nbd.handshake import Agreed, Ended, Negotiated
from homeloop.nbd.protocol import TransmissionFlag
from homeloop.nbd.serving import serve
from homeloop.nbd.transmission import Reply, RequestReader
from tests.nbd import wire
from tests.nbd.talking import Gated, RawClient, soon, talk
from tests.nbd.test_client import fake_server
from tests.nbd.test_client_handshake import reply
from tests.nbd.test_handshake import DISK, Talk, flags_told
from tests.nbd.test_transmission import DIRECT, PAYLOAD_BYTES_MAX, RECEIVE_BYTES, Seen, receive

SIZE = 1 << 20
CONTEXT = 1
AGREED = Agreed(structured=True, extended=True)
SELECTED = Agreed(structured=True, extended=True, allocation_id=CONTEXT)
FILTER = 0x1000


async def answers(client: RawClient, count: int) -> list[bytes]:
    """The next replies, whole; each must be a chunk with an extended header (X-2)."""
    found = []
    for _ in range(count):
        header = await client.receive(32)
        magic, *_, length = struct.unpack(">IHHQQQ", header)
        assert magic == 0x6E8A278C, hex(magic)
        found.append(header + await client.receive(length))
    return found


# The handshake


def test_x_1_agreed_and_no_way_back_to_export_name() -> None:
    handshake = Talk()
    assert handshake.say_kinds(wire.option(wire.EXT, b"x")) == [wire.INVALID]
    assert handshake.say_kinds(wire.option(wire.EXT)) == [wire.ACK]
    handshake.say(wire.info(wire.GO, "disk"))
    assert handshake.end == Negotiated(export=DISK, leftover=b"", agreed=AGREED)
    handshake = Talk()
    handshake.say(wire.option(wire.EXT))
    assert handshake.say_kinds(wire.option(wire.EXPORT_NAME, b"disk")) == []
    assert isinstance(handshake.end, Ended)
    assert "EXPORT_NAME after extended headers" in handshake.end.reason


@pytest.mark.parametrize("first", [b"", wire.option(wire.STRUCTURED)])
def test_x_10_structured_replies_come_too_late(first: bytes) -> None:
    """Before, they are agreed in vain."""
    handshake = Talk()
    handshake.say(first, wire.option(wire.EXT))
    assert handshake.say_kinds(wire.option(wire.STRUCTURED)) == [wire.EXT_REQD]
    handshake.say(wire.info(wire.GO, "disk"))
    assert handshake.end == Negotiated(export=DISK, leftover=b"", agreed=AGREED)


def test_x_9_the_filter_is_offered_with_a_context_only() -> None:
    for extended, selected, told in [(True, True, True), (True, False, False), (False, True, False)]:
        handshake = Talk()
        handshake.say(wire.option(wire.EXT if extended else wire.STRUCTURED))
        handshake.say(wire.meta(wire.SET_META, "disk" if selected else "other", ("base:allocation",)))
        for number in (wire.INFO, wire.GO):
            flags = flags_told(handshake.say(wire.info(number, "disk")))
            assert flags == [0x45 | 0x80 | (FILTER if told else 0)]


def client_turns(*says: bytes) -> tuple[bytes, Any]:
    handshake = ClientHandshake("disk")
    said, end = b"", None
    handshake.feed(b"".join((b"NBDMAGICIHAVEOPT\0\3", *says)))
    while (turn := handshake.next_turn()) is not None:
        said, end = said + turn.data, turn.end
    return said, end


def test_x_1_the_client_asks_first_and_then_only_for_go() -> None:
    granted = reply(wire.ACK, number=wire.EXT)
    none = reply(wire.ACK, number=wire.SET_META)
    said, _ = client_turns(granted)
    assert said[:20] == wire.client_flags() + wire.option(wire.EXT)
    assert said[20:] == wire.meta(wire.SET_META, "disk", ("base:allocation",))
    told = reply(wire.INFO_REPLY, struct.pack(">HQH", 0, 4096, 1)) + reply(wire.ACK)
    said, end = client_turns(granted, none, told)
    assert isinstance(end, Entered)
    assert end.info.structured
    assert end.info.extended
    said, end = client_turns(granted, none, reply(wire.UNSUP))
    assert said.endswith(wire.option(wire.ABORT))


@pytest.mark.parametrize("refusal", [wire.UNSUP, wire.POLICY, wire.INVALID])
def test_x_10_the_client_falls_back(refusal: int) -> None:
    said, _ = client_turns(reply(refusal, number=wire.EXT))
    assert said.endswith(wire.option(wire.STRUCTURED))


# Requests


def requests(chunks: Iterable[bytes]) -> tuple[list[Seen], str | None]:
    reader = RequestReader(payload_bytes_max=PAYLOAD_BYTES_MAX, receive_bytes=RECEIVE_BYTES, extended=True)
    seen: list[Seen] = []
    try:
        for piece in chunks:
            for _ in receive(reader, piece):
                while batch := reader.next_batch(7):
                    seen += [(*fields, None if data is None else bytes(data)) for *fields, data in batch]
    except PeerError as error:
        return seen, str(error)
    return seen, None


def test_x_2_requests_have_32_bytes() -> None:
    huge = 1 << 63
    data = wire.ext_request(wire.TRIM, 1, 5, huge) + wire.ext_request(wire.WRITE, 2, 6, payload=b"abc", flags=1)
    assert requests([data]) == ([(4, 0, 1, 5, huge, None), (1, 33, 2, 6, 3, b"abc")], None)
    _, error = requests([wire.request(wire.READ, 1, 0, 512) + bytes(4)])
    assert error is not None
    assert "magic is 0x25609513" in error


def test_x_3_a_write_says_that_its_payload_follows() -> None:
    """Without the flag nobody can know where the next request begins."""
    data = wire.ext_request(wire.READ, 1, 0, 8) + wire.ext_request(wire.WRITE, 2, 0, 512) + bytes(512)
    seen, error = requests([data])
    assert seen == [(0, 0, 1, 0, 8, None)]
    assert error is not None
    assert "WRITE of 512 bytes with flags 0x0: without PAYLOAD_LEN" in error


def test_x_5_payload_above_the_maximum() -> None:
    for command in (wire.WRITE, wire.FLUSH, wire.BLOCK_STATUS):
        head = wire.ext_request(command, 1, 0, PAYLOAD_BYTES_MAX + 1, wire.PAYLOAD_LEN)
        _, error = requests([head])
        assert error is not None
        assert f"{PAYLOAD_BYTES_MAX + 1} bytes" in error


PAYLOADS = st.sampled_from([b"", b"x", b"y" * 700, b"z" * (DIRECT - 1), b"d" * DIRECT, b"D" * (DIRECT + 77)])


@given(st.lists(st.tuples(st.integers(0, 8), PAYLOADS), max_size=6), st.randoms(use_true_random=False))
def test_x_4_any_cut_gives_the_same(asked: list[tuple[int, bytes]], dice: random.Random) -> None:
    """Whatever command has a payload, it is read away as one."""
    data, expected = b"", []
    for cookie, (command, payload) in enumerate(asked):
        flags = wire.PAYLOAD_LEN if payload or command == wire.WRITE else 0
        length = len(payload) if flags else 1 << 40
        data += struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, 9, length) + payload
        expected.append((command, flags, cookie, 9, length, payload if flags else None))
    assert requests([data]) == (expected, None)
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(8))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert requests(pieces) == (expected, None)
    if len(data) < 2000:
        assert requests([data[i:i + 1] for i in range(len(data))]) == (expected, None)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_parse_or_are_the_peers_error(data: bytes, with_magic: bool) -> None:
    requests([(struct.pack(">I", 0x21E41C71) if with_magic else b"") + data])


# The server's answers


@pytest.mark.parametrize("make", [Memory, Gated])
def test_x_2_x_6_every_answer_is_a_chunk_with_the_requests_offset(make: Any) -> None:
    async def main() -> None:
        driver = make(SIZE)
        async with talk(driver, agreed=AGREED) as both:
            client = both.client
            await client.send(wire.ext_request(wire.WRITE, 1, 4096, payload=b"abc", flags=wire.FUA))
            if isinstance(driver, Gated):
                await soon(_opened(driver))
            assert await answers(client, 1) == [wire.ext_chunk(1, 0, 4096)]
            asked = [(wire.FLUSH, 0, 0), (wire.TRIM, 8192, 512), (wire.WRITE_ZEROES, 512, 5), (wire.CACHE, 7, 9)]
            for cookie, (command, offset, length) in enumerate(asked):
                await client.send(wire.ext_request(command, cookie, offset, length))
                assert await answers(client, 1) == [wire.ext_chunk(cookie, 0, offset)]
            await client.send(wire.ext_request(wire.READ, 9, 4096, 3))
            if isinstance(driver, Gated):
                await soon(_opened(driver))
            assert await answers(client, 1) == [wire.ext_data(9, 4096, b"abc")]
            await client.send(wire.ext_request(wire.READ, 10, 5, 0) + wire.ext_request(99, 11, 77))
            empty, unknown = await answers(client, 2)
            assert empty == wire.ext_chunk(10, 0, 5)
            assert unknown == wire.ext_error(11, 77, 22, unknown[38:])
            await client.send(wire.ext_request(wire.DISC))
            assert await client.ended() == b""
            assert await both.end() is None

    asyncio.run(main())


async def _opened(driver: Gated) -> None:
    while not driver.waiting:  # noqa: ASYNC110 - no event announces it
        await asyncio.sleep(0)
    driver.release()


def test_x_2_zeroes_are_a_hole_and_data_with_df() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=AGREED) as both:
            await both.client.send(wire.ext_request(wire.READ, 1, 512, 4096))
            await both.client.send(wire.ext_request(wire.READ, 2, 512, 4096, wire.DF))
            hole, data = await answers(both.client, 2)
            assert hole == wire.ext_chunk(1, 2, 512, struct.pack(">QI", 512, 4096))
            assert data == wire.ext_data(2, 512, bytes(4096))

    asyncio.run(main())


@pytest.mark.parametrize("command", [
    wire.READ, wire.FLUSH, wire.TRIM, wire.CACHE, wire.WRITE_ZEROES, wire.BLOCK_STATUS, 99,
])
@pytest.mark.parametrize("payload_bytes", [1, 600, 100_000])
def test_x_4_a_payload_that_nobody_expects(command: int, payload_bytes: int) -> None:
    """It is read away and refused, the next request is heard; nothing of it has happened."""
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=AGREED) as both:
            await both.client.send(wire.ext_request(command, 1, 0, payload=b"\xee" * payload_bytes))
            await both.client.send(wire.ext_request(wire.READ, 2, 0, 4))
            refused, data = await answers(both.client, 2)
            assert refused == wire.ext_error(1, 0, 22, refused[38:])
            assert data == wire.ext_chunk(2, 2, 0, struct.pack(">QI", 0, 4))

    asyncio.run(main())


def test_x_4_payload_flag_without_extended_headers() -> None:
    """A flag like any that is not offered (X9), and the payload of a WRITE is where it always is."""
    async def main() -> None:
        async with talk(Memory(SIZE)) as both:
            await both.client.send(wire.write(1, 0, b"data", wire.PAYLOAD_LEN) + wire.request(wire.READ, 2, 0, 4))
            assert (await both.client.reply()).error == 22
            assert (await both.client.reply(4)).data == bytes(4)

    asyncio.run(main())


def test_x_5_a_payload_too_large_ends_the_connection() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=AGREED) as both:
            await both.client.send(wire.ext_request(wire.TRIM, 1, 0, 1 << 60, wire.PAYLOAD_LEN))
            assert await both.client.ended() == b""
            assert isinstance(await both.end(), PeerError)

    asyncio.run(main())


class Terabytes(Memory):
    """Nothing but its size, and what was asked of it."""

    HALF = 5 << 40

    def __init__(self) -> None:
        super().__init__(4096)
        self.size = 2 * self.HALF
        self.asked: list[tuple[str, int, int]] = []

    def read(self, offset: int, length: int) -> Any:
        return bytes(length)

    def trim(self, offset: int, length: int) -> None:
        self.asked.append(("trim", offset, length))

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False) -> None:
        self.asked.append(("write_zeroes", offset, length))

    def cache(self, offset: int, length: int) -> None:
        self.asked.append(("cache", offset, length))

    def extents(self, offset: int, length: int) -> Any:
        self.asked.append(("extents", offset, length))
        return [(self.HALF - offset, True, True), (self.HALF, False, False)]


def test_x_7_extents_with_64_bits() -> None:
    async def main() -> None:
        driver = Terabytes()
        async with talk(driver, agreed=SELECTED) as both:
            await both.client.send(wire.ext_request(wire.BLOCK_STATUS, 1, 4096, driver.size - 4096))
            (told,) = await answers(both.client, 1)
            assert told == wire.ext_extents(1, 4096, CONTEXT, (driver.HALF - 4096, 3), (driver.HALF, 0))
            await both.client.send(wire.ext_request(wire.BLOCK_STATUS, 2, 0, 1 << 33, wire.REQ_ONE))
            assert await answers(both.client, 1) == [wire.ext_extents(2, 0, CONTEXT, (1 << 33, 3))]

    asyncio.run(main())


def test_x_8_a_status_filtered_by_context() -> None:
    async def main() -> None:
        async with talk(Terabytes(), agreed=SELECTED) as both:
            async def status(*ids: int, length: int = 1 << 33, tail: bytes = b"") -> bytes:
                payload = struct.pack(f">Q{len(ids)}I", length, *ids) + tail
                await both.client.send(wire.ext_request(wire.BLOCK_STATUS, 5, 512, payload=payload))
                (told,) = await answers(both.client, 1)
                return told

            assert await status(CONTEXT) == wire.ext_extents(5, 512, CONTEXT, (1 << 33, 3))
            assert await status() == wire.ext_chunk(5, 0, 512)
            for wrong in [(2,), (CONTEXT, CONTEXT), (CONTEXT, 2), (0,)]:
                told = await status(*wrong)
                assert told == wire.ext_error(5, 512, 22, told[38:])
            for tail in (b"x", b"xxx"):
                told = await status(tail=tail)
                assert told == wire.ext_error(5, 512, 22, told[38:])
            told = await status(CONTEXT, length=1 << 60)    # past the end
            assert told == wire.ext_error(5, 512, 22, told[38:])

    asyncio.run(main())


def test_x_9_no_filter_without_a_context() -> None:
    async def main() -> None:
        async with talk(Memory(SIZE), agreed=AGREED) as both:
            payload = struct.pack(">QI", 512, CONTEXT)
            await both.client.send(wire.ext_request(wire.BLOCK_STATUS, 5, 512, payload=payload))
            (told,) = await answers(both.client, 1)
            assert told == wire.ext_error(5, 512, 22, told[38:])

    asyncio.run(main())


# The client's reading

OFFSET = 1 << 40
READ, EMPTY, STATUS, LARGE = 1, 2, 3, 4
LENGTHS = {READ: 1000, EMPTY: 0, STATUS: 0, LARGE: 200_000}


def replies(chunks: Iterable[bytes]) -> tuple[list[Reply], str | None]:
    reader = ChunkReader(CONTEXT, RECEIVE_BYTES, extended=True)
    for cookie, length in LENGTHS.items():
        reader.expect(cookie, length, offset=OFFSET, wants_extents=cookie == STATUS)
    seen: list[Reply] = []
    try:
        for piece in chunks:
            for _ in receive(reader, piece):
                while batch := reader.next_batch():
                    seen += batch
    except PeerError as error:
        return seen, str(error)
    return seen, None


GOOD = (
    wire.ext_data(READ, OFFSET, b"b" * 600, 400, flags=0)
    + wire.ext_chunk(EMPTY, 0, OFFSET)
    + wire.ext_data(LARGE, OFFSET, b"c" * 150_000, flags=0)
    + wire.ext_extents(STATUS, OFFSET, CONTEXT, (1 << 50, 3), (7, 1 << 40))
    + wire.ext_chunk(LARGE, 2, OFFSET, struct.pack(">QI", OFFSET + 150_000, 50_000))
    + wire.ext_data(READ, OFFSET, b"a" * 400)
)
TOLD: list[Reply] = [
    (EMPTY, 0, None),
    (STATUS, 0, [(1 << 50, 3), (7, 1 << 40)]),
    (LARGE, 0, b"c" * 150_000 + bytes(50_000)),
    (READ, 0, b"a" * 400 + b"b" * 600),
]


@given(st.randoms(use_true_random=False))
def test_x_6_x_7_any_cut_gives_the_same(dice: random.Random) -> None:
    assert replies([GOOD]) == (TOLD, None)
    cuts = sorted(dice.randrange(len(GOOD) + 1) for _ in range(8))
    assert replies([GOOD[a:b] for a, b in zip([0, *cuts], [*cuts, len(GOOD)], strict=True)]) == (TOLD, None)


def test_byte_by_byte() -> None:
    small = wire.ext_extents(STATUS, OFFSET, CONTEXT, (9, 0)) + wire.ext_error(READ, OFFSET, 5, b"no")
    assert replies([small[i:i + 1] for i in range(len(small))]) == (
        [(STATUS, 0, [(9, 0)]), (READ, 5, "no")], None,
    )


@pytest.mark.parametrize(("data", "says"), [
    (wire.simple_reply(EMPTY), "reply magic is 0x67446698"),
    (wire.chunk(EMPTY, 0), "reply magic is 0x668e33ef"),
    (wire.ext_chunk(EMPTY, 0, OFFSET + 1), f"offset {OFFSET + 1} to a request with offset {OFFSET}"),
    (wire.ext_chunk(STATUS, 5, OFFSET, struct.pack(">III", CONTEXT, 9, 0)), "unknown type 5"),
    (wire.ext_chunk(STATUS, 6, OFFSET, struct.pack(">IIQQ", CONTEXT, 2, 9, 0)), "2 extents announced, 1 follow"),
    (wire.ext_chunk(STATUS, 6, OFFSET, struct.pack(">II", CONTEXT, 0)), "not here"),
    (wire.ext_extents(STATUS, OFFSET, CONTEXT, (0, 0)), "length 0"),
    (wire.ext_extents(STATUS, OFFSET, 9, (9, 0)), "context 9"),
    (wire.ext_extents(READ, OFFSET, CONTEXT, (9, 0)), "not here"),
    (wire.ext_chunk(99, 0, OFFSET), "cookie 0x63"),
    (struct.pack(">IHHQQQ", 0x6E8A278C, 1, 1, READ, OFFSET, 1 << 62), "not here"),
])
def test_x_2_x_6_x_7_a_broken_server(data: bytes, says: str) -> None:
    _, error = replies([data])
    assert error is not None
    assert says in error


@given(st.binary(max_size=100), st.booleans())
def test_replies_any_bytes_parse_or_are_the_peers_error(data: bytes, with_magic: bool) -> None:
    replies([(wire.ext_chunk(READ, 0, OFFSET)[:16] if with_magic else b"") + data])


# Both sides


def test_x_7_effect_lengths_of_terabytes() -> None:
    async def main() -> None:
        driver = Terabytes()
        async with serve(driver) as uri, connect(uri) as client:
            assert client.info.extended
            assert client.can(TransmissionFlag.BLOCK_STATUS_PAYLOAD)
            await client.trim(0, 3 << 40)
            await client.write_zeroes(512, driver.size - 512)
            await client.cache(0, driver.size)
            assert await client.extents(0, driver.size) == [
                (driver.HALF, True, True), (driver.HALF, False, False),
            ]
            assert driver.asked == [
                ("trim", 0, 3 << 40), ("write_zeroes", 512, driver.size - 512), ("cache", 0, driver.size),
                ("extents", 0, driver.size),
            ]
            with pytest.raises(BlockError) as caught:
                await client.read(0, 1 << 33)       # never sent
            assert caught.value.errno == errno.EINVAL
            assert await client.read(driver.size - 5, 5) == bytes(5)

    run(main())


def test_x_10_a_server_without_them_has_32_bits() -> None:
    async def main() -> None:
        refusals = [struct.pack(">QIII", 0x0003E889045565A9, number, (1 << 31) + 1, 0) for number in (11, 8)]
        told = struct.pack(">QIII", 0x0003E889045565A9, 7, 3, 12) + struct.pack(">HQH", 0, 1 << 40, 0x6D)
        done = struct.pack(">QIII", 0x0003E889045565A9, 7, 1, 0)
        async with fake_server(b"NBDMAGICIHAVEOPT\0\x03", *refusals, told + done) as uri:
            client = await connect(uri)
            assert not client.info.extended
            with pytest.raises(BlockError, match="the protocol cannot carry this"):
                await client.trim(0, 1 << 32)
            await client.close()

    run(main())


def test_data_both_ways_with_many_in_flight(seed: int) -> None:
    async def main() -> None:
        dice = random.Random(seed)
        disk = bytearray(8 << 20)
        async with serve(Memory(len(disk))) as uri, connect(uri) as client:
            for _ in range(5):
                writes = []
                for begin in range(0, len(disk), 1 << 20):
                    length = dice.choice([1, 512, 4096, 40_000, 1 << 20])
                    data = dice.randbytes(length)
                    disk[begin:begin + length] = data
                    writes.append(client.write(begin, data, fua=dice.random() < 0.2))
                await soon(asyncio.gather(*writes))
                reads = [client.read(begin, 1 << 20) for begin in range(0, len(disk), 1 << 20)]
                assert b"".join(await soon(asyncio.gather(*reads))) == disk

    run(main())
