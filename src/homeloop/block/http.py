"""A read-only image on a web server, read by ranges over HTTP or HTTPS.

Each read is one ranged GET on a worker thread; connections are kept and used again. A server is believed only as far
as its answer can be checked: status 206, the very range, the size, ETag and Last-Modified that it had when the image
was opened, no content coding, and not a byte less. Anything else is EIO, never wrong bytes. One that changes the file
and keeps size, ETag and date cannot be found out.

Nothing is tried again but a request on a kept connection that the server had closed meanwhile: that is for a filter.
Proxies and credentials in the URL are not supported.
"""

from __future__ import annotations

import errno
import functools
import http.client
import io
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from homeloop.block.driver import SIZE_BYTES_MAX, BytesLike, ThreadModel
from homeloop.errors import BlockError, UsageError

__all__ = ["Http"]

_REDIRECTS_MAX: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE: Final = re.compile(r"bytes +(?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19})")
# One receive.
_PIECE: Final = 1 << 18
# Of a path and query that were typed: what is safe, and what is quoted already, stays.
_SAFE: Final = "/%:=&?~#+!$,;'@()*[]"

_OPEN_ERRNO: Final = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What an answer says of the file."""

    size: int
    etag: str | None
    modified: str | None


class Http:
    """The driver of one image behind a URL. Any thread; opening asks the server, so do it in a worker.

    timeout_s: for each wait (connecting, one receive). request_s: for one request with all its redirects.
    ssl_context: for https; None: the system's trust. Raises UsageError for a URL that makes no sense, BlockError if the
    server does not have the file, or cannot do ranges.
    """

    thread_model: ThreadModel = "parallel"
    read_only = True
    multi_conn = True
    block_size_preferred = 1 << 16              # a round trip for each 4 KiB is slow

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        request_s: float = 300.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not timeout_s > 0 or not request_s > 0:
            raise UsageError(f"timeout_s={timeout_s}, request_s={request_s}: both must be more than 0")
        self.url = url
        self._timeout_s = timeout_s
        self._request_s = request_s
        self._ssl_context = ssl_context
        self._lock = threading.Lock()           # a leaf
        self._where = _parsed(url)              # under _lock: behind the redirects
        self._idle: list[http.client.HTTPConnection] = []   # under _lock: to _where; as many as workers at most
        self._closed = False                    # under _lock
        self._seen: _Seen | None = None         # set once, before anybody reads
        try:
            self._seen = self._first_look()
        except OSError as error:
            self.close()
            raise BlockError(error.errno or errno.EIO, f"cannot open {url}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise
        self.size = self._seen.size

    def __repr__(self) -> str:
        return f"<Http {self.url} size={self.size}>"

    def read(self, offset: int, length: int) -> BytesLike:
        """Get one range. OSError: ETIMEDOUT, or EIO for every answer that is not the one that was asked for."""
        buffer = bytearray(length)
        self._get(offset, length, buffer)
        return buffer

    def close(self) -> None:
        """Close the connections. Twice is fine."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _first_look(self) -> _Seen:
        """Ask for the first byte: that shows at once whether ranges work, and how long the file is."""
        return self._get(0, 1, bytearray(1))

    def _get(self, offset: int, length: int, buffer: bytearray) -> _Seen:
        deadline = time.monotonic() + self._request_s
        for _ in range(_REDIRECTS_MAX + 1):
            where = self._where
            connection, response = self._ask(where, offset, length, deadline)
            try:
                target = self._redirected(where, response)
                if target is None:
                    seen = self._take(response, offset, length, buffer)
                    self._keep(where, connection, response)
                    return seen
            except TimeoutError as error:
                connection.close()
                raise self._too_slow() from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise _as_os_error(error) from error
            except BaseException:
                connection.close()
                raise
            connection.close()
            self._move(target)
        raise OSError(errno.ELOOP, f"{self.url}: more than {_REDIRECTS_MAX} redirects")

    def _ask(
        self, where: SplitResult, offset: int, length: int, deadline: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request and receive the head of the answer."""
        while True:
            connection = self._idle_connection(where)
            kept = connection is not None
            if connection is None:
                connection = self._new_connection(where)
            try:
                self._limit(connection, deadline)
                connection.request("GET", _target(where), headers=self._headers(offset, length))
                return connection, connection.getresponse()
            except TimeoutError as error:
                connection.close()
                raise self._too_slow() from error
            except (OSError, UnicodeError, http.client.HTTPException) as error:     # a name that IDNA cannot encode
                connection.close()
                if kept and isinstance(error, ConnectionError):      # RemoteDisconnected is one too
                    continue                    # closed while it was idle. Ends: one connection less each time
                raise _as_os_error(error) from error

    def _headers(self, offset: int, length: int) -> dict[str, str]:
        headers = {
            "Range": f"bytes={offset}-{offset + length - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": "homeloop",
        }
        if self._seen is not None and self._seen.etag is not None and not self._seen.etag.startswith("W/"):
            headers["If-Match"] = self._seen.etag           # RFC 9110 13.1.1: strong ones only
        return headers

    def _redirected(self, where: SplitResult, response: http.client.HTTPResponse) -> SplitResult | None:
        if response.status not in _REDIRECTS:
            return None
        location = response.getheader("Location")
        if not location:
            raise OSError(errno.EIO, f"{self.url}: {response.status} without a Location")
        target = urljoin(where.geturl(), location)
        try:
            parsed = _parsed(target)
        except UsageError as error:
            raise OSError(errno.EIO, f"{self.url}: redirected to what is no address: {error}") from error
        if where.scheme == "https" and parsed.scheme != "https":
            raise OSError(errno.EIO, f"{self.url}: redirected from https to {target}")
        return parsed

    def _take(
        self, response: http.client.HTTPResponse, offset: int, length: int, buffer: bytearray
    ) -> _Seen:
        """Check an answer and receive its bytes."""
        seen = self._check_head(response, offset, length)
        if not seen.size:                       # an empty file: 416, and nothing to read
            return seen
        view = memoryview(buffer)
        while view:
            piece = response.read1(min(len(view), _PIECE))      # one receive; readinto() waits for all of it
            if not piece:
                raise OSError(errno.EIO, f"{self.url}: the answer ends {len(view)} bytes early")
            view[: len(piece)] = piece
            view = view[len(piece) :]
        return seen

    def _check_head(self, response: http.client.HTTPResponse, offset: int, length: int) -> _Seen:
        status, first = response.status, self._seen is None
        found = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", "").strip())
        if first and status == 416 and found is not None and int(found[3]) == 0:
            return _Seen(size=0, etag=response.getheader("ETag"), modified=response.getheader("Last-Modified"))
        if status == 200:
            raise OSError(errno.EIO, f"{self.url}: the server ignores ranges")
        if status in (412, 416) and not first:
            raise OSError(errno.EIO, f"{self.url} has changed ({status} {response.reason})")
        if status != 206:
            number = _OPEN_ERRNO.get(status, errno.EIO) if first else errno.EIO
            raise OSError(number, f"{self.url}: {status} {response.reason}")
        if found is None or found[1] is None:
            raise OSError(errno.EIO, f"{self.url}: 206 without a range: {response.getheader('Content-Range')!r}")
        if (int(found[1]), int(found[2])) != (offset, offset + length - 1):
            raise OSError(errno.EIO, f"{self.url}: asked for {length} bytes at {offset}, got {found[0]!r}")
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise OSError(errno.EIO, f"{self.url}: encoded as {response.getheader('Content-Encoding')!r}")
        if response.length is not None and response.length != length:
            raise OSError(errno.EIO, f"{self.url}: {response.length} bytes announced, asked for {length}")
        seen = _Seen(
            size=int(found[3]), etag=response.getheader("ETag"), modified=response.getheader("Last-Modified")
        )
        if seen.size > SIZE_BYTES_MAX:
            raise OSError(errno.EFBIG, f"{self.url}: {seen.size} bytes are more than a device can have")
        if self._seen is not None and seen != self._seen:
            raise OSError(errno.EIO, f"{self.url} has changed: it was {self._seen}, and is {seen}")
        return seen

    def _new_connection(self, where: SplitResult) -> http.client.HTTPConnection:
        host = where.hostname or ""
        if where.scheme == "https":
            context = self._ssl_context or ssl.create_default_context()
            return http.client.HTTPSConnection(host, where.port, timeout=self._timeout_s, context=context)
        return http.client.HTTPConnection(host, where.port, timeout=self._timeout_s)

    def _limit(self, connection: http.client.HTTPConnection, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.timeout = min(self._timeout_s, left)
        if connection.sock is not None:
            connection.sock.settimeout(connection.timeout)
        connection.response_class = functools.partial(      # type: ignore[assignment]
            _Response, timeout_s=self._timeout_s, deadline=deadline
        )

    def _idle_connection(self, where: SplitResult) -> http.client.HTTPConnection | None:
        with self._lock:
            return self._idle.pop() if self._idle and where == self._where else None

    def _keep(
        self, where: SplitResult, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        """Keep the connection for the next read, if the answer's end is known to be here and the server keeps it."""
        whole = not response.chunked
        response.close()
        with self._lock:
            if whole and connection.sock is not None and not self._closed and where == self._where:
                self._idle.append(connection)
                return
        connection.close()

    def _move(self, target: SplitResult) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
            self._where = target
        for connection in idle:
            connection.close()

    def _too_slow(self) -> OSError:
        return OSError(errno.ETIMEDOUT, f"{self.url}: no answer within the time limit")


class _Timed(io.RawIOBase):
    """What comes from a socket, as long as there is time: a server that drips its head or its body gets no more."""

    def __init__(self, sock: socket.socket, timeout_s: float, deadline: float) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)        # keeps the socket open while the answer is read
        self._timeout_s = timeout_s
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(min(self._timeout_s, left))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer within a time."""

    def __init__(self, sock: socket.socket, *args: Any, timeout_s: float, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(sock, timeout_s, deadline))


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is not http://HOST/PATH or https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"the URL of {parts.hostname} has credentials in it: they would be shown in every message")
    if port == 0 or any(ord(letter) <= 32 for letter in url):
        raise UsageError(f"{url!r} is no address")
    return parts


def _target(where: SplitResult) -> str:
    path = quote(where.path, safe=_SAFE) or "/"
    return f"{path}?{quote(where.query, safe=_SAFE)}" if where.query else path


def _as_os_error(error: OSError | UnicodeError | http.client.HTTPException) -> OSError:
    """An error with an errno: http.client's own, and ssl's and the resolver's with theirs, have none that helps."""
    number = None if isinstance(error, ssl.SSLError) else getattr(error, "errno", None)
    if isinstance(error, OSError) and type(number) is int and number > 0:
        return error
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")
