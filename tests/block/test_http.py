"""Images on web servers: ranges, and servers that break their word."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from homeloop.block import http as http_module
from homeloop.block.http import Http
from homeloop.block.opening import default_name, open_device
from homeloop.errors import BlockError, UsageError
from tests.block.answers import BOUND_S, finish

DATA = bytes(range(256)) * 1024


class Site(socketserver.ThreadingMixIn, HTTPServer):
    """Serves DATA by ranges; `answer`, if set, answers in its place from the second request on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.etag: str | None = '"one"'
        self.requests: list[dict[str, str]] = []
        self.connections = 0
        self.answer: Callable[[Handler, int, int], object] | None = None
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/disk.img"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away, that is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.requests.append({"path": self.path, **self.headers})
        start, end = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        if self.server.answer is not None:
            self.server.answer(self, start, end)
        else:
            self.send(start, end)

    def send(self, start: int, end: int, *, status: int = 206, body: bytes | None = None, **headers: str) -> None:
        """The right answer, but for what is given."""
        body = DATA[start : end + 1] if body is None else body
        fields: dict[str, str] = {
            "Content-Range": f"bytes {start}-{end}/{len(DATA)}", "Content-Length": str(len(body)),
            "ETag": self.server.etag or "",
        }
        fields.update({name.replace("_", "-"): value for name, value in headers.items()})
        self.send_response(status)
        for name, value in fields.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serving(site: Site) -> Iterator[Site]:
    thread = threading.Thread(target=site.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield site
    finally:
        site.shutdown()
        thread.join()
        site.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        yield site


@pytest.fixture
def image(site: Site) -> Iterator[Http]:
    with contextlib.closing(Http(site.url, timeout_s=BOUND_S)) as image:
        yield image


def test_reads_over_one_connection(site: Site, image: Http) -> None:
    assert image.size == len(DATA)
    for offset, length in ((0, 1), (4096, 512), (len(DATA) - 1, 1), (0, len(DATA))):
        assert image.read(offset, length) == DATA[offset : offset + length]
    assert site.connections == 1
    assert site.requests[0]["Range"] == "bytes=0-0"
    assert site.requests[1]["If-Match"] == '"one"'
    assert site.requests[1]["Accept-Encoding"] == "identity"


def test_as_a_device(site: Site) -> None:
    async def main() -> None:
        device = await asyncio.to_thread(open_device, site.url)
        assert (device.name, device.read_only, device.size) == ("disk.img", True, len(DATA))
        found = await asyncio.gather(*(finish(device.read(at, 512)) for at in range(0, 16384, 512)))
        assert b"".join(found) == DATA[:16384]
        await device.close()

    asyncio.run(main())
    assert default_name("https://host:1/") == "host"


def test_what_a_server_may_not_do(site: Site, image: Http) -> None:
    """Each of these is EIO, and the next read is right again."""
    whole = len(DATA)
    wrong: dict[str, Callable[[Handler, int, int], object]] = {
        "ignores ranges": lambda h, s, e: h.send(s, e, status=200, body=DATA, Content_Range=""),
        r"has changed \(412": lambda h, s, e: h.send(s, e, status=412, body=b""),
        r"has changed \(416": lambda h, s, e: h.send(s, e, status=416, body=b""),
        "503 ": lambda h, s, e: h.send(s, e, status=503, body=b"later"),
        "206 without a range: None": lambda h, s, e: h.send(s, e, Content_Range=""),
        "206 without a range: 'items": lambda h, s, e: h.send(s, e, Content_Range="items 0-1/2"),
        "asked for 512 bytes at 1024, got": lambda h, s, e: h.send(s, e, Content_Range=f"bytes 0-511/{whole}"),
        "has changed: it was": lambda h, s, e: h.send(s, e, Content_Range=f"bytes {s}-{e}/{whole + 1}"),
        "etag='\"two\"'": lambda h, s, e: h.send(s, e, ETag='"two"'),
        "etag=None": lambda h, s, e: h.send(s, e, ETag=""),
        "modified='Mon": lambda h, s, e: h.send(s, e, Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT"),
        "encoded as 'gzip'": lambda h, s, e: h.send(s, e, Content_Encoding="gzip"),
        "511 bytes announced": lambda h, s, e: h.send(s, e, body=DATA[s:e]),
        "302 without a Location": lambda h, s, e: h.send(s, e, status=302, body=b""),
        "redirected to what is no address": lambda h, s, e: h.send(s, e, status=302, body=b"", Location="ftp://x/"),
        "more than 5 redirects": lambda h, s, e: h.send(s, e, status=302, body=b"", Location="/disk.img"),
    }
    for says, answer in wrong.items():
        site.answer = answer
        with pytest.raises(OSError, match=says) as caught:
            image.read(1024, 512)
        assert caught.value.errno == (errno.ELOOP if "redirects" in says else errno.EIO)
        site.answer = None
        assert image.read(1024, 512) == DATA[1024:1536]


def test_answers_that_end_early_or_are_no_http(site: Site, image: Http) -> None:
    def short(handler: Handler, start: int, end: int) -> None:
        handler.send(start, end, body=DATA[start:end], Content_Length=str(end - start + 1))
        handler.close_connection = True

    def noise(handler: Handler, start: int, end: int) -> None:
        handler.wfile.write(b"\x80 what?\r\n\r\n")
        handler.close_connection = True

    def nothing(handler: Handler, start: int, end: int) -> None:
        handler.close_connection = True

    for answer, says in ((short, "ends 1 byte"), (noise, "BadStatus"), (nothing, r"RemoteDisconnected|reset")):
        site.answer = answer
        with pytest.raises(OSError, match=says):
            image.read(0, 512)
        site.answer = None
        assert image.read(0, 512) == DATA[:512]


def test_a_kept_connection_that_the_server_closed(site: Site, image: Http) -> None:
    """The next read makes a new one: nothing was wrong with the request."""

    def last(handler: Handler, start: int, end: int) -> None:
        handler.close_connection = True
        handler.send(start, end)

    site.answer = last
    for _ in range(3):
        assert image.read(0, 512) == DATA[:512]
    assert site.connections == 3


def test_a_server_that_does_not_answer(site: Site) -> None:
    let_go = threading.Event()
    image = Http(site.url, timeout_s=0.2)
    site.answer = lambda handler, start, end: let_go.wait(BOUND_S)
    try:
        with pytest.raises(OSError, match="time limit") as caught:
            image.read(0, 512)
        assert caught.value.errno == errno.ETIMEDOUT
    finally:
        let_go.set()
        image.close()


@pytest.mark.parametrize(("head", "drop"), [
    (b"", b"."), (b"HTTP/1.1 206 OK\r\nX: ", b"."), (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
])
def test_a_server_that_drips(site: Site, head: bytes, drop: bytes) -> None:
    """Each receive is in time, all of them together are not: of the body, of the head, of what comes before it."""
    image = Http(site.url, timeout_s=BOUND_S, request_s=1.0)      # also to open it
    stopped = threading.Event()
    giving_up = threading.Timer(BOUND_S, stopped.set)
    giving_up.start()

    def drip(handler: Handler, start: int, end: int) -> None:
        if head or drop != b".":
            handler.wfile.write(head)
        else:
            handler.send(start, end, body=b"", Content_Length=str(end - start + 1))
        with contextlib.suppress(OSError):
            while not stopped.wait(0.02):
                handler.wfile.write(drop)

    site.answer = drip
    try:
        with pytest.raises(OSError, match="time limit"):
            image.read(0, 65536)
        assert not stopped.is_set()
    finally:
        giving_up.cancel()
        stopped.set()
        image.close()


def test_redirects_are_followed_and_remembered(site: Site) -> None:
    def away(handler: Handler, start: int, end: int) -> None:
        if handler.path == "/disk.img":
            handler.send(start, end, status=302, body=b"", Location="/other.img?x=1")
        else:
            handler.send(start, end)

    site.answer = away
    with contextlib.closing(Http(site.url, timeout_s=BOUND_S)) as image:
        assert image.read(0, 512) == DATA[:512]
        assert [request["path"] for request in site.requests] == ["/disk.img", "/other.img?x=1", "/other.img?x=1"]


def test_a_weak_etag_is_compared_and_not_sent(site: Site) -> None:
    site.etag = 'W/"weak"'
    with contextlib.closing(Http(site.url, timeout_s=BOUND_S)) as image:
        image.read(0, 1)
        assert "If-Match" not in site.requests[-1]
        site.etag = 'W/"other"'
        with pytest.raises(OSError, match="has changed"):
            image.read(0, 1)


@pytest.mark.parametrize(
    ("status", "number"), [(404, errno.ENOENT), (403, errno.EACCES), (500, errno.EIO), (200, errno.EIO)]
)
def test_opening_fails(site: Site, status: int, number: int) -> None:
    site.answer = lambda handler, start, end: handler.send(start, end, status=status)
    with pytest.raises(BlockError, match="cannot open http://") as caught:
        Http(site.url, timeout_s=BOUND_S)
    assert caught.value.errno == number


def test_an_empty_file(site: Site) -> None:
    site.answer = lambda handler, start, end: handler.send(start, end, status=416, body=b"", Content_Range="bytes */0")
    with contextlib.closing(Http(site.url, timeout_s=BOUND_S)) as image:
        assert image.size == 0


def test_nobody_listens(site: Site) -> None:
    with serving(Site()) as gone:
        url = gone.url
    with pytest.raises(BlockError) as caught:
        Http(url, timeout_s=BOUND_S)
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_host_that_idna_cannot_encode(site: Site) -> None:
    """A UnicodeError of the resolver, which is no OSError."""
    with pytest.raises(BlockError, match=r"cannot open http://a\.\.b/x: "):
        Http("http://a..b/x")
    site.answer = lambda handler, start, end: handler.send(start, end, status=302, Location="http://a..b/x")
    with pytest.raises(BlockError, match="cannot open http://127"):
        Http(site.url, timeout_s=BOUND_S)


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///x", "https://host:99999/", "http://h:0/", "ftp://h/x", "http://u:p@h/x", "http://h/a b",
     "http://h/\r\nX: y", "http://[::1/x"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError):
        Http(url)


def test_limits_of_time() -> None:
    for options in ({"timeout_s": 0.0}, {"request_s": -1.0}):
        with pytest.raises(UsageError, match="more than 0"):
            Http("http://h/", **options)


def test_https(tmp_path: Path) -> None:
    """Over TLS, checked against the certificate; nobody is redirected from there to where nothing is checked."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
             "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
             str(certificate)],
            check=True, capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    site = Site()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site.socket = context.wrap_socket(site.socket, server_side=True, do_handshake_on_connect=False)
    site.scheme = "https"
    trust = ssl.create_default_context(cafile=str(certificate))
    with serving(site):
        with pytest.raises(BlockError, match="CERTIFICATE_VERIFY_FAILED"):
            Http(site.url, timeout_s=BOUND_S)
        with contextlib.closing(Http(site.url, timeout_s=BOUND_S, ssl_context=trust)) as image:
            assert image.read(0, 512) == DATA[:512]
            site.answer = lambda handler, start, end: handler.send(
                start, end, status=302, body=b"", Location="http://127.0.0.1/x"
            )
            with pytest.raises(OSError, match="redirected from https to http"):
                image.read(0, 512)


def test_connections_are_closed(site: Site) -> None:
    image = Http(site.url, timeout_s=BOUND_S)
    assert len(image._idle) == 1
    image.close()
    image.close()
    assert image._idle == []
    assert http_module.__all__ == ["Http"]
