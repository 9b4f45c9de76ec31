"""Numbers and strings of the protocol: what the wire has, whatever this platform calls it."""

from __future__ import annotations

import errno

import pytest

from homeloop.errors import PeerError
from homeloop.nbd.protocol import errno_of_wire, pack_string, unpack_string, wire_errno


@pytest.mark.parametrize(("number", "wire"), [
    (errno.EPERM, 1),
    (errno.EROFS, 1),
    (errno.EIO, 5),
    (errno.ENOMEM, 12),
    (errno.EINVAL, 22),
    (errno.ENOSPC, 28),
    (errno.ESHUTDOWN, 108),
    (errno.ECONNRESET, 5),
])
def test_w2_errors_on_the_wire(number: int, wire: int) -> None:
    assert wire_errno(number) == wire


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.ENOSPC])
def test_e2_no_space_has_one_number(number: int) -> None:
    assert wire_errno(number) == 28


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.EOVERFLOW])
def test_x13_reserved_errors_are_not_sent(number: int) -> None:
    assert wire_errno(number) == 22


def test_wz2_x13_enotsup_is_for_fast_zero() -> None:
    assert wire_errno(errno.ENOTSUP, fast_zero=True) == wire_errno(errno.EOPNOTSUPP, fast_zero=True) == 95
    assert wire_errno(errno.EOVERFLOW, fast_zero=True) == 22
    assert wire_errno(errno.ENOSPC, fast_zero=True) == 28


def test_w2_an_error_is_never_zero() -> None:
    assert all(wire_errno(number) for number in range(-5, 200))


def test_x12_unknown_error_is_einval() -> None:
    assert errno_of_wire(108) == errno.ESHUTDOWN
    assert errno_of_wire(75) == errno.EOVERFLOW
    assert errno_of_wire(4711) == errno.EINVAL


def test_h9_strings_packed() -> None:
    assert pack_string("é" * 2048, "name") == "é".encode() * 2048
    for text, says in [("a\0b", "NUL"), ("é" * 2049, "4098 bytes"), ("\ud800", "UTF-8")]:
        with pytest.raises(ValueError, match=says):
            pack_string(text, "name")


def test_h9_strings_unpacked() -> None:
    assert unpack_string(b"\xc3\xa9" * 2048, "name") == "é" * 2048
    for data, says in [(b"a\0b", "NUL at byte 1"), (b"x" * 4097, "4097 bytes"), (b"\xff", "UTF-8")]:
        with pytest.raises(PeerError, match=f"name.*{says}"):
            unpack_string(data, "name")
