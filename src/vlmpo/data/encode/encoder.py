"""PreferencePair to token ids and vision tensors, through the model's own processor and chat template."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlmpo.data.encode.chat_template import PROBE, ChatTemplate, Rendering
from vlmpo.data.encode.fast_image_tokens import with_quick_runs
from vlmpo.data.encode.images import open_image
from vlmpo.data.encode.pixels import AS_BYTES, PixelScale, pixel_scale, reads_alike
from vlmpo.data.encode.processors import (
    image_token_id,
    media_ids,
    reads_images,
    tile_notice,
    tile_settings,
    tokenizer_of,
)
from vlmpo.data.encode.prompt_cache import EncodedPrompt, PromptCache
from vlmpo.data.encode.response_tokens import ReplyReader, quick_reader
from vlmpo.data.encode.settings_memory import with_kept_settings
from vlmpo.data.encode.videos import DEFAULT_FRAMES, with_frames
from vlmpo.data.records import IMAGE_PLACEHOLDER, Message, PreferencePair
from vlmpo.errors import RecipeError, RecordError

# What a processor says of the prompt's tokens; the row that a pair is laid out in has its own.
_TEXT_KEYS = ("input_ids", "attention_mask", "position_ids")
# Marks which tokens are an image's: some families count positions (Qwen-VL) or attend (Gemma 3) by it.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """A pair as the model reads it: ``prompt_ids`` followed by either response.

    Attributes:
        prompt_ids: ``[prompt]`` int64, the prompt, image tokens expanded.
        chosen_ids: ``[chosen]`` int64, exactly the scored tokens: the response and its end-of-turn token.
        rejected_ids: ``[rejected]`` int64, likewise; None in supervised fine-tuning.
        vision: what else the processor gave (InternVL: ``pixel_values [tiles, 3, height, width]``).
        token_types: what the processor says of each prompt token beside its id, ``[prompt]`` each; a response's are 0.
        source: name of the data set.
        origin: ``file:line`` of the record.
        tiles: pictures the vision tower reads: tiles and thumbnails, or images where the model does not tile.
        image_tokens: image tokens in the prompt.
        cut: whether a response's end was cut off; its end-of-turn token is then not scored.
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

    @property
    def _response_lengths(self) -> list[int]:
        return [ids.numel() for ids in (self.chosen_ids, self.rejected_ids) if ids is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens read when the prompt is read once."""
        return self.prompt_ids.numel() + sum(self._response_lengths)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longer response: what ``max_length`` bounds."""
        return self.prompt_ids.numel() + max(self._response_lengths)


class PairEncoder:
    """Encodes pairs for one model. Picklable, for a data loader's workers.

    Args:
        processor: the model's own processor, with its chat template; a text-only model's is its tokenizer.
        max_length: tokens of prompt and longer response together; None: no limit.
        over_long: ``drop`` refuses a longer pair; ``cut`` takes the ends of its responses off, never of the prompt.
        max_tiles: tiles the images of a pair may take together, thumbnails not counted; a pair's own ``max_tiles`` may
            lower it. Each image may take its share, at least one. Where a model reads images whole, at their own shape
            (Qwen-VL), a tile stands for 448 x 448 pixels. Without effect on others, which ``notices`` says.
        need_rejected: False for supervised fine-tuning: the rejected response is not looked at.
        video_frames: images a video becomes at most.

    Attributes:
        pixel_scale: makes bytes the processor's pixels, in an encoder ``for_loader``; None where pixels are its own.
        media_ids: tokens that to the model are an image, video or sound, or frame one; no response may hold them.

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
        max_tiles: int = 12,
        need_rejected: bool = True,
        video_frames: int = DEFAULT_FRAMES,
    ) -> None:
        self._tokenizer = tokenizer_of(processor)
        if over_long not in ("drop", "cut"):
            raise RecipeError(f"over_long must be drop or cut, not {over_long!r}")
        self.processor = processor
        self.max_length = max_length
        self.over_long = over_long
        self.max_tiles = max_tiles
        self.need_rejected = need_rejected
        self.video_frames = video_frames
        self._chat = ChatTemplate(processor)
        self._read_replies = ReplyReader(self._tokenizer)
        self._image_token_id = image_token_id(processor)
        self.media_ids = media_ids(processor)
        self._media_tokens = self._tokenizer.convert_ids_to_tokens(sorted(self.media_ids))
        self._tile_notice = tile_notice(processor, max_tiles)
        self.pixel_scale: PixelScale | None = None
        self._prompt_cache = PromptCache()
        self._ends: dict[str, list[int]] = {}

    @property
    def notices(self) -> list[str]:
        """What the user should know about the chat template and the image processor, each said once."""
        return [*self._chat.notices, *([self._tile_notice] if self._tile_notice else [])]

    def for_loader(self) -> PairEncoder:
        """The same encoder, set up for a data loader: less work and a quarter of the bytes.

        It gives pixels as uint8 where its processor leaves its last step out exactly; they go through ``pixel_scale``
        before a model reads them. Runs of image tokens are read at once, replies without all of their prompt, and the
        processor's settings merged once, each where that gives the same tensors.
        """
        quick = copy.copy(self)
        quick.pixel_scale = pixel_scale(self.processor)
        quick._prompt_cache = PromptCache()
        quick._read_replies = quick_reader(
            self._tokenizer, self._chat.render([Message("user", "?")], [PROBE], "").prompt
        )
        for quicker in (with_kept_settings, with_quick_runs):
            changed = quicker(quick.processor)
            if changed is not quick.processor and reads_alike(self.processor, changed):
                quick.processor = changed
        return quick

    def encode(self, pair: PreferencePair) -> EncodedPair:
        """Token ids and vision tensors of ``pair``.

        Raises:
            RecordError: ``images_unsupported``, ``placeholder_mismatch``, ``image_token_in_prompt``,
                ``image_token_in_response``, ``end_of_turn_in_response``, ``empty_response``, ``identical``,
                ``over_long``, ``missing_image``, ``undecodable_image``, ``image_too_small``, ``missing_video``,
                ``undecodable_video``, ``template_refused``, ``template_lost_response``, ``processor_refused``.
            DataError: the pair holds a video, and the library that reads videos is not installed.
        """
        pair = with_frames(pair, self.video_frames)
        responses = self._responses(pair)
        self._check_prompt(pair)
        chat = self._chat.render(pair.prompt, responses, pair.origin)
        response_ids = self._response_ids(chat, pair.origin)
        prompt_ids, vision, token_types = self._prompt_cache.get(
            chat.prompt, pair, self.tiles_of(pair), self._encode_prompt
        )
        image_tokens = self._count_image_tokens(prompt_ids, pair.origin)
        whole = [len(ids) for ids in response_ids]
        response_ids = self._fit(response_ids, prompt_ids.numel(), pair.origin)
        if len(response_ids) == 2 and response_ids[0] == response_ids[1]:
            raise RecordError(
                "identical", pair.origin, "chosen and rejected are the same tokens: no preference to learn"
            )
        ids = [torch.from_numpy(np.array(ids, dtype=np.int64)) for ids in response_ids]  # torch.tensor takes 3x as long
        return EncodedPair(
            prompt_ids=prompt_ids,
            chosen_ids=ids[0],
            rejected_ids=ids[1] if len(ids) == 2 else None,
            vision=vision,
            source=pair.source,
            origin=pair.origin,
            tiles=self._count_tiles(vision, len(pair.images)),
            image_tokens=image_tokens,
            cut=[len(ids) for ids in response_ids] != whole,
            token_types=token_types,
        )

    def _responses(self, pair: PreferencePair) -> list[str]:
        named = {"chosen": pair.chosen, "rejected": pair.rejected}
        if not self.need_rejected:
            del named["rejected"]
        for name, text in named.items():
            if text is None or not text.strip():
                raise RecordError("empty_response", pair.origin, f"`{name}` is empty: there is nothing to score")
        return [text for text in named.values() if text is not None]

    def _check_prompt(self, pair: PreferencePair) -> None:
        if pair.images and not reads_images(self.processor):
            detail = (
                f"the record has images, and {type(self.processor).__name__} reads none; "
                "take it out, or train a vision-language model, with its own processor"
            )
            raise RecordError("images_unsupported", pair.origin, detail)
        placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in pair.prompt)
        if placeholders != len(pair.images):
            detail = (
                f"the prompt has {placeholders} {IMAGE_PLACEHOLDER} for {len(pair.images)} images; "
                "write one where each stands"
            )
            raise RecordError("placeholder_mismatch", pair.origin, detail)
        for message in pair.prompt:
            words = message.text.replace(IMAGE_PLACEHOLDER, "\n")  # the model's own image token may be written so too
            found = next((token for token in self._media_tokens if token in words), None)
            if found is not None:
                detail = f"the prompt's text holds {found}, which to the model is an image or a video; take it out"
                raise RecordError("image_token_in_prompt", pair.origin, detail)

    def _response_ids(self, chat: Rendering, origin: str) -> list[list[int]]:
        """Ids of each reply's scored tokens."""
        replies = [reply + chat.end_of_turn for reply in chat.replies]
        found = self._read_replies(chat.prompt, replies, self._adds_special_tokens(chat.prompt))
        # Where a token would span the seam, the response stands on its own: generation starts from the prompt's tokens.
        return [
            self._checked(self._ids(reply) if ids is None else ids, chat.end_of_turn, origin)
            for ids, reply in zip(found, replies, strict=True)
        ]

    def _checked(self, ids: list[int], end_of_turn: str, origin: str) -> list[int]:
        """``ids`` of a reply, if they can be scored."""
        if end_of_turn not in self._ends:
            self._ends[end_of_turn] = self._ids(end_of_turn)
        if ids == self._ends[end_of_turn]:
            raise RecordError("empty_response", origin, "a response becomes no token at all: there is nothing to score")
        if not self.media_ids.isdisjoint(ids):
            token = next(t for t in self._tokenizer.convert_ids_to_tokens(ids) if t in self._media_tokens)
            detail = f"a response holds {token}, which to the model is an image or a video; take it out"
            raise RecordError("image_token_in_response", origin, detail)
        if ids[-1] in ids[:-1]:
            token = self._tokenizer.convert_ids_to_tokens(ids[-1])
            detail = f"a response holds {token}, with which the model ends its turn; it is added here: take it out"
            raise RecordError("end_of_turn_in_response", origin, detail)
        return ids

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]

    def _adds_special_tokens(self, prompt: str) -> bool:
        """As transformers has it: around a processor the tokenizer adds its start token unless the template wrote it
        already; alone it adds none, the template has written all."""
        bos = self._tokenizer.bos_token
        return reads_images(self.processor) and (bos is None or not prompt.startswith(bos))

    def tiles_of(self, pair: PreferencePair) -> int:
        """Tiles that the images of ``pair`` may take together."""
        return self.max_tiles if pair.max_tiles is None else min(self.max_tiles, pair.max_tiles)

    def _encode_prompt(self, prompt: str, pair: PreferencePair) -> EncodedPrompt:
        """The prompt's ids ``[prompt]``, image tokens expanded; the vision tensors; and the tokens' types."""
        text_kwargs = {"add_special_tokens": self._adds_special_tokens(prompt), "truncation": False, "padding": False}
        if not reads_images(self.processor):
            encoded = self._tokenizer([prompt], return_tensors="pt", **text_kwargs)
            return encoded["input_ids"][0], {}, {key: encoded[key][0] for key in _TOKEN_TYPES if key in encoded}
        images = [open_image(image, pair.origin) for image in pair.images]
        settings = tile_settings(self.processor, self.tiles_of(pair), images) | (
            {} if self.pixel_scale is None else AS_BYTES
        )
        try:
            encoded = self.processor(
                text=[prompt],
                images=[images] if images else None,
                text_kwargs=text_kwargs,
                images_kwargs=settings,
                return_tensors="pt",
            )
            tensors = _tensors(encoded)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise RecordError("processor_refused", pair.origin, f"the model's processor refuses it: {error}") from error
        token_types = {key: tensors.pop(key)[0] for key in _TOKEN_TYPES if key in tensors}
        if self.pixel_scale is not None:
            tensors = self.pixel_scale.packed(tensors)
        return encoded["input_ids"][0], tensors, token_types

    def _count_tiles(self, vision: dict[str, Tensor], images: int) -> int:
        pixels = vision.get("pixel_values")
        if pixels is None or pixels.dim() < 4:  # the Qwen-VL families: patches of all images in one list
            return images
        if pixels.dim() == 4:
            return pixels.shape[0]
        if self.pixel_scale is not None:
            return self.pixel_scale.num_pictures(vision)
        # Pictures by image or prompt; where there are fewer, zeros fill up.
        return int(pixels[:, :, 0].flatten(2).any(dim=-1).sum())

    def _count_image_tokens(self, prompt: Tensor, origin: str) -> int:
        count = 0 if self._image_token_id is None else int(np.count_nonzero(prompt.numpy() == self._image_token_id))
        if count == 1 and getattr(self.processor, "spatial_merge_size", 1) > 1:
            # transformers 5.23 squeezes the dimension of tokens away where Mistral 3 has one, and then fails.
            detail = "its image is so small that it becomes a single token, which this model cannot read; enlarge it"
            raise RecordError("image_too_small", origin, detail)
        return count

    def _fit(self, response_ids: Sequence[list[int]], prompt: int, origin: str) -> list[list[int]]:
        """The responses' ids, their ends cut off where they are too long and that is asked for."""
        longest = max(len(ids) for ids in response_ids)
        if self.max_length is None or prompt + longest <= self.max_length:
            return list(response_ids)
        room = self.max_length - prompt
        if self.over_long == "drop" or room < 1:
            remedy = "raise max_length or lower max_tiles" + ("" if room < 1 else ", or set over_long to cut")
            detail = f"prompt and response take {prompt} + {longest} = {prompt + longest} tokens of {self.max_length}"
            raise RecordError("over_long", origin, f"{detail}; {remedy}")
        return [ids[:room] for ids in response_ids]


def _tensors(encoded: Any) -> dict[str, Tensor]:
    """What the processor gave beside the text's ids, as tensors. Names and metadata, which no model reads, are left
    out; pixels that are no tensor raise ValueError."""
    found = {}
    for key, value in encoded.items():
        if key in _TEXT_KEYS:
            continue
        try:
            found[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            if key.startswith("pixel"):
                raise ValueError(f"its {key} make no tensor: {error}") from error
    return found
