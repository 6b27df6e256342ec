"""Encodes a PreferencePair as token ids and vision tensors, with the model's own processor and chat template."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmpo.data.encode.chat_template import ChatTemplate, Rendering, check_placeholders
from vlmpo.data.encode.continuations import readings
from vlmpo.data.encode.fast_processor import fast_processor
from vlmpo.data.encode.images import open_image
from vlmpo.data.encode.pixels import AS_BYTES, PixelScale, pixel_scale
from vlmpo.data.encode.processors import (
    Size,
    image_token_id,
    media_ids,
    own_tiles,
    reads_images,
    tile_notice,
    tile_settings,
    tokenizer_of,
)
from vlmpo.data.encode.prompt_cache import EncodedPrompt, PromptCache
from vlmpo.data.encode.response_tokens import response_tokenizer
from vlmpo.data.encode.videos import DEFAULT_FRAMES, with_frames
from vlmpo.data.records import IMAGE_PLACEHOLDER, PreferencePair, one_record
from vlmpo.errors import FileChangedError, RecipeError, RecordError

# The processor's tensors for the prompt's text; packed rows have others.
_TEXT_KEYS = ("input_ids", "attention_mask", "position_ids")
# Types of tokens, by which some families count positions (Qwen-VL) or attend (Gemma 3): which belong to an image.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """Holds a pair as the model reads it: ``prompt_ids`` followed by either response.

    Attributes:
        prompt_ids: ``[prompt]`` int64, the prompt with its image tokens expanded.
        chosen_ids: ``[chosen]`` int64, exactly the scored tokens: the response and its end-of-turn token.
        rejected_ids: ``[rejected]`` int64, likewise; None in supervised fine-tuning.
        vision: the processor's other tensors (InternVL: ``pixel_values [tiles, 3, height, width]``).
        source: name of the data set.
        origin: ``file:line`` of the record.
        tiles: pictures the vision tower reads: tiles and thumbnails, or images if the model does not tile.
        image_tokens: image tokens in the prompt.
        cut: whether a response's end was cut off, here or before; its end-of-turn token is then not scored.
        token_types: the processor's types of the prompt's tokens, ``[prompt]`` each; a response's tokens are of type 0.
        notices: what the encoder has noticed since the pair before, by kind, for whoever holds another copy of it.
    """

    prompt_ids: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor | None
    vision: dict[str, Tensor]
    source: str
    origin: str
    tiles: int
    image_tokens: int
    cut: bool
    token_types: dict[str, Tensor] = field(default_factory=dict)
    notices: dict[str, str] = field(default_factory=dict)

    @property
    def _response_lengths(self) -> list[int]:
        return [ids.numel() for ids in (self.chosen_ids, self.rejected_ids) if ids is not None]

    @property
    def num_tokens(self) -> int:
        """Return the tokens read if the prompt is read once."""
        return self.prompt_ids.numel() + sum(self._response_lengths)

    @property
    def length(self) -> int:
        """Return the tokens of the prompt and the longer response, which ``max_length`` bounds."""
        return self.prompt_ids.numel() + max(self._response_lengths)


class PairEncoder:
    """Encodes pairs for one model. Picklable, for a data loader's workers.

    Args:
        processor: the model's own processor with its chat template; for a text-only model, its tokenizer.
        max_length: most tokens of prompt and longer response together; None for no limit.
        over_long: ``drop`` refuses a longer pair; ``cut`` cuts the ends of its responses off, never the prompt's.
        max_tiles: tiles the images of a pair may take together, thumbnails not counted; a pair's own ``max_tiles`` may
            lower it. Each image may take its share, at least one. For a model that reads images whole, at their own
            shape (Qwen-VL), a tile means 448 x 448 pixels. Has no effect on other models: see ``notices``. None: a
            pair's own ``max_tiles``, or else what the processor allows one image (see :func:`own_tiles`).
        need_rejected: False for supervised fine-tuning: the rejected response is ignored.
        video_frames: most images that a video becomes.
        vocabulary: rows of the model's embedding: a record with a token beyond them is refused. None: not known.
        takes_images: False for a text-only model whose processor nevertheless reads images.

    Attributes:
        max_tiles: the bound in use, of pairs without one of their own.
        pixel_scale: turns bytes into the processor's pixels; None unless this encoder makes bytes (``for_loader``).
        media_ids: tokens that stand for an image, video or sound, or frame one; no response may hold them.
        control_ids: these, and the other tokens that no text may hold: see :mod:`vlmpo.data.encode.control_tokens`.
        opens_thought: whether the model answers within a thought that the chat template has opened.
        end_id: token with which the model ends its turn.

    Raises:
        ModelError: neither a processor nor a tokenizer, or one without a usable chat template.
        RecipeError: an unknown ``over_long``.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        over_long: Literal["drop", "cut"] = "drop",
        max_tiles: int | None = None,
        need_rejected: bool = True,
        video_frames: int = DEFAULT_FRAMES,
        vocabulary: int | None = None,
        takes_images: bool = True,
    ) -> None:
        self._tokenizer = tokenizer_of(processor)
        if over_long not in ("drop", "cut"):
            raise RecipeError(f"over_long must be drop or cut, not {over_long!r}")
        self.processor = processor
        self.max_length = max_length
        self.over_long = over_long
        self._given_tiles = max_tiles
        self.max_tiles = own_tiles(processor) if max_tiles is None else max_tiles
        self.need_rejected = need_rejected
        self.video_frames = video_frames
        self.vocabulary = vocabulary
        self.takes_images = takes_images and reads_images(processor)
        self._chat = ChatTemplate(processor)
        self.pixel_scale: PixelScale | None = None
        self.media_ids = media_ids(processor)
        self.control_ids = self._chat.control.ids
        self.opens_thought = self._chat.opens_thought
        self.end_id = self._ids(self._chat.end_of_turn)[-1]
        self._end_token = self._tokenizer.convert_ids_to_tokens(self.end_id)
        self._image_token_id = image_token_id(processor)
        self._tokenize_responses = response_tokenizer(self._tokenizer, self._chat.probe_prompt)
        self._prompt_cache = PromptCache()
        self._end_ids: dict[str, list[int]] = {}
        self._reported = set(self._chat.notices)  # whoever has a copy of this encoder knows them

    @property
    def notices(self) -> list[str]:
        """Return what the user should know about the chat template and the image processor, each remark once."""
        of_tiles = tile_notice(self.processor, self.max_tiles)
        return [*self._chat.notices.values(), *([of_tiles] if of_tiles else [])]

    def add_notices(self, notices: Mapping[str, str]) -> None:
        """Add the ``notices`` of pairs that a copy of this encoder has encoded in another process."""
        self._chat.add_notices(notices)

    def for_loader(self, grouped: bool = False) -> PairEncoder:
        """Return a faster encoder of the same pairs, for a data loader.

        Its processor does less work a call. If it can leave its last step out exactly, pixels are uint8, a quarter of
        the bytes, and ``pixel_scale.normalise`` takes that step on the device.

        Args:
            grouped: whether pairs of one prompt follow each other: then pictures in memory are read once for them.
        """
        encoder = copy.copy(self)
        encoder.pixel_scale = pixel_scale(self.processor)
        encoder.processor = fast_processor(self.processor)
        encoder._prompt_cache = PromptCache()
        encoder._prompt_cache.pictures = grouped
        encoder._reported = set(self._reported)
        return encoder

    def encode(self, pair: PreferencePair) -> EncodedPair:
        """Return the token ids and vision tensors of ``pair``.

        Raises:
            RecordError: the pair cannot be trained on; its ``reason`` is the name under which it is counted.
            DataError: the pair holds a video, and the library that reads videos is not installed.
        """
        with one_record(pair.origin, "encoding"):
            return self._encode(pair)

    def _encode(self, pair: PreferencePair) -> EncodedPair:
        if pair.videos:
            pair = with_frames(pair, self.video_frames)
        responses = self._check_texts(pair)
        scored = readings(pair, self.opens_thought)[: len(responses)]
        as_sampled, complete = zip(*scored, strict=True)
        # The half of a character at a cut is decoded as U+FFFD, whose tokens the model did not write.
        responses = [
            text if reading.complete else text.rstrip("\ufffd") for text, reading in zip(responses, scored, strict=True)
        ]
        rendering = self._chat.render(pair.prompt, responses, pair.origin, as_sampled)
        response_ids = self._response_ids(rendering, complete, pair.origin)
        key = self._prompt_cache.key(rendering.prompt, pair.images, self.tiles_of(pair))
        prompt = self._prompt_cache.find(key)
        if prompt is None:
            prompt = self._encode_prompt(rendering.prompt, pair)
            self._prompt_cache.add(key, prompt)
        prompt_length, longest = prompt.prompt_ids.numel(), max(len(ids) for ids in response_ids)
        room = longest if self.max_length is None else self.max_length - prompt_length
        if longest > room:
            if self.over_long == "drop" or room < 1:
                remedy = "raise max_length or lower max_tiles" + ("" if room < 1 else ", or set over_long to cut")
                total = f"{prompt_length} + {longest} = {prompt_length + longest} tokens of {self.max_length}"
                raise RecordError("over_long", pair.origin, f"prompt and response take {total}; {remedy}")
            response_ids = [ids[:room] for ids in response_ids]
        if len(response_ids) == 2 and response_ids[0] == response_ids[1]:
            detail = "chosen and rejected are the same tokens: no preference to learn"
            raise RecordError("identical", pair.origin, detail)
        chosen, *rejected = [torch.from_numpy(np.array(ids, dtype=np.int64)) for ids in response_ids]  # 3x torch.tensor
        return EncodedPair(
            chosen_ids=chosen,
            rejected_ids=rejected[0] if rejected else None,
            source=pair.source,
            origin=pair.origin,
            cut=longest > room or not all(complete),
            notices=self._new_notices(),
            **prompt._asdict(),
        )

    def _new_notices(self) -> dict[str, str]:
        """Return the remarks on the chat template that no pair has carried yet."""
        new = {kind: remark for kind, remark in self._chat.notices.items() if kind not in self._reported}
        self._reported.update(new)
        return new

    def _check_texts(self, pair: PreferencePair) -> list[str]:
        """Return the responses to score, the chosen one first; raise RecordError if the pair's texts are unfit."""
        responses = {"chosen": pair.chosen} | ({"rejected": pair.rejected} if self.need_rejected else {})
        for name, text in responses.items():
            if text is None or not text.strip():
                raise RecordError("empty_response", pair.origin, f"`{name}` is empty: there is nothing to score")
        if pair.images and not self.takes_images:
            who = "the model" if reads_images(self.processor) else type(self.processor).__name__
            detail = (
                f"the record has images, and {who} reads none; take it out, "
                "or train a vision-language model, with its own processor"
            )
            raise RecordError("images_unsupported", pair.origin, detail)
        check_placeholders(pair.prompt, IMAGE_PLACEHOLDER, pair.images, pair.origin)
        for message in pair.prompt:
            words = message.text.replace(IMAGE_PLACEHOLDER, "\n")  # the model's own image token may be written so too
            self._refuse_control("the prompt's text", words, pair.origin)
        for name, text in responses.items():
            self._refuse_control(f"`{name}`", text or "", pair.origin)
        return [text for text in responses.values() if text is not None]

    def _refuse_control(self, where: str, text: str, origin: str) -> None:
        """Raise RecordError ``control_token_in_text`` if ``text`` holds a control token of the model."""
        token = self._chat.control.find(text)
        if token is None:
            return
        if token in self._chat.control.media:
            what = "which to the model is an image or a video, or frames one; take it out"
        elif token == self._end_token:
            what = "with which the model ends its turn; it is added here: take it out"
        else:
            what = "a control token of the model; give plain texts, the chat template is applied here: take it out"
        raise RecordError("control_token_in_text", origin, f"{where} holds {token}, {what}")

    def _response_ids(self, rendering: Rendering, complete: Sequence[bool], origin: str) -> list[list[int]]:
        """Return the scored ids of each response, those that are complete with the end of the turn.

        Raises:
            RecordError: a response cannot be scored.
        """
        end = rendering.end_of_turn
        if end not in self._end_ids:
            self._end_ids[end] = self._ids(end)
        ends = [end if is_complete else "" for is_complete in complete]
        texts = [response + end for response, end in zip(rendering.responses, ends, strict=True)]
        all_ids = self._continue(rendering.prompt, texts)
        for ids, is_complete in zip(all_ids, complete, strict=True):
            if ids == (self._end_ids[end] if is_complete else []):
                detail = "a response becomes no token at all: there is nothing to score"
                raise RecordError("empty_response", origin, detail)
            # Found in the text as a rule; not if the tokenizer changes the text first, or ends turns with a word.
            within, ending = ids[:-1] if is_complete else ids, self._end_ids[end][-1]
            if ending in within or not self.media_ids.isdisjoint(within):
                token_id = next(i for i in within if i == ending or i in self.media_ids)
                token = self._tokenizer.convert_ids_to_tokens(token_id)
                detail = f"a response holds {token}, which ends a turn or stands for an image; take it out"
                raise RecordError("control_token_in_text", origin, detail)
            self._check_vocabulary(max(ids), "a response", origin)
        return all_ids

    def ids_after_prompt(self, text: str) -> list[int]:
        """Return the ids of ``text`` as the beginning of the model's turn, after a prompt like any other."""
        return self._continue(self._chat.probe_prompt, [text])[0]

    def _continue(self, prompt: str, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as it continues the rendered ``prompt``."""
        continued = self._tokenize_responses(prompt, texts, self._adds_special_tokens(prompt))
        # If a token would span the two, the text is read alone: generation starts from the prompt's own tokens.
        return [self._ids(text) if ids is None else ids for ids, text in zip(continued, texts, strict=True)]

    def _check_vocabulary(self, largest: int, where: str, origin: str) -> None:
        """Raise RecordError if the model's embedding has no row for the token ``largest``."""
        if self.vocabulary is not None and largest >= self.vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            detail = (
                f"{where} holds {token!r}, token {largest} of the tokenizer, and the model's embedding has only "
                f"{self.vocabulary} rows; take it out, or use the model's own tokenizer"
            )
            raise RecordError("token_beyond_vocabulary", origin, detail)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]

    def _adds_special_tokens(self, prompt: str) -> bool:
        """Return whether the tokenizer is to add its start token, by the rule of transformers.

        Inside a processor it is to, unless the template wrote the token already; alone it is not, as the template has
        written everything.
        """
        bos = self._tokenizer.bos_token
        return reads_images(self.processor) and (bos is None or not prompt.startswith(bos))

    def tiles_of(self, pair: PreferencePair) -> int:
        """Return the tiles that the images of ``pair`` may take together."""
        if pair.max_tiles is None:
            return self.max_tiles
        return pair.max_tiles if self._given_tiles is None else min(self._given_tiles, pair.max_tiles)

    def tiles_key(self, sets: Iterable[int | None]) -> int | str:
        """Return what decides :meth:`tiles_of`, for keys of caches, if the pairs' own numbers are among ``sets``."""
        raised = self._given_tiles is None and any(number is not None and number > self.max_tiles for number in sets)
        return f"{self.max_tiles}, or a set's own" if raised else self.max_tiles

    def _encode_prompt(self, prompt: str, pair: PreferencePair) -> EncodedPrompt:
        """Open the images of ``pair`` and put them and the rendered ``prompt`` through the processor."""
        text_kwargs = {"add_special_tokens": self._adds_special_tokens(prompt), "truncation": False, "padding": False}
        images = [open_image(image, pair.origin) for image in pair.images]
        sizes = [Size(image.height, image.width) for image in images]
        images_kwargs = tile_settings(self.processor, self.tiles_of(pair), sizes)
        if self.pixel_scale is not None:
            images_kwargs |= AS_BYTES
        try:
            if reads_images(self.processor):
                encoded = self.processor(
                    text=[prompt],
                    images=[images] if images else None,
                    text_kwargs=text_kwargs,
                    images_kwargs=images_kwargs,
                    return_tensors="pt",
                )
            else:
                encoded = self._tokenizer([prompt], return_tensors="pt", **text_kwargs)
            vision = _tensors(encoded)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise RecordError("processor_refused", pair.origin, f"the model's processor refuses it: {error}") from error
        token_types = {key: vision.pop(key)[0] for key in _TOKEN_TYPES if key in vision}
        if self.pixel_scale is not None:
            vision = self.pixel_scale.pack(vision)
        prompt_ids = encoded["input_ids"][0]
        in_image = prompt_ids == (-1 if self._image_token_id is None else self._image_token_id)
        # The image tokens themselves are checked once for all records, with the model (see vlmpo.models.fit).
        self._check_vocabulary(int(prompt_ids.masked_fill(in_image, 0).max()), "the prompt", pair.origin)
        image_tokens = int(in_image.sum())
        if images and image_tokens == 0 and self._image_token_id is not None:
            detail = "the chat template writes none of its images; give the processor a chat template that keeps them"
            raise RecordError("template_lost_prompt", pair.origin, detail)
        if image_tokens == 1 and getattr(self.processor, "spatial_merge_size", 1) > 1:
            # transformers 5.23 squeezes the dimension of tokens away in Mistral 3, and then fails.
            detail = "its image is so small that it becomes a single token, which this model cannot read; enlarge it"
            raise RecordError("image_too_small", pair.origin, detail)
        return EncodedPrompt(prompt_ids, vision, token_types, self._count_tiles(vision, len(images)), image_tokens)

    def _count_tiles(self, vision: dict[str, Tensor], images: int) -> int:
        """Return the pictures in ``pixel_values``, padding not counted."""
        pixels = vision.get("pixel_values")
        if pixels is None or pixels.dim() < 4:  # the Qwen-VL families: patches of all images in one list
            return images
        if pixels.dim() == 4:
            return pixels.shape[0]
        if self.pixel_scale is not None:
            return self.pixel_scale.num_pictures(vision)
        # [images or prompts, pictures, 3, height, width]; zeros fill up rows of fewer pictures.
        return int(pixels[:, :, 0].flatten(2).any(dim=-1).sum())


