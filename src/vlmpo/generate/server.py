"""Generates through an OpenAI-compatible chat server: vLLM, SGLang, LMDeploy, ``transformers serve``."""

from __future__ import annotations

import base64
import http.client
import io
import random
import reprlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vlmpo.data.encode.chat_template import check_placeholders, content_of
from vlmpo.data.encode.images import open_image
from vlmpo.data.encode.videos import DEFAULT_FRAMES, with_frames
from vlmpo.data.records import IMAGE_PLACEHOLDER, PreferencePair, check_length, json_kind
from vlmpo.errors import RecipeError, RecordError, RunError, shorten
from vlmpo.generate.base import Generated, GenerationRequest, Result, Sampling
from vlmpo.generate.http_client import QUOTED, Answer, exchange, visible
from vlmpo.hashing import content_hash
from vlmpo.settings import API_KEY_VARIABLE, check_server_url

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0  # seconds between tries
_MAX_NAME = 500  # characters of a model's name, which every response is stored with
_RETRIED = {408, 409, 425, 429}  # and all of 500 and above
# Statuses that concern this one request, e.g. because it is longer than the server's context.
_REFUSED = {400, 413, 422}


class _TransientError(Exception):
    """Raised for a failure that may pass: try again, after ``wait`` seconds if the server gave a time."""

    def __init__(self, cause: str, wait: float | None = None) -> None:
        super().__init__(cause)
        self.wait = wait


class _RefusalError(Exception):
    """Raised if the server refuses this one request."""


class ServerEngine:
    """Generates through a chat server's ``/v1/chat/completions``.

    Every sample is a request with a seed of its own: not every server supports ``n``, and one long response holds
    nothing else up. The server tokenises prompts and tiles images; images are sent as PNG data URLs, upright and in
    RGB as in training. A key in the environment variable VLMPO_API_KEY is sent along.

    ``prefix`` of a request needs a server that supports ``continue_final_message`` (vLLM, SGLang), and is refused in a
    turn with a thought: the server puts it through its chat template, which would not leave it as it was sampled. A
    server that returns the reasoning apart from the response is refused too: what the model wrote around it, and
    whether the prompt opened it, cannot be told. Special tokens of a response (of thoughts, tools, grounding) are asked
    for by ``skip_special_tokens``; of a server that does not take it, a notice says that they may be missing.

    A server is not trusted: its answers are bounded in size and time, no redirect is followed, and a response that is
    not a text is dropped.

    Args:
        url: of the server, with or without ``/v1``.
        model: name of the model at the server; None: the only one it has.
        sampling: how tokens are drawn.
        concurrency: number of samples under way at a time.
        timeout: seconds after which a try has failed, unless the whole answer is there.
        retries: further tries after a connection error, a time-out, status 408, 409, 425, 429 or 5xx, with delays of
            about 1, 2, 4, ... seconds, at most 60, or of about the server's Retry-After.
        video_frames: most images that a video becomes.

    Raises:
        RecipeError: ``url`` is none, or holds a name and password.
        RunError: ``model`` is None, and the server cannot be reached or does not have exactly one.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        sampling: Sampling,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        *,
        video_frames: int = DEFAULT_FRAMES,
    ) -> None:
        try:
            check_server_url(url)
        except ValueError as error:
            raise RecipeError(f"build.engine: {error}") from None
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._sampling = sampling
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._video_frames = video_frames
        self.batch_size = 1
        self.notices: list[str] = []
        self._extra: dict[str, Any] = {"skip_special_tokens": False}
        self.name = model or self._only_model()

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Result]:
        """Yield the responses to each request, or its error, in order.

        At most about twice ``concurrency`` samples are under way or wait for those of an earlier request.

        Raises:
            RunError: no response after all tries, one that is not a chat completion, or a status that concerns every
                request.
        """
        pool = ThreadPoolExecutor(self._concurrency)
        stop = threading.Event()
        waiting: deque[tuple[int, list[Future[Generated]] | RecordError]] = deque()
        try:
            for request in requests:
                waiting.append((request.n, self._submit(pool, request, stop)))
                while sum(n for n, _ in waiting) > max(2 * self._concurrency, request.n):
                    yield _collect(waiting.popleft()[1])
            for _, samples in waiting:
                yield _collect(samples)
        finally:
            stop.set()  # threads that wait for their next try give up
            pool.shutdown(wait=False, cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, request: GenerationRequest, stop: threading.Event
    ) -> list[Future[Generated]] | RecordError:
        try:
            messages = _messages(request, self._video_frames)
        except RecordError as error:
            return error
        if request.prefix and request.in_thinking:
            detail = (
                "a turn with a thought cannot be continued by a chat server, whose template would change it; "
                "use the local engine (build.engine: local)"
            )
            return RecordError("thought_on_server", request.origin, detail)
        payload = {
            "model": self.name,
            "messages": messages,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "max_tokens": self._sampling.max_new_tokens,
        }
        if request.prefix:
            messages.append({"role": "assistant", "content": request.prefix})
            payload |= {"continue_final_message": True, "add_generation_prompt": False}
        # Of 31 bits: no server refuses them.
        seeds = [int(content_hash(f"{request.seed}:{index}", size=4), 16) >> 1 for index in range(request.n)]
        return [pool.submit(self._sample, {**payload, "seed": seed}, request.origin, stop) for seed in seeds]

    def _sample(self, payload: dict[str, Any], origin: str, stop: threading.Event) -> Generated:
        extra = self._extra
        try:
            reply = self._call("chat/completions", {**payload, **extra}, stop)
        except _RefusalError as refusal:
            if any(name in str(refusal) for name in extra):
                self._leave_out(extra)
                return self._sample(payload, origin, stop)
            detail = f"{self._base} refuses the request ({refusal}); shorten it or change the server's settings"
            raise RecordError("server_refused", origin, detail) from None
        try:
            choice = reply["choices"][0]
            message = choice["message"]
            text, reason = message.get("content"), choice.get("finish_reason") or "stop"
        except (TypeError, KeyError, IndexError, AttributeError):
            said = visible(shorten(reprlib.repr(reply), QUOTED))
            raise RunError(f"{self._base} is not an OpenAI-compatible chat server: it answered {said}") from None
        if message.get("reasoning_content") or message.get("reasoning"):
            raise RunError(
                f"{self._base} returns the reasoning apart from the response, and what the model wrote between them "
                "cannot be told; start the server without a reasoning parser"
            )
        for name, value in {"content": text, "finish_reason": reason}.items():
            if not isinstance(value, str):
                detail = f"the `{name}` of a response of {self._base} is {json_kind(value)}, not a text"
                raise RecordError("bad_response", origin, detail)
        check_length(len(text), f"a response of {self._base}", origin)
        return Generated(text, reason)

    def _leave_out(self, extra: dict[str, Any]) -> None:
        """Ask no more for what the server does not know, and say once what that means."""
        if self._extra is extra:
            self._extra = {}
            self.notices.append(
                f"{self._base} takes no {', '.join(extra)}: special tokens of its responses (of thoughts, tools, "
                "grounding) may be missing"
            )

    def _only_model(self) -> str:
        try:
            names = [entry["id"] for entry in self._call("models", None, threading.Event())["data"]]
        except (TypeError, KeyError, _RefusalError):
            names = []
        names = [name for name in names if isinstance(name, str) and 0 < len(name) <= _MAX_NAME]
        if len(names) != 1:
            have = f"it has {visible(shorten(', '.join(names[:8]), QUOTED))}" if names else "it names none"
            raise RunError(f"which model of {self._base}? {have}; set build.model")
        return names[0]

    def _call(self, path: str, payload: dict[str, Any] | None, stop: threading.Event) -> Any:
        """Return the server's reply; after a transient failure try again, unless ``stop`` is set."""
        failure = _TransientError("stopped")
        for attempt in range(self._retries + 1):
            if attempt and stop.wait(_delay(attempt, failure.wait)):
                break
            try:
                return self._try(f"{self._base}/{path}", payload)
            except _TransientError as error:
                failure = error
        raise RunError(
            f"no answer from {self._base} in {self._retries + 1} tries (the last: {failure}); "
            "check the server, then start again: what is done is kept"
        )

    def _try(self, url: str, payload: dict[str, Any] | None) -> Any:
        try:
            answer = exchange(url, payload, self._timeout)
        except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, timed out
            raise _TransientError(visible(str(error)[:QUOTED]) or type(error).__name__) from None
        if not 200 <= answer.status < 300:
            raise _status_error(url, answer)
        try:
            return answer.json()
        except ValueError as error:
            cause = visible(str(error)[:QUOTED]) if answer.body.strip() else "its answer is empty"
            raise RunError(f"{url} does not answer in JSON ({cause}); is build.engine the chat server's URL?") from None


