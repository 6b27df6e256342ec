"""Generates with a model in this process, through transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlmpo.data.encode.chat_template import PROBE
from vlmpo.data.encode.continuations import THOUGHT_CLOSE
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.processors import reads_images, tokenizer_of
from vlmpo.data.encode.videos import DEFAULT_FRAMES
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import RecordError
from vlmpo.generate.base import Generated, GenerationRequest, Result, Sampling
from vlmpo.models.adapters import unwrap_peft
from vlmpo.models.families import family_of
from vlmpo.models.fit import check_features, check_processor, limits_of
from vlmpo.models.mode import in_mode
from vlmpo.tree.forward import accepted


class LocalEngine:
    """Generates with a model in this process.

    Prompts and prefixes are tokenised as in training (:class:`vlmpo.data.encode.encoder.PairEncoder`). Image tokens are
    never drawn. The text of a response is all that was drawn, special tokens of thoughts, tools and grounding included,
    but without the model's control tokens, which no text to train on may hold. Of the model's generation settings only
    the tokens that end a turn are used, not, for example, its repetition penalty.

    Each response is drawn with random numbers of its own, so that neither the other requests nor the global seed
    change it. Only rounding remains: in a batch of another shape, logits differ in their last bits, which now and then
    decide a near tie. The same requests in the same batches give the same responses on the same machine.

    Args:
        model: the model, on its device; vlmpo's attention may be installed in it.
        processor: its processor, or tokenizer.
        sampling: how tokens are drawn.
        batch_size: requests, each with all its samples, that are processed together.
        max_tiles: tiles that the images of a prompt may take together; None: what the processor allows one image.
        video_frames: most images that a video becomes.
        name: the model's name, for the records.

    Raises:
        ModelError: there is no usable chat template, or the processor is another model's.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sampling: Sampling,
        batch_size: int = 8,
        *,
        max_tiles: int | None = None,
        video_frames: int = DEFAULT_FRAMES,
        name: str = "local",
    ) -> None:
        self.name = name
        self._encoder = PairEncoder(
            processor, max_tiles=max_tiles, need_rejected=False, video_frames=video_frames, **limits_of(model)
        )
        self._probe = check_processor(model, self._encoder)
        # A LoRA wrapper generates through the model it wraps, whose layers contain the adapter.
        self._model = unwrap_peft(model)
        self._tokenizer = tokenizer_of(processor)
        self._sampling = sampling
        # Whether a response that begins with a space is decoded without it.
        with_space, without = map(self._encoder.ids_after_prompt, (f" {PROBE}", PROBE))
        self._drops_space = with_space != without and self._decode(with_space) == self._decode(without)
        # Text-only models have no images to mix up. Any other family without the mark gets one prompt a call, its
        # inputs repeated for every sample.
        batches_images = family_of(self._model.config).batches_images
        self._encodes_once = batches_images or not reads_images(processor)
        self.batch_size = batch_size if self._encodes_once else 1

    @property
    def notices(self) -> list[str]:
        """Return remarks on the chat template."""
        return self._encoder.notices

    def takes_turns(self) -> bool:
        """Return whether the chat template renders a question that follows an earlier one and its answer."""
        turns = (Message("user", PROBE), Message("assistant", PROBE), Message("user", PROBE))
        try:
            self._encoder.encode(PreferencePair(turns, (), chosen=PROBE, rejected=None))
        except RecordError:
            return False
        return True

    def check_vision(self) -> None:
        """Read a probe image: raise ModelError if the processor's are not what the model's vision part reads."""
        check_features(self._model, self._encoder.processor, self._probe)

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Result]:
        """Yield the responses to each request, or its error, in order, a batch at a time."""
        for start in range(0, len(requests), self.batch_size):
            yield from self._batch(requests[start : start + self.batch_size])

    def _batch(self, requests: Sequence[GenerationRequest]) -> list[Result]:
        results: list[Result] = [[] for _ in requests]
        groups: dict[int, dict[int, EncodedPair]] = {}  # by number of samples: generate() takes one number for all
        for position, request in enumerate(requests):
            pair = PreferencePair(
                request.messages,
                request.images,
                chosen=request.prefix or PROBE,
                rejected=None,
                origin=request.origin,
                chosen_complete=False,
                as_sampled=True,
                videos=request.videos,
            )
            try:
                groups.setdefault(request.n, {})[position] = self._encoder.encode(pair)
            except RecordError as error:
                results[position] = error
        for group in groups.values():
            generated = self._generate([requests[position] for position in group], list(group.values()))
            for position, samples in zip(group, generated, strict=True):
                results[position] = samples
        return results

    def _generate(self, requests: list[GenerationRequest], encoded: list[EncodedPair]) -> Iterator[list[Generated]]:
        """Yield the responses to requests of equally many samples."""
        is_greedy = self._sampling.temperature == 0
        samples = 1 if is_greedy else requests[0].n  # greedy responses are all the same
        copies = 1 if self._encodes_once else samples
        prefixes = [e.chosen_ids.tolist() if r.prefix else [] for r, e in zip(requests, encoded, strict=True)]
        prompts = [torch.cat([e.prompt_ids, torch.tensor(p).long()]) for e, p in zip(encoded, prefixes, strict=True)]
        inputs = self._inputs([p for p in prompts for _ in range(copies)], [e for e in encoded for _ in range(copies)])
        length = inputs["input_ids"].shape[1]
        draw = LogitsProcessorList()
        if not is_greedy:
            seeds = [(request.seed, index) for request in requests for index in range(samples)]
            draw.append(_Draw(self._sampling, seeds, length))
        # A turn ends with one of the tokens in the model's settings, or as a scored response does.
        eos = self._model.generation_config.eos_token_id
        ends = sorted({self._encoder.end_id, *([eos] if isinstance(eos, int) else eos or [])})
        pad_id = self._tokenizer.pad_token_id
        config = GenerationConfig(
            do_sample=not is_greedy,
            top_k=None if is_greedy else 0,
            max_new_tokens=self._sampling.max_new_tokens,
            num_return_sequences=samples // copies,
            eos_token_id=ends,
            pad_token_id=ends[0] if pad_id is None else pad_id,
            suppress_tokens=sorted(self._encoder.media_ids) or None,
        )
        with torch.no_grad(), _set_to_generate(self._model, config):
            output = self._model.generate(**inputs, logits_processor=draw)
        new = output[:, length:].tolist()  # [requests * samples, new tokens]
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            rows = new[index * samples : (index + 1) * samples]
            before = prefixes[index] or (prompt[-1:].tolist() if self._drops_space else [])
            yield [self._read(row, before, request.prefix, ends) for row in rows] * (request.n // samples)

    def _inputs(self, prompts: list[Tensor], encoded: list[EncodedPair]) -> dict[str, Tensor]:
        """Pad the prompts on the left: ``input_ids [prompts, tokens]`` and the like, and their vision tensors."""
        pad_left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        inputs = {
            "input_ids": pad_left(prompts, padding_value=self._tokenizer.pad_token_id or 0),
            "attention_mask": pad_left([torch.ones_like(prompt) for prompt in prompts]),
        }
        for name in dict.fromkeys(name for e in encoded for name in accepted(self._model, e.token_types)):
            types = [e.token_types.get(name, e.prompt_ids.new_zeros(0)).long() for e in encoded]
            # The prefix after a prompt is text, of type 0.
            inputs[name] = pad_left(
                [pad(t, (0, len(prompt) - len(t))) for t, prompt in zip(types, prompts, strict=True)]
            )
        for key in dict.fromkeys(key for e in encoded for key in e.vision):
            tensor = torch.cat([e.vision[key] for e in encoded if key in e.vision])
            inputs[key] = tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor
        return {key: tensor.to(self._model.device) for key, tensor in inputs.items()}

    def _read(self, new: list[int], before: list[int], prefix: str, ends: list[int]) -> Generated:
        """Return the response of the tokens ``new``, which follow ``before``: the last tokens of prompt and prefix."""
        end = next((index for index, token in enumerate(new) if token in ends), None)
        ids = [token for token in new[:end] if token not in self._encoder.control_ids]
        # Decode together with what is before: many tokenizers drop the first space of a text decoded on its own.
        start, whole = self._decode(before), self._decode(before + ids)
        text = whole.removeprefix(start) if whole.startswith(start) else self._decode(ids)
        in_thought = self._encoder.opens_thought and THOUGHT_CLOSE not in prefix + text
        return Generated(text, "length" if end is None else "stop", in_thought)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class _Draw(LogitsProcessor):
    """Leaves in each row only the token drawn here, so that generate() can take no other.

    A row's uniform random numbers are made beforehand from its own seed; the token is where the number falls in the
    cumulative distribution. Neither the device's generator nor the other rows change it.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[tuple[int, int]], prompt_length: int) -> None:
        self._sampling = sampling
        self._prompt_length = prompt_length
        draws = [np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds]
        self._uniform = torch.from_numpy(np.stack(draws))  # [rows, max_new_tokens] in [0, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set ``scores [rows, vocabulary]`` to 0 at the drawn token and to minus infinity elsewhere."""
        step = input_ids.shape[1] - self._prompt_length
        self._uniform = self._uniform.to(scores.device)
        token = draw_tokens(scores, self._uniform[:, step], self._sampling)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


def draw_tokens(scores: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row from softmax(scores / temperature), cut to ``top_p``, by inverse transform sampling.

    Args:
        scores: ``[rows, vocabulary]``, logits.
        uniform: ``[rows]`` float64 in [0, 1): equal numbers draw equal tokens.
        sampling: temperature above 0, and top_p.

    Returns:
        ``[rows]`` int64.
    """
    probs = (scores.double() / sampling.temperature).softmax(dim=1)
    if sampling.top_p < 1:
        sorted_probs, order = probs.sort(dim=1, descending=True)
        outside = sorted_probs.cumsum(dim=1) - sorted_probs >= sampling.top_p
        probs = torch.zeros_like(probs).scatter_(1, order, sorted_probs.masked_fill(outside, 0.0))
    cumulative = probs.cumsum(dim=1)
    # The first token whose cumulative probability is above the number; never one of probability 0.
    return (cumulative > uniform[:, None] * cumulative[:, -1:]).int().argmax(dim=1)


@contextmanager
def _set_to_generate(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Turn dropout off and put ``config`` in place of the model's, from which generate() would complete it.

    Afterwards the model's settings and the state of the global random numbers are as before: training is undisturbed.
    """
    config_before = model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    model.generation_config = config
    try:
        with torch.random.fork_rng(devices), in_mode(model, training=False):
            yield
    finally:
        model.generation_config = config_before
