"""A server that means no good, or is none: each answer ends in one short message, nothing hangs, no secret leaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.chat_server import Reply, chat_server, says
from vlmpo.data.records import MAX_TEXT, Message
from vlmpo.errors import RecipeError, RecordError, RunError
from vlmpo.generate import http_client, server
from vlmpo.generate.base import Generated, GenerationRequest, Sampling
from vlmpo.generate.server import ServerEngine
from vlmpo.recipe_yaml import parse_recipe


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_FIRST_DELAY", 0.01)


def served(url: str, **settings: Any) -> ServerEngine:
    return ServerEngine(url, "m", Sampling(0.7, 0.9, 20), **{"timeout": 5.0, "retries": 0, **settings})


def ask(url: str, **settings: Any) -> Any:
    request = GenerationRequest((Message("user", "well?"),), (), n=1, seed=0, origin="q:1")
    (result,) = served(url, **settings).generate([request])
    return result


def fault_of(reply: Reply) -> str:
    """The one line that the user sees of a reply."""
    with chat_server(lambda *_: reply) as there, pytest.raises(RunError) as caught:
        ask(there.url)
    return str(caught.value)


@contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve connections that ``talk`` writes to as it likes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        while not connection.recv(1 << 16).endswith(b"}"):  # the end of the request
                            pass
                        talk(connection)
                    except OSError:  # the other side has had enough
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=5)


# ---- size and time ----


def drip(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(100):
            time.sleep(0.05)
            connection.sendall(piece)

    return talk


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
    ids=["status", "headers", "body", "chunks", "error"],
)
def test_an_answer_that_drips_is_given_up_in_time(head: bytes, piece: bytes) -> None:
    with raw_server(drip(head, piece)) as url:
        start = time.monotonic()
        with pytest.raises(RunError, match=r"in 1 tries \(the last: timed out\)"):
            ask(url, timeout=0.5)
        assert 0.4 < time.monotonic() - start < 1.5


@pytest.mark.parametrize("head", [b"", b"Content-Length: 1000000000\r\n", b"Content-Length: -1\r\n"])
def test_a_body_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(http_client, "MAX_BODY_BYTES", 1 << 20)

    def talk(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        for _ in range(1000):
            connection.sendall(b" " * (1 << 20))

    with raw_server(talk) as url, pytest.raises(RunError, match=r"sends more than 1 MiB; is build\.engine the chat"):
        ask(url)


@pytest.mark.parametrize("body", [b"", b'{"choices"', b"x" * 999])
def test_a_body_that_breaks_off_is_asked_for_again(body: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + body)

    with raw_server(talk) as url, pytest.raises(RunError, match=r"in 2 tries \(the last: IncompleteRead"):
        ask(url, retries=1)


@pytest.mark.parametrize(
    "start",
    [
        b"\x00\x01",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_named(start: bytes) -> None:
    with raw_server(lambda connection: connection.sendall(start)) as url, pytest.raises(RunError) as caught:
        ask(url)
    message = str(caught.value)
    assert message.startswith(f"no answer from {url}/v1 in 1 tries (the last: ")
    assert message.isprintable()
    assert len(message) < 400


# ---- what an answer holds ----


@pytest.mark.parametrize(
    ("content", "kind"),
    [(["a"], "a list"), (None, "null"), (7, "a number"), (True, "true or false"), ({}, "an object")],
)
def test_a_response_that_is_no_text_is_dropped(content: Any, kind: str) -> None:
    with chat_server(lambda *_: says(content)) as there:
        error = ask(there.url)
    assert isinstance(error, RecordError)
    assert (error.reason, error.origin) == ("bad_response", "q:1")
    assert error.detail == f"the `content` of a response of {there.url}/v1 is {kind}, not a text"


@pytest.mark.parametrize("reason", [["stop"], 1, {"a": 1}])
def test_a_finish_reason_that_is_no_text_is_dropped(reason: Any) -> None:
    with chat_server(lambda *_: says("yes", reason)) as there:
        assert "`finish_reason` of a response" in ask(there.url).detail


@pytest.mark.parametrize(("characters", "is_read"), [(MAX_TEXT, True), (MAX_TEXT + 1, False), (2 * MAX_TEXT, False)])
def test_a_response_is_as_long_as_a_text_may_be(characters: int, is_read: bool) -> None:
    with chat_server(lambda *_: says("x" * characters)) as there:
        result = ask(there.url)
    assert result == [Generated("x" * characters, "stop")] if is_read else result.reason == "too_large"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "(its answer is empty)"),
        (b" \n", "(its answer is empty)"),
        (b"[" * 100_000, "(it is nested too deep)"),
        (b'{"a":' * 100_000, "(it is nested too deep)"),
        (b'{"choices": NaN}', "(NaN is not JSON)"),
        (b'{"choices": [-Infinity]}', "(-Infinity is not JSON)"),
        (b'{"usage": ' + b"9" * 5000 + b"}", "(Exceeds the limit (4300 digits)"),
        (b"\xff\xfe\xff", "('utf-8' codec can't decode byte 0xff"),
        (b"<html>\x1b[31m", "(Expecting value: line 1 column 1 (char 0))"),
    ],
)
def test_a_body_that_is_no_json(body: bytes, words: str) -> None:
    message = fault_of(Reply(body, headers={"Content-Type": "text/html"}))
    assert "/v1/chat/completions does not answer in JSON " in message
    assert words in message
    assert message.isprintable()


@pytest.mark.parametrize(
    "body", [[], {"choices": []}, {"choices": [1]}, "x" * 10**6, {"error": "\x1b]0;x\x07" * 99}, 5]
)
def test_json_that_is_no_completion(body: Any) -> None:
    message = fault_of(Reply(body))
    assert "is not an OpenAI-compatible chat server: it answered" in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("status", [401, 418, 503])
@pytest.mark.parametrize("body", [b"x" * 10**7, b"\x1b[2J\x9b\x07" * 500, b"\xff\0" * 500])
def test_an_error_is_quoted_briefly(status: int, body: bytes) -> None:
    message = fault_of(Reply(body, status))
    assert f"status {status}: " in message
    assert message.isprintable()
    assert len(message) < 1100  # 200 characters, a control character may be shown by four or more


@pytest.mark.parametrize("models", [[5], [None], [["a"]], ["x" * 10**6], ["a\x1b", "b" * 499], [{}]])
def test_names_of_models(models: list[Any]) -> None:
    reply = Reply({"data": [{"id": name} for name in models]})
    with chat_server(lambda *_: reply) as there, pytest.raises(RunError, match="which model of") as caught:
        ServerEngine(there.url, None, Sampling(), retries=0)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# ---- secrets ----


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("VLMPO_API_KEY", "secret")
    with chat_server(lambda *_: says("stolen")) as other:
        for target in (other.url, other.url.replace("http://", "http://a:pass@"), f"{other.url}\x1b"):
            with chat_server(lambda *_, to=target: Reply("", status, {"Location": to})) as there:
                with pytest.raises(RunError, match="no redirect is followed, as the prompts and the key") as caught:
                    ask(there.url)
                with pytest.raises(RunError, match="no redirect is followed"):
                    ServerEngine(there.url, None, Sampling())
            assert "pass" not in str(caught.value)
            assert str(caught.value).isprintable()
    assert other.seen == []


SECRETS = ["http://user:hunter2@host/v1", "https://hunter2@host", "http://host/v1?key=hunter2", "http://host/#hunter2"]


@pytest.mark.parametrize("url", SECRETS)
def test_a_secret_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RecipeError) as given:
        served(url)
    with pytest.raises(RecipeError) as written:
        parse_recipe(json.dumps({"model": {"path": "m"}, "build": {"questions": "q.jsonl", "engine": url}}))
    for error in (given, written):
        assert "build.engine: the URL holds a " in str(error.value)
        assert "VLMPO_API_KEY" in str(error.value)
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["ftp://h", "http://", "http://h:99999", "http://h:x", "http://a b", "http://\u00e9", "h"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(RecipeError, match=r"build.engine: expected local or the http\(s\) URL"):
        served(url)


@pytest.mark.parametrize("key", ["sec\nret", "sec\x00ret", "secr\u20act"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(http_client.os, "environ", {"VLMPO_API_KEY": key})
    with chat_server(lambda *_: says("yes")) as there, pytest.raises(RunError) as caught:
        ask(there.url)
    assert str(caught.value) == "VLMPO_API_KEY holds a character that no HTTP header can hold, e.g. a line break"
    assert there.seen == []


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_key_that_the_server_repeats_is_not_shown(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("VLMPO_API_KEY", "sk-secret-1")
    with chat_server(lambda seen, _: Reply({"error": f"no {seen.headers['Authorization']}"}, status)) as there:
        try:
            said = str(ask(there.url))
        except RunError as error:
            said = str(error)
    assert "no Bearer ***" in said
    assert "sk-secret-1" not in said