def _collect(samples: list[Future[Generated]] | RecordError) -> Result:
    """Wait for all samples of a request and return them, or the request's error."""
    if isinstance(samples, RecordError):
        return samples
    try:
        return [sample.result() for sample in samples]
    except RecordError as error:
        return error


def _messages(request: GenerationRequest, video_frames: int) -> list[dict[str, Any]]:
    """Return the turns in the server's form, each image and frame at the place of its placeholder."""
    check_placeholders(request.messages, IMAGE_PLACEHOLDER, request.images, request.origin)
    prompt, shown = request.messages, request.images
    if request.videos:
        pair = PreferencePair(prompt, shown, "", None, origin=request.origin, videos=request.videos)
        pair = with_frames(pair, video_frames)
        prompt, shown = pair.prompt, pair.images
    images = iter(shown)
    turns: list[dict[str, Any]] = []
    for message in prompt:
        content: Any = message.text
        if IMAGE_PLACEHOLDER in message.text:
            content = [
                _image_item(next(images), request.origin) if item["type"] == "image" else item
                for item in content_of(message.text)
            ]
        turns.append({"role": message.role, "content": content})
    return turns


def _image_item(source: Any, origin: str) -> dict[str, Any]:
    png = io.BytesIO()
    open_image(source, origin).save(png, "PNG", compress_level=1)  # lossless, and quick rather than small
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _delay(attempt: int, wait: float | None) -> float:
    """Return the seconds before try ``attempt`` (from 1): doubling, or about ``wait`` if the server gave a time.

    Spread at random, so that the threads do not all try again at once.
    """
    if wait is not None:
        return min(wait, _LONGEST_DELAY) * random.uniform(1.0, 1.2)
    return min(_FIRST_DELAY * 2 ** (attempt - 1), _LONGEST_DELAY) * random.uniform(0.75, 1.25)


def _status_error(url: str, answer: Answer) -> Exception:
    cause = f"status {answer.status}: {answer.quoted()}"
    if answer.status in _RETRIED or answer.status >= 500:
        after = answer.headers.get("Retry-After", "")
        return _TransientError(cause, float(after) if after.isdecimal() else None)
    if answer.status in _REFUSED:
        return _RefusalError(cause)
    hints = {401: API_KEY_VARIABLE, 403: API_KEY_VARIABLE, 404: "build.engine and build.model"}
    return RunError(f"{url}: {cause}; check {hints.get(answer.status, 'build.engine')}")
