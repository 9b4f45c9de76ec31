"""NBD URIs: what we write we read back, what others write we understand, what we cannot follow is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeloop.nbd.uri import NbdUri, format_uri, parse_uri

NAMES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40)
HOSTS = st.sampled_from(["localhost", "127.0.0.1", "::1", "fe80::1%eth0", "host.example"])


@given(st.builds(NbdUri, socket=NAMES.map("/x{}".format), export=NAMES))
def test_unix_round_trip(uri: NbdUri) -> None:
    assert parse_uri(format_uri(uri)) == uri


@given(st.builds(NbdUri, host=HOSTS, port=st.integers(1, 65535), export=NAMES))
def test_tcp_round_trip(uri: NbdUri) -> None:
    assert parse_uri(str(uri)) == uri


TLS = st.fixed_dictionaries({
    "tls": st.just(True), "username": st.none() | NAMES, "tls_type": st.sampled_from([None, "x509"]),
    "tls_hostname": st.none() | NAMES, "tls_verify_peer": st.booleans(), "tls_certificates": st.none() | NAMES,
    "tls_psk_file": st.none() | NAMES,
})


@given(TLS, NAMES.map("/x{}".format), HOSTS)
def test_tls_round_trip(tls: dict[str, Any], path: str, host: str) -> None:
    for uri in (NbdUri(socket=path, **tls), NbdUri(host=host, export="x", **tls)):
        assert parse_uri(format_uri(uri)) == uri


@pytest.mark.parametrize(("text", "uri"), [
    ("nbds://h", NbdUri(host="h", tls=True)),
    ("nbds+unix://alice@/?socket=/s&tls-certificates=certs", NbdUri(
        socket="/s", tls=True, username="alice", tls_certificates="certs",
    )),
    ("nbds://bob@h/?tls-psk-file=/k&tls-username=alice&tls-type=psk&tls-hostname=x&tls-verify-peer=false", NbdUri(
        host="h", tls=True, username="alice", tls_psk_file="/k", tls_type="psk", tls_hostname="x",
        tls_verify_peer=False,
    )),
    ("nbd://h", NbdUri(host="h")),
    ("nbd://h/", NbdUri(host="h")),
    ("nbd://", NbdUri()),
    ("nbd://h:1/a%20b", NbdUri(host="h", port=1, export="a b")),
    ("nbd://h//lead", NbdUri(host="h", export="/lead")),
    ("nbd+unix:///?socket=/a+b", NbdUri(socket="/a+b")),
    ("nbd+unix:///x?tls-verify-peer=1&socket=%00abstract", NbdUri(socket="\0abstract", export="x")),
])
def test_understood(text: str, uri: NbdUri) -> None:
    assert parse_uri(text) == uri


def test_port_10809_is_left_out() -> None:
    """H8: the default port needs no mention."""
    assert format_uri(NbdUri(host="h", port=10809)) == "nbd://h/"
    assert format_uri(NbdUri(host="::1", port=1, export="x")) == "nbd://[::1]:1/x"


@pytest.mark.parametrize(("text", "says"), [
    ("nbd://h:99999/", "out of range"),
    ("nbd+unix:///x", "0 socket= parameters"),
    ("nbd+unix:///x?socket=/a&socket=/b", "2 socket= parameters"),
    ("nbd+unix://host/x?socket=/a", "names the host 'host'"),
    ("http://h/", "scheme 'http'"),
    ("nbds://h/?tls-verify-peer=perhaps", "neither 0 nor 1"),
    ("nbds://h/?tls-type=anon", "tls-type='anon'"),
    ("nbds://h/?tls-type=psk", "without a tls-psk-file"),
    ("nbds://h/?tls-verify-pear=1", "'tls-verify-pear' is not known"),
    ("nbds+unix:///", "0 socket= parameters"),
    ("nbds+unix://user@host/?socket=/a", "names the host 'user@host'"),
    ("nbd+unix://user@/?socket=/a", "names the host"),
    ("nbd://h/%ff", "decode"),
    ("nbd://h/%00", "NUL"),
    ("nbd://h/" + "x" * 4097, "4097 bytes"),
    ("nbd://[::1/", "IPv6"),
])
def test_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_uri(text)
    assert text[:20] in str(caught.value)
