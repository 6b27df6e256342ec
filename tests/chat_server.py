"""A chat server on loopback whose answers a test writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with a request: answer, or hang up without a word (status 0)."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


HANG_UP = Reply(None, 0)


def says(text: str | None, finish_reason: str = "stop", **message: Any) -> Reply:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return Reply({"object": "chat.completion", "choices": [choice]})


@dataclass
class Seen:
    """A request as the server got it."""

    path: str
    payload: dict[str, Any]
    headers: dict[str, str]


@dataclass
class ChatServer:
    """Its address, and the requests it got."""

    url: str
    seen: list[Seen]


@contextmanager
def chat_server(answer: Callable[[Seen, int], Reply]) -> Iterator[ChatServer]:
    """Serve ``answer(request, number of the request, from 0)``."""
    seen: list[Seen] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            request = Seen(self.path, json.loads(self.rfile.read(length) or b"{}"), dict(self.headers))
            with lock:
                number = len(seen)
                seen.append(request)
            reply = answer(request, number)
            if reply.status == 0:
                return
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = handle_any  # noqa: N815 - the names http.server calls

        def log_message(self, *_: Any) -> None:
            """Silence on stderr."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Silence about a client that hangs up."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield ChatServer(f"http://127.0.0.1:{server.server_port}", seen)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