class Unusable(NamedTuple):
    """Holds why a record cannot be trained on, and the name of its data set."""

    error: RecordError
    source: str


class EncodedPairs(Dataset[Any]):
    """Encodes pairs on access, in the loader's workers, and returns a bad record as :class:`Unusable`."""

    def __init__(self, pairs: Any, encoder: PairEncoder) -> None:
        self.pairs = pairs
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> EncodedPair | Unusable:
        source_of = getattr(self.pairs, "source", None)  # of data sets that need not read the record for it
        source = source_of(index) if callable(source_of) else ""
        try:
            pair: PreferencePair = self.pairs[index]
            source = pair.source
            return self.encoder.encode(pair)
        except RecordError as error:
            return Unusable(error, source)
        except FileChangedError as error:  # counted, so that the run knows how much it loses
            origin_of = getattr(self.pairs, "origin", None)
            origin = origin_of(index) if callable(origin_of) else ""
            return Unusable(RecordError("file_changed", origin, str(error)), source)


def _tensors(encoded: Any) -> dict[str, Tensor]:
    """Return the processor's tensors except for the text's own; metadata, which no model reads, is left out.

    Raises:
        ValueError: pixels that make no tensor.
    """
    tensors = {}
    for key, value in encoded.items():
        if key in _TEXT_KEYS:
            continue
        try:
            tensors[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            if key.startswith("pixel"):
                raise ValueError(f"its {key} make no tensor: {error}") from error
    return tensors
