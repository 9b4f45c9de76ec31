"""Pure: finds the JSON values in a stream of bytes that has no other separator, and reads them as QEMU does.

QEMU's clients send objects without newlines, two in a packet or one in two, so the end of a value is found here by
its brackets. Accepted beyond JSON: 'single quotes'. What cannot be is an error of its own, and reading goes on behind
it; a control character or a byte that no UTF-8 has throws away what is open (a client that lost its place sends one).
"""

from __future__ import annotations

import math
import re
from typing import Final, NoReturn

__all__ = ["DEPTH_MAX", "SIZE_BYTES_MAX", "JsonError", "TooLong", "ValueReader", "parse"]

SIZE_BYTES_MAX: Final = 1 << 20     # of one value: a blockdev-add has some hundred bytes
DEPTH_MAX: Final = 128              # QEMU's is 1024; its deepest command needs ten
_DIGITS_MAX: Final = 300            # of a number: further than any float reaches

_BAD: Final = rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xc0\xc1\xf5-\xff]"
_BLANK: Final = re.compile(rb"[ \t\r\n]*")
_WORD_END: Final = re.compile(rb"[ \t\r\n{}\[\],:\"']|" + _BAD)
_LANDMARK: Final = re.compile(rb"[{}\[\]\"']|" + _BAD)                  # outside strings
_IN_STRING: Final = {                                                   # by what ends the string
    ord('"'): re.compile(rb'["\\]|' + _BAD),
    ord("'"): re.compile(rb"['\\]|" + _BAD),
}
_BAD_BYTE: Final = re.compile(_BAD)
_OPENING: Final = {ord("{"): ord("}"), ord("["): ord("]")}
_CLOSING: Final = frozenset(_OPENING.values())
_BACKSLASH: Final = ord("\\")

_TOKEN: Final = re.compile(
    r"""[ \t\r\n]*(?:([{}\[\],:])|("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|([^ \t\r\n{}\[\],:"']+))""", re.DOTALL
)
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\", "/": "/"}
_KEYWORDS: Final[dict[str, object]] = {"true": True, "false": False, "null": None}


class JsonError(Exception):
    """These bytes are no JSON; those behind them may be."""

    def __init__(self, text: str) -> None:
        super().__init__(f"JSON parse error, {text}")


class TooLong(JsonError):
    """A value of more bytes than we keep: its end is not looked for, so nothing can follow it."""


class ValueReader:
    """Cuts a stream into values. Not for two threads at once."""

    def __init__(self, *, size_bytes_max: int = SIZE_BYTES_MAX) -> None:
        self._size_bytes_max = size_bytes_max
        self._buffer = bytearray()          # from the beginning of the open value on
        self._looked = 0                    # at so many bytes of it
        self._closers: list[int] = []       # what the open brackets need, innermost last
        self._quote = 0                     # inside a string: what ends it

    @property
    def buffered_bytes(self) -> int:
        """Fed and not yet used."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent. Drain next_value() before the next feed: only that bounds the buffer."""
        self._buffer += data

    def next_value(self) -> tuple[object] | None:
        """Return the next whole value, alone in a tuple, or None until more is fed.

        JsonError for one piece that is none: call again, what follows may be good. TooLong: give up.
        """
        end = self._find_end()
        if end is not None:
            text = bytes(self._buffer[:end])
            self._drop(end)
            return (parse(text),)
        if len(self._buffer) > self._size_bytes_max:
            raise TooLong(f"a value of more than {self._size_bytes_max} bytes")
        return None

    def _find_end(self) -> int | None:
        """Return where the value ends that the buffer begins with, or None if that is not here."""
        buffer = self._buffer
        if not self._closers and not self._quote:
            if not self._looked:
                blank = _BLANK.match(buffer)
                assert blank is not None
                del buffer[:blank.end()]
                if buffer and buffer[0] in b"}],:":
                    self._refuse(1, "expecting value")
            if buffer and buffer[0] not in b"{[\"'":
                return self._find_word_end()
        while True:
            found = (_IN_STRING[self._quote] if self._quote else _LANDMARK).search(buffer, self._looked)
            if found is None:
                self._looked = len(buffer)
                return None
            at, byte = found.start(), found[0][0]
            if byte == _BACKSLASH:
                if at + 1 == len(buffer):
                    self._looked = at               # what it escapes has not come
                    return None
                self._looked = at + (1 if _BAD_BYTE.match(buffer, at + 1) else 2)
                continue
            self._looked = at + 1
            if self._quote and byte == self._quote:
                self._quote = 0
            elif byte in _IN_STRING and not self._quote:
                self._quote = byte
            elif byte in _OPENING:
                self._open(byte)
            elif byte in _CLOSING:
                self._close(byte)
            else:
                self._refuse(at + 1, f"stray '\\u{byte:04X}'")
            if not self._closers and not self._quote:
                return at + 1

    def _find_word_end(self) -> int | None:
        found = _WORD_END.search(self._buffer, self._looked)
        if found is None:
            self._looked = len(self._buffer)
            return None
        if _BAD_BYTE.match(found[0]):
            self._refuse(found.end(), f"stray '\\u{found[0][0]:04X}'")
        return found.start()

    def _open(self, byte: int) -> None:
        if len(self._closers) == DEPTH_MAX:
            self._refuse(self._looked, "nesting depth limit exceeded")
        self._closers.append(_OPENING[byte])

    def _close(self, byte: int) -> None:
        if self._closers.pop() != byte:
            self._refuse(self._looked, f"unexpected '{chr(byte)}'")

    def _refuse(self, count: int, text: str) -> NoReturn:
        self._drop(count)
        raise JsonError(text)

    def _drop(self, count: int) -> None:
        """Forget so many bytes, and what was open: a new value begins."""
        del self._buffer[:count]
        self._looked = 0
        self._closers.clear()
        self._quote = 0


