"""PreferencePair to token ids and vision tensors, through the model's own processor and chat template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vlmpo.data.chat import ChatTemplate
from vlmpo.data.images import open_image
from vlmpo.data.records import IMAGE_PLACEHOLDER, PreferencePair
from vlmpo.data.videos import DEFAULT_FRAMES, with_frames
from vlmpo.errors import ModelError, RecipeError, RecordError

_MEDIA = ("image", "video", "audio")
# What a processor says of the prompt's tokens; the row that a pair is laid out in has its own.
_TEXT_KEYS = ("input_ids", "attention_mask", "position_ids")
# Marks which tokens are an image's: some families count positions (Qwen-VL) or attend (Gemma 3) by it.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """A pair as the model reads it: ``trunk_ids`` followed by either branch.

    Attributes:
        trunk_ids: ``[trunk]`` int64, the prompt, image tokens expanded.
        chosen_ids: ``[chosen]`` int64, exactly the scored tokens: the response and its end-of-turn token.
        rejected_ids: ``[rejected]`` int64, likewise; None in supervised fine-tuning.
        vision: what else the processor gave (InternVL: ``pixel_values [tiles, 3, height, width]``).
        token_types: what the processor says of each trunk token beside its id, ``[trunk]`` each; a branch's are 0.
        source: name of the data set.
        origin: ``file:line`` of the record.
        tiles: pictures the vision tower reads: tiles and thumbnails, or images where the model does not tile.
        image_tokens: image tokens in the trunk.
        cut: whether a response's end was cut off; its end-of-turn token is then not scored.
    """

    trunk_ids: Tensor
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
    def _branch_lengths(self) -> list[int]:
        return [ids.numel() for ids in (self.chosen_ids, self.rejected_ids) if ids is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens read when the trunk is read once."""
        return self.trunk_ids.numel() + sum(self._branch_lengths)

    @property
    def length(self) -> int:
        """Tokens of the trunk and the longer branch: what ``max_length`` bounds."""
        return self.trunk_ids.numel() + max(self._branch_lengths)


