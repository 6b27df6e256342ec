"""Who generates: the model itself through transformers, here; or a chat server, in ``vlmpo.generate.server``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlmpo.data.encode.chat_template import PROBE
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.processors import reads_images, tokenizer_of
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.families import family_of
from vlmpo.tree.forward import accepted


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how many responses it shall get.

    Attributes:
        messages: the turns so far, ``<image>`` where an image stands.
        images: one source an image: a path, encoded bytes, or a PIL image.
        n: number of responses.
        seed: from 0. Response ``i`` depends on it and on ``i``, not on what else is asked.
        prefix: beginning of the model's turn, which it continues; the texts returned are without it.
        origin: ``file:line`` it comes from, for messages.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...]
    n: int
    seed: int
    prefix: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Generated:
    """One response: its text without the end of the turn; ``stop`` where the model ended it, ``length`` where cut."""

    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from the model's distribution; nothing else is done to it.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: of the most likely tokens, the fewest that hold this much probability together.
        max_new_tokens: tokens a response may have, end of turn included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024


OnBad = Callable[[GenerationRequest, RecordError], None]


class Engine(Protocol):
    """Answers requests.

    Attributes:
        name: who answers, for the records.
        batch_size: requests it reads together; to get the very same responses again, ask in the same groups.
        notices: what the user should know, each said once.
    """

    name: str
    batch_size: int

    @property
    def notices(self) -> list[str]: ...

    def generate(self, requests: Sequence[GenerationRequest], on_bad: OnBad | None = None) -> Iterator[list[Generated]]:
        """The responses to each request, in order, as they come.

        A request that cannot be asked (an image that cannot be read, ...) raises its RecordError; with ``on_bad`` it
        is reported there instead and gets an empty list.
        """
        ...


class LocalEngine:
    """Generates with a model in this process.

    Prompts become tokens as in training (:class:`vlmpo.data.encode.encoder.PairEncoder`). Tokens that stand for images
    cannot be drawn. The model's own generation settings, a repetition penalty for example, are not used, except for the
    tokens that end a turn.

    Responses are drawn with random numbers of their own, so neither the other requests nor the global seed change
    them. What remains is rounding: in a batch of another shape logits differ in their last bits, which now and then
    turns a near tie. The same requests in the same batches give the same responses on the same machine.

    Args:
        model: the model, on the device it shall run on; may have vlmpo's attention installed.
        processor: its processor, or tokenizer.
        sampling: how tokens are drawn.
        batch_size: requests, each with all its samples, that are read together.
        max_tiles: tiles the images of a prompt may take together.
        name: who answers, for the records.

    Raises:
        ModelError: no usable chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sampling: Sampling,
        batch_size: int = 8,
        *,
        max_tiles: int = 12,
        name: str = "local",
    ) -> None:
        self.name = name
        self._encoder = PairEncoder(processor, max_tiles=max_tiles, need_rejected=False)
        # A LoRA wrapper generates through the model it wraps, whose layers hold the adapter.
        self._model = unwrap_peft(model)
        self._tokenizer = tokenizer_of(processor)
        self._sampling = sampling
        # Text-only models have no images to mix up. Any other family without the mark gets one prompt a call, its
        # inputs repeated for every sample.
        batches_images = family_of(self._model.config).batches_images
        self._encodes_once = batches_images or not reads_images(processor)
        self.batch_size = batch_size if self._encodes_once else 1

    @property
    def notices(self) -> list[str]:
        """Remarks on the chat template."""
        return self._encoder.notices

    def generate(self, requests: Sequence[GenerationRequest], on_bad: OnBad | None = None) -> Iterator[list[Generated]]:
        """The responses to each request, in order, a batch at a time. See :class:`Engine`."""
        for start in range(0, len(requests), self.batch_size):
            yield from self._batch(requests[start : start + self.batch_size], on_bad)

    def _batch(self, requests: Sequence[GenerationRequest], on_bad: OnBad | None) -> list[list[Generated]]:
        answers: list[list[Generated]] = [[] for _ in requests]
        groups: dict[int, list[tuple[int, EncodedPair]]] = {}  # by samples: generate() takes one number for all
        for position, request in enumerate(requests):
            try:
                encoded = self._encode(request)
                groups.setdefault(request.n, []).append((position, encoded))
            except RecordError as error:
                if on_bad is None:
                    raise
                on_bad(request, error)
        for members in groups.values():
            asked = [requests[position] for position, _ in members]
            for (position, _), texts in zip(members, self._ask(asked, [e for _, e in members]), strict=True):
                answers[position] = texts
        return answers

    def _encode(self, request: GenerationRequest) -> EncodedPair:
        """The prompt as a pair's prompt is encoded; its one response only shows which token ends a turn."""
        pair = PreferencePair(request.messages, request.images, chosen=PROBE, rejected=None, origin=request.origin)
        return self._encoder.encode(pair)

    def _ask(self, requests: list[GenerationRequest], encoded: list[EncodedPair]) -> Iterator[list[Generated]]:
        samples = requests[0].n if self._sampling.temperature > 0 else 1  # greedy answers are all the same
        prefixes = [self._tokenizer(r.prefix, add_special_tokens=False)["input_ids"] for r in requests]
        prompts = [torch.cat([e.prompt_ids, torch.tensor(p).long()]) for e, p in zip(encoded, prefixes, strict=True)]
        copies = 1 if self._encodes_once else samples
        ends = self._end_ids(encoded[0])
        config = self._config(ends, samples // copies)
        with torch.no_grad(), _set_to_generate(self._model, config):
            inputs = self._inputs(
                [p for p in prompts for _ in range(copies)], [e for e in encoded for _ in range(copies)]
            )
            draw = LogitsProcessorList()
            if self._sampling.temperature > 0:
                seeds = [(request.seed, index) for request in requests for index in range(samples)]
                draw.append(_Draw(self._sampling, seeds, inputs["input_ids"].shape[1]))
            output = self._model.generate(**inputs, logits_processor=draw)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()  # [prompts * samples, new tokens]
        for index, (request, prefix) in enumerate(zip(requests, prefixes, strict=True)):
            rows = new[index * samples : (index + 1) * samples]
            answers = [self._read(row, prefix, ends) for row in rows]
            yield answers * (request.n // samples)

    def _end_ids(self, encoded: EncodedPair) -> list[int]:
        """What the model's own settings end a turn with, and what ends a scored response."""
        named = self._model.generation_config.eos_token_id
        ids = {int(encoded.chosen_ids[-1]), *([named] if isinstance(named, int) else named or [])}
        return sorted(ids)

    def _config(self, ends: list[int], returned: int) -> GenerationConfig:
        pad, samples = self._tokenizer.pad_token_id, self._sampling.temperature > 0
        return GenerationConfig(
            do_sample=samples,
            top_k=0 if samples else None,
            max_new_tokens=self._sampling.max_new_tokens,
            num_return_sequences=returned,
            eos_token_id=ends,
            pad_token_id=ends[0] if pad is None else pad,
            suppress_tokens=sorted(self._encoder.media_ids) or None,
        )

    def _inputs(self, prompts: list[Tensor], encoded: list[EncodedPair]) -> dict[str, Tensor]:
        """The prompts side by side, padded on the left: ``input_ids [prompts, tokens]``, and their vision tensors."""
        length = max(prompt.numel() for prompt in prompts)
        ids = torch.full((len(prompts), length), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - prompt.numel() :] = prompt
            mask[row, length - prompt.numel() :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        for name in dict.fromkeys(name for e in encoded for name in accepted(self._model, e.token_types)):
            inputs[name] = torch.zeros_like(ids)
            for row, (prompt, e) in enumerate(zip(prompts, encoded, strict=True)):
                if name in e.token_types:  # of the prompt; a begun turn behind it is text, 0
                    start = length - prompt.numel()
                    inputs[name][row, start : start + e.prompt_ids.numel()] = e.token_types[name]
        for key in dict.fromkeys(key for e in encoded for key in e.vision):
            tensor = torch.cat([e.vision[key] for e in encoded if key in e.vision])
            inputs[key] = tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor
        return {key: tensor.to(self._model.device) for key, tensor in inputs.items()}

    def _read(self, new: list[int], prefix: list[int], ends: list[int]) -> Generated:
        end = next((at for at, token in enumerate(new) if token in ends), None)
        ids = new if end is None else new[:end]
        # Read with the prefix before it: on its own, many a tokenizer takes a text's first space away.
        head, whole = self._decode(prefix), self._decode(prefix + ids)
        text = whole.removeprefix(head) if whole.startswith(head) else self._decode(ids)
        return Generated(text, "length" if end is None else "stop")

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Draw(LogitsProcessor):
    """Leaves in each row only the token drawn there, so that what generate() then draws is settled.

    A row's uniform random numbers are made beforehand from its own seed; the token is where the number falls in the
    cumulated distribution. Another machine's generator, another batch or another row change nothing.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[tuple[int, int]], prompt_length: int) -> None:
        self._sampling = sampling
        self._prompt_length = prompt_length
        draws = [np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds]
        self._uniform = torch.from_numpy(np.stack(draws))  # [rows, max_new_tokens] in [0, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores [rows, vocabulary]`` to 0 at the drawn token and minus infinity elsewhere."""
        step = input_ids.shape[1] - self._prompt_length
        self._uniform = self._uniform.to(scores.device)
        token = draw_tokens(scores, self._uniform[:, step], self._sampling)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


def draw_tokens(scores: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token a row from softmax(scores / temperature), cut to ``top_p``, by inverting its cumulated distribution.

    Args:
        scores: ``[rows, vocabulary]``, logits.
        uniform: ``[rows]`` float64 in [0, 1): equal numbers draw equal tokens.
        sampling: temperature above 0, and top_p.

    Returns:
        ``[rows]`` int64.
    """
    probs = (scores.double() / sampling.temperature).softmax(dim=1)
    if sampling.top_p < 1:
        falling, order = probs.sort(dim=1, descending=True)
        outside = falling.cumsum(dim=1) - falling >= sampling.top_p
        probs = torch.zeros_like(probs).scatter_(1, order, falling.masked_fill(outside, 0.0))
    reached = probs.cumsum(dim=1)
    # The first token whose cumulated probability is above the number; never one of probability 0.
    return (reached > uniform[:, None] * reached[:, -1:]).int().argmax(dim=1)


@contextmanager
def _set_to_generate(model: Any, config: GenerationConfig) -> Iterator[None]:
    """``model`` without dropout and with ``config`` alone, which generate() would fill up from the model's own.

    What it was before is put back, and so is the state of the global random numbers: training goes on undisturbed.
    """
    own, training = model.generation_config, model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.generation_config = config
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        model.generation_config = own
        model.train(training)