def parse(text: bytes) -> object:
    """Read one JSON value. JsonError, in QEMU's words, for what is none; a key may come once in an object."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise JsonError("invalid UTF-8 sequence in string") from None
    parser = _Parser(decoded)
    value = parser.value(0)
    if not parser.at_end():
        raise JsonError("expecting value")
    return value


class _Parser:
    """Goes over one text, once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def at_end(self) -> bool:
        return not self._text[self._at:].strip(" \t\r\n")

    def _token(self) -> tuple[str, str]:
        """The next token: its kind (the mark itself, "string" or "word") and its text."""
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            raise JsonError("premature EOI" if self.at_end() else f"stray '{self._text[self._at:].strip()[:20]}'")
        self._at = found.end()
        mark, string, word = found.groups()
        if mark is not None:
            return mark, mark
        return ("string", string) if string is not None else ("word", word)

    def value(self, depth: int) -> object:
        kind, text = self._token()
        if kind == "string":
            return _string_of(text)
        if kind == "word":
            return _word_value(text)
        if depth == DEPTH_MAX:
            raise JsonError("nesting depth limit exceeded")
        if kind == "{":
            return self._object(depth + 1)
        if kind == "[":
            return self._array(depth + 1)
        raise JsonError("expecting value")

    def _object(self, depth: int) -> dict[str, object]:
        found: dict[str, object] = {}
        kind, text = self._token()
        while kind != "}":
            if kind != "string":
                raise JsonError("expecting value" if kind in "{}[],:" else "key is not a string in object")
            key = _string_of(text)
            if self._token()[0] != ":":
                raise JsonError("missing : in object pair")
            if key in found:
                raise JsonError("duplicate key")
            found[key] = self.value(depth)
            kind, _ = self._token()
            if kind == "}":
                break
            if kind != ",":
                raise JsonError("expected separator in dict")
            kind, text = self._token()
            if kind == "}":
                raise JsonError("expecting value")
        return found

    def _array(self, depth: int) -> list[object]:
        found: list[object] = []
        before = self._at
        if self._token()[0] == "]":
            return found
        self._at = before
        while True:
            found.append(self.value(depth))
            kind, _ = self._token()
            if kind == "]":
                return found
            if kind != ",":
                raise JsonError("expected separator in list")


def _string_of(quoted: str) -> str:
    inside = quoted[1:-1]
    if any(char in inside for char in "\t\r\n"):
        raise JsonError("stray control character in string")
    if "\\" not in inside:
        return inside
    plain = _ESCAPE.sub(_unescape, inside)
    try:
        # Two escapes make one character beyond the basic plane; half of such a pair is none.
        return plain.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise JsonError("invalid Unicode sequence in string") from None


def _unescape(found: re.Match[str]) -> str:
    digits, char = found.groups()
    if digits is not None:
        return chr(int(digits, 16))
    if char not in _ESCAPED:
        raise JsonError("invalid escape sequence in string")
    return _ESCAPED[char]


def _word_value(word: str) -> object:
    if word in _KEYWORDS:
        return _KEYWORDS[word]
    found = _NUMBER.fullmatch(word)
    if found is None:
        named = "".join(char if " " < char < "\x7f" else f"\\u{ord(char):04X}" for char in word[:40])
        raise JsonError(f"invalid keyword '{named}'" if word.isalpha() else f"stray '{named}'")
    if found[1] is None and found[2] is None and len(word) <= _DIGITS_MAX:
        return int(word)
    number = float(word) if len(word) <= 10 * _DIGITS_MAX else math.inf
    if math.isinf(number):
        raise JsonError(f"number out of range '{word[:20]}'")
    return number