class PairEncoder:
    """Encodes pairs for one model. Picklable, for a data loader's workers.

    Args:
        processor: the model's own processor, with its chat template.
        max_length: tokens of trunk and longer branch together; None: no limit.
        over_long: ``drop`` refuses a longer pair; ``cut`` takes the ends of its responses off, never of the prompt.
        max_tiles: tiles the images of a pair may take together, thumbnails not counted; a pair's own ``max_tiles`` may
            lower it. Each image may take its share, at least one. Without effect on models that do not tile.
        need_rejected: False for supervised fine-tuning: the rejected response is not looked at.
        video_frames: images a video becomes at most.

    Attributes:
        media_ids: tokens that to the model are an image, video or sound, or frame one; no response may hold them.

    Raises:
        ModelError: not a processor of text and images, or one without a usable chat template.
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
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ModelError(
                f"{type(processor).__name__} is no processor of text and images; pass the model's own, as "
                "AutoProcessor.from_pretrained gives it"
            )
        if over_long not in ("drop", "cut"):
            raise RecipeError(f"over_long must be drop or cut, not {over_long!r}")
        self.processor = processor
        self.max_length = max_length
        self.over_long = over_long
        self.max_tiles = max_tiles
        self.need_rejected = need_rejected
        self.video_frames = video_frames
        self._tokenizer = processor.tokenizer
        self._chat = ChatTemplate(processor)
        self.media_ids = _media_ids(processor)
        self._media_tokens = self._tokenizer.convert_ids_to_tokens(sorted(self.media_ids))

    @property
    def notices(self) -> list[str]:
        """What the user should know about the chat template, each said once."""
        return self._chat.notices

    def encode(self, pair: PreferencePair) -> EncodedPair:
        """Token ids and vision tensors of ``pair``.

        Raises:
            RecordError: ``placeholder_mismatch``, ``image_token_in_prompt``, ``image_token_in_response``,
                ``end_of_turn_in_response``, ``empty_response``, ``identical``, ``over_long``, ``missing_image``,
                ``undecodable_image``, ``missing_video``, ``undecodable_video``, ``template_refused``,
                ``template_lost_response``, ``processor_refused``.
            DataError: the pair holds a video, and the library that reads videos is not installed.
        """
        pair = with_frames(pair, self.video_frames)
        responses = self._responses(pair)
        self._check_prompt(pair)
        chat = self._chat.render(pair.prompt, responses, pair.origin)
        branches = [self._branch(chat.prompt, reply, chat.end_of_turn, pair.origin) for reply in chat.replies]
        trunk, vision, token_types = self._trunk(chat.prompt, pair)
        whole = [len(ids) for ids in branches]
        branches = self._fit(branches, trunk.numel(), pair.origin)
        if len(branches) == 2 and branches[0] == branches[1]:
            raise RecordError(
                "identical", pair.origin, "chosen and rejected are the same tokens: no preference to learn"
            )
        ids = [torch.tensor(branch, dtype=torch.long) for branch in branches]
        return EncodedPair(
            trunk_ids=trunk,
            chosen_ids=ids[0],
            rejected_ids=ids[1] if len(ids) == 2 else None,
            vision=vision,
            source=pair.source,
            origin=pair.origin,
            tiles=_count_tiles(vision, len(pair.images)),
            image_tokens=int((trunk == self.processor.image_token_id).sum()),
            cut=[len(branch) for branch in branches] != whole,
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

    def _branch(self, prompt: str, reply: str, end_of_turn: str, origin: str) -> list[int]:
        """Ids of the scored tokens, as they continue the prompt's."""
        add = self._adds_special_tokens(prompt)
        before = self._ids(prompt, add)
        joint = self._ids(prompt + reply + end_of_turn, add)
        # Where a token would span the seam, the response stands on its own: generation starts from the prompt's tokens.
        fits = joint[: len(before)] == before
        ids = joint[len(before) :] if fits else self._ids(reply + end_of_turn, False)
        if ids == self._ids(end_of_turn, False):
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

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=add_special_tokens, truncation=False)["input_ids"]

    def _adds_special_tokens(self, prompt: str) -> bool:
        """As the processors have it: the tokenizer adds its start token unless the template wrote it already."""
        bos = self._tokenizer.bos_token
        return bos is None or not prompt.startswith(bos)

    def _trunk(self, prompt: str, pair: PreferencePair) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The prompt's ids ``[trunk]``, image tokens expanded; the vision tensors; and the tokens' types."""
        images = [open_image(image, pair.origin) for image in pair.images]
        text_kwargs = {"add_special_tokens": self._adds_special_tokens(prompt), "truncation": False, "padding": False}
        try:
            encoded = self.processor(
                text=[prompt],
                images=[images] if images else None,
                text_kwargs=text_kwargs,
                images_kwargs=self._tiling(pair),
                return_tensors="pt",
            )
        except ValueError as error:
            raise RecordError("processor_refused", pair.origin, f"the model's processor refuses it: {error}") from error
        tensors = {key: torch.as_tensor(value) for key, value in encoded.items() if key not in _TEXT_KEYS}
        token_types = {key: tensors.pop(key)[0] for key in _TOKEN_TYPES if key in tensors}
        return encoded["input_ids"][0], tensors, token_types

    def _tiling(self, pair: PreferencePair) -> dict[str, int]:
        image_processor = self.processor.image_processor
        if not pair.images or not hasattr(image_processor, "max_patches"):
            return {}
        tiles = self.max_tiles if pair.max_tiles is None else min(self.max_tiles, pair.max_tiles)
        return {"max_patches": max(1, tiles // len(pair.images))}

    def _fit(self, branches: Sequence[list[int]], trunk: int, origin: str) -> list[list[int]]:
        """The branches, their ends cut off where they are too long and that is asked for."""
        longest = max(len(branch) for branch in branches)
        if self.max_length is None or trunk + longest <= self.max_length:
            return list(branches)
        room = self.max_length - trunk
        if self.over_long == "drop" or room < 1:
            remedy = "raise max_length or lower max_tiles" + ("" if room < 1 else ", or set over_long to cut")
            detail = f"prompt and response take {trunk} + {longest} = {trunk + longest} tokens of {self.max_length}"
            raise RecordError("over_long", origin, f"{detail}; {remedy}")
        return [branch[:room] for branch in branches]


def _media_ids(processor: Any) -> frozenset[int]:
    """Ids of the tokens that stand for images, video and sound, and of those that frame them."""
    tokenizer = processor.tokenizer
    ids: set[int | None] = set()
    for medium in _MEDIA:
        token = getattr(processor, f"{medium}_token", None)
        ids.add(None if token is None else tokenizer.convert_tokens_to_ids(str(token)))
        ids.add(getattr(processor, f"{medium}_token_id", None))
        ids.update(getattr(processor, f"{medium}_token_ids", None) or ())
    # A token the tokenizer does not know comes as its unknown token, which is no image.
    return frozenset(id_ for id_ in ids if id_ is not None and id_ != tokenizer.unk_token_id)


def _count_tiles(vision: dict[str, Tensor], images: int) -> int:
    pixels = vision.get("pixel_values")
    if pixels is None or pixels.dim() < 4:  # the Qwen-VL families: patches of all images in one list
        return images
    return math.prod(pixels.shape[:-3])
