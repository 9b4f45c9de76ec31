"""The codec of transmission: requests and replies, in any pieces, within the limits, without copies."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeloop.errors import PeerError
from homeloop.nbd.transmission import (
    ReceiveBuffer,
    Reply,
    ReplyReader,
    RequestReader,
    pack_request,
)
from tests.nbd import wire

Seen = tuple[int, int, int, int, int, bytes | None]
RECEIVE_BYTES = 64 << 10
DIRECT = 32 << 10       # from here on a payload has memory of its own
PAYLOAD_BYTES_MAX = 128 << 10


def receive(reader: ReceiveBuffer, data: bytes) -> Iterator[None]:
    """Give `data` to the reader as recvmsg_into() would, as many bytes at a time as it asks for."""
    while data:
        targets = reader.targets()
        assert all(len(target) for target in targets), "the kernel would report the end of the stream"
        count = 0
        for target in targets:
            part = data[:len(target)]
            target[:len(part)] = part
            data = data[len(part):]
            count += len(part)
        reader.received(count)
        yield


def requests(chunks: Iterable[bytes], batch_max: int = 256) -> tuple[list[Seen], str | None]:
    """All requests in the chunks, and what the last error said. Payloads are copied while they are valid."""
    reader = RequestReader(payload_bytes_max=PAYLOAD_BYTES_MAX, receive_bytes=RECEIVE_BYTES)
    seen: list[Seen] = []
    try:
        for chunk in chunks:
            for _ in receive(reader, chunk):
                while batch := reader.next_batch(batch_max):
                    assert len(batch) <= batch_max
                    seen += [(*fields, None if data is None else bytes(data)) for *fields, data in batch]
    except PeerError as error:
        return seen, str(error)
    return seen, None


def test_layouts() -> None:
    assert pack_request(1, 2, 3, 4, 5) == wire.request(1, flags=2, cookie=3, offset=4, length=5)


def test_x1_every_field_comes_through() -> None:
    data = wire.request(wire.READ, 2**64 - 1, 2**63, 2**32 - 1, 0xFFFF) + wire.write(0, 512, b"abc", wire.FUA)
    assert requests([data]) == ([
        (wire.READ, 0xFFFF, 2**64 - 1, 2**63, 2**32 - 1, None), (wire.WRITE, 1, 0, 512, 3, b"abc"),
    ], None)


def test_x9_unknown_commands_and_flags_are_the_owners_affair() -> None:
    data = wire.request(4711, 1, flags=0xFFFF, length=2**32 - 1) + wire.request(wire.READ, 2)
    assert [request[0] for request in requests([data])[0]] == [4711, wire.READ]


def test_x14_empty_write() -> None:
    seen, error = requests([wire.write(1, 0, b"") + wire.request(wire.FLUSH, 2)])
    assert error is None
    assert [(r[0], r[5]) for r in seen] == [(wire.WRITE, b""), (wire.FLUSH, None)]


@pytest.mark.parametrize("length", [0, 1, DIRECT - 1, DIRECT, RECEIVE_BYTES, PAYLOAD_BYTES_MAX])
def test_z9_payload_up_to_the_limit(length: int) -> None:
    data = random.Random(length).randbytes(length)
    seen, error = requests([wire.write(1, 0, data) + wire.request(wire.FLUSH, 2)])
    assert error is None
    assert seen[0][5] == data
    assert seen[1][0] == wire.FLUSH


def test_z9_payload_above_the_limit_is_refused_before_it_is_kept() -> None:
    reader = RequestReader(payload_bytes_max=PAYLOAD_BYTES_MAX, receive_bytes=RECEIVE_BYTES)
    for _ in receive(reader, wire.request(wire.WRITE, 1, length=PAYLOAD_BYTES_MAX + 1)):
        pass
    with pytest.raises(PeerError, match=f"WRITE of {PAYLOAD_BYTES_MAX + 1} bytes, the limit is"):
        reader.next_batch(1)


@pytest.mark.parametrize("before", [b"", wire.request(wire.READ, 1), wire.write(1, 0, bytes(DIRECT + 5))])
def test_bad_magic_comes_after_what_was_right(before: bytes) -> None:
    seen, error = requests([before + b"\x25\x60\x95\x14" + bytes(24)])
    assert len(seen) == bool(before)
    assert error is not None
    assert "0x25609514" in error


def test_a_batch_has_a_limit() -> None:
    data = b"".join(wire.request(wire.READ, i) for i in range(100))
    reader = RequestReader()
    for _ in receive(reader, data):
        pass
    sizes = []
    while batch := reader.next_batch(30):
        sizes.append(len(batch))
    assert sizes == [30, 30, 30, 10]


def test_small_payload_is_a_view_and_large_one_has_its_own_memory() -> None:
    reader = RequestReader()
    for _ in receive(reader, wire.write(1, 0, b"small")):
        pass
    (small,) = reader.next_batch(9)
    assert small[5] is not None
    assert reader.owns(small[5])
    data = random.Random(1).randbytes(1 << 20)
    batch = []
    for _ in receive(reader, wire.write(2, 0, data)):
        batch += reader.next_batch(9)
    payload = batch[0][5]
    assert payload is not None
    assert not reader.owns(payload)
    # Whatever is received now, it does not change.
    for _ in receive(reader, wire.write(3, 0, bytes(1 << 20))):
        reader.next_batch(9)
    assert payload == data


def test_memory_given_back_is_used_again() -> None:
    reader = RequestReader()
    owners = []
    for cookie in range(3):
        batch = []
        for _ in receive(reader, wire.write(cookie, 0, bytes([cookie]) * (1 << 18))):
            batch += reader.next_batch(9)
        payload = batch[0][5]
        assert payload is not None
        assert payload == bytes([cookie]) * (1 << 18)
        owners.append(payload.obj)
        reader.give_back(payload)
    assert owners[0] is owners[1] is owners[2]


def test_the_memory_of_a_very_large_payload_is_not_kept() -> None:
    reader = RequestReader()
    batch = []
    for _ in receive(reader, wire.write(1, 0, bytes(8 << 20))):
        batch += reader.next_batch(9)
    payload = batch[0][5]
    assert payload is not None
    reader.give_back(payload)
    assert reader._spare is None


def test_large_writes_do_not_pass_through_the_buffer() -> None:
    """After one large payload the next one is received where it belongs: only headers land in the buffer."""
    reader = RequestReader()
    stream = b"".join(wire.write(i, 0, bytes(1 << 18)) for i in range(5))
    in_buffer = []
    while stream:
        targets = reader.targets()
        if len(targets) == 2:
            in_buffer.append(len(targets[1]))
        room = sum(len(target) for target in targets)
        for _ in receive(reader, stream[:room]):
            reader.next_batch(9)
        stream = stream[room:]
    assert in_buffer == [28] * 5


def test_retire_leaves_the_old_payloads_alone() -> None:
    reader = RequestReader()
    for _ in receive(reader, wire.write(1, 0, b"kept") + wire.write(2, 0, b"next")[:30]):
        pass
    ((*_, kept),) = reader.next_batch(9)
    reader.retire()
    for _ in receive(reader, b"xt" + bytes(10_000)):
        pass
    assert kept == b"kept"
    assert [bytes(r[5] or b"") for r in reader.next_batch(1)] == [b"next"]


SIZES = st.sampled_from([0, 1, 28, 4096, DIRECT - 1, DIRECT, DIRECT + 1, RECEIVE_BYTES, 100_000])
STREAMS = st.lists(
    st.one_of(
        st.builds(wire.request, st.sampled_from([0, 2, 3, 4, 6, 99]), st.integers(0, 2**64 - 1)),
        st.builds(lambda n, fill: wire.write(n, n, bytes([fill]) * n), SIZES, st.integers(0, 255)),
    ),
    max_size=8,
).map(b"".join)


@given(STREAMS, st.sampled_from([b"", b"garbage" * 5]), st.integers(1, 5), st.randoms(use_true_random=False))
def test_any_cut_gives_the_same(stream: bytes, end: bytes, batch_max: int, dice: random.Random) -> None:
    data = stream + end
    whole = requests([data])
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(8))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert requests(pieces, batch_max) == whole
    if len(data) < 10_000:
        assert requests([data[i:i + 1] for i in range(len(data))], batch_max) == whole


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_parse_or_are_the_peers_error(data: bytes, with_magic: bool) -> None:
    requests([(struct.pack(">I", 0x25609513) if with_magic else b"") + data])


# The client's side


def replies(chunks: Iterable[bytes], expected: dict[int, int]) -> tuple[list[Reply], str | None]:
    reader = ReplyReader(RECEIVE_BYTES)
    for cookie, payload_bytes in expected.items():
        reader.expect(cookie, payload_bytes)
    seen: list[Reply] = []
    try:
        for chunk in chunks:
            for _ in receive(reader, chunk):
                while batch := reader.next_batch():
                    seen += batch
    except PeerError as error:
        return seen, str(error)
    return seen, None


def test_x3_replies_in_any_order() -> None:
    data = wire.simple_reply(2, 0, b"two") + wire.simple_reply(3) + wire.simple_reply(1, 5)
    assert replies([data], {1: 4096, 2: 3, 3: 0}) == ([(2, 0, b"two"), (3, 0, None), (1, 5, None)], None)


@pytest.mark.parametrize(("data", "says"), [
    (wire.simple_reply(9), "cookie 0x9"),
    (wire.simple_reply(1) * 2, "cookie 0x1"),
    (bytes(16), "reply magic is 0x00000000"),
    (struct.pack(">IHHQ", 0x668E33EF, 1, 0, 1), "structured reply"),
])
def test_a_broken_server(data: bytes, says: str) -> None:
    _, error = replies([data], {1: 0})
    assert error is not None
    assert says in error


@given(st.lists(SIZES, max_size=6), st.randoms(use_true_random=False))
def test_replies_any_cut_gives_the_same(sizes: list[int], dice: random.Random) -> None:
    expected = dict(enumerate(sizes))
    data = b"".join(wire.simple_reply(i, 0, bytes([i]) * size) for i, size in expected.items())
    whole = replies([data], expected)
    assert [len(payload or b"") for _, _, payload in whole[0]] == sizes
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(8))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert replies(pieces, expected) == whole


@given(st.binary(max_size=100), st.booleans())
def test_replies_any_bytes_parse_or_are_the_peers_error(data: bytes, with_magic: bool) -> None:
    replies([(wire.simple_reply(1)[:4] if with_magic else b"") + data], {0: 0, 1: 5})
