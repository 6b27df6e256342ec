"""Exchanges JSON with one server over HTTP: bounded in size and time, never with another host."""

from __future__ import annotations

import functools
import http.client
import io
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from typing import Any

from vlmpo.errors import RunError, shorten
from vlmpo.settings import API_KEY_VARIABLE

MAX_BODY_BYTES = 16 << 20  # a response of a million characters takes at most 12 MB as JSON
QUOTED = 200  # characters of a server's own words in a message
_PIECE = 64 << 10


@dataclass(frozen=True)
class Answer:
    """Holds a server's answer.

    Attributes:
        status: of HTTP.
        reason: the server's words for it.
        headers: of the answer.
        body: as sent.
    """

    status: int
    reason: str
    headers: Message
    body: bytes

    def json(self) -> Any:
        """Return the body's value. Raises ValueError if it is not JSON: NaN is not, nor is what is nested too deep."""
        try:
            return json.loads(self.body.decode("utf-8"), parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError("it is nested too deep") from None

    def quoted(self) -> str:
        """Return the beginning of the body on one line, without the key that was sent; the reason if there is none."""
        text = " ".join(self.body[: 10 * QUOTED].decode(errors="replace").split()) or self.reason
        if key := os.environ.get(API_KEY_VARIABLE):
            text = text.replace(key, "***")
        return visible(text[:QUOTED])


def visible(text: str) -> str:
    """Return ``text`` with control characters written out, as Python writes them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exchange(url: str, payload: Any | None, seconds: float) -> Answer:
    """Send ``payload`` as JSON, or nothing, and return the answer, whatever its status.

    A key in the environment variable VLMPO_API_KEY is sent along.

    Args:
        url: one that :func:`vlmpo.settings.check_server_url` takes, or a path below it.
        payload: a JSON value; None asks by GET.
        seconds: in which the whole answer must be there.

    Raises:
        OSError, http.client.HTTPException: it cannot be reached, breaks off, or takes longer.
        RunError: the answer is larger than MAX_BODY_BYTES, or a redirect; the key cannot be sent.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json", **_key_header()}
    body = None if payload is None else json.dumps(payload).encode()
    try:
        response = _opener().open(urllib.request.Request(url, body, headers), timeout=seconds)
    except urllib.error.HTTPError as error:  # an answer like any other
        response = error
    with response:
        return Answer(response.status, str(response.reason), response.headers, _read(response, url))


def _key_header() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise RunError(f"{API_KEY_VARIABLE} holds a character that no HTTP header can hold, e.g. a line break")
    return {"Authorization": f"Bearer {key}"}


def _read(response: Any, url: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := response.read(_PIECE):
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise RunError(f"{url} sends more than {MAX_BODY_BYTES >> 20} MiB; is build.engine the chat server's URL?")
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal() and len(declared) < 19 and size < int(declared):
        raise http.client.IncompleteRead(b"", int(declared) - size)
    return b"".join(parts)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_TimedHandler(ssl.create_default_context()), _NoRedirects)


class _TimedHandler(urllib.request.HTTPSHandler):
    """Opens connections of which the whole answer must come in time, not only each piece of it."""

    handler_order = 400  # before urllib's own handler of http

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__(context=tls)
        self._tls = tls

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection, request)  # type: ignore[arg-type]

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._secure_connection, request)  # type: ignore[arg-type]

    http_request = urllib.request.HTTPSHandler.https_request  # type: ignore[assignment]

    def _connection(self, host: str, timeout: float) -> http.client.HTTPConnection:
        return _timed(http.client.HTTPConnection(host, timeout=timeout), timeout)

    def _secure_connection(self, host: str, timeout: float) -> http.client.HTTPConnection:
        return _timed(http.client.HTTPSConnection(host, timeout=timeout, context=self._tls), timeout)


def _timed(connection: http.client.HTTPConnection, seconds: float) -> http.client.HTTPConnection:
    deadline = time.monotonic() + seconds

    def response(sock: socket.socket, *args: Any, **settings: Any) -> http.client.HTTPResponse:
        return http.client.HTTPResponse(_TimedSocket(sock, deadline), *args, **settings)  # type: ignore[arg-type]

    connection.response_class = response  # type: ignore[assignment]
    return connection


class _TimedSocket(io.RawIOBase):
    """Stands for a socket from which an answer is read, until ``deadline`` (``time.monotonic``)."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket = sock
        self._file = sock.makefile("rb", buffering=0)
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the prompts and the key would go to whatever host it names."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        where = visible(shorten(newurl.rpartition("@")[2].partition("?")[0], QUOTED))
        raise RunError(
            f"{req.full_url} redirects to {where}; no redirect is followed, as the prompts and the key would go there "
            "too: if that is the server, name it in build.engine"
        )
