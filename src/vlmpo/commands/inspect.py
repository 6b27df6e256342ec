"""``vlmpo inspect``: show what the model will see of the data, before a GPU is spent on it. Loads no weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.text import Text
from transformers import AutoConfig

from vlmpo.commands.config import check_training_keys
from vlmpo.commands.inspect_memory import describe_memory
from vlmpo.commands.run_data import RunData, none_left, open_run_data, show_examples, show_pair_counts
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.processors import image_token_id, tokenizer_of
from vlmpo.errors import RecipeError, RecordError, printable, shorten
from vlmpo.log import Progress, print_line, print_table, shown
from vlmpo.loss import needs_reference
from vlmpo.models.adapters import named_base
from vlmpo.models.families import support_for
from vlmpo.models.fit import check_config, limits_of_config
from vlmpo.models.loading import load_processor
from vlmpo.recipe import Recipe
from vlmpo.train.batching import tree_of
from vlmpo.train.config import MPOConfig
from vlmpo.train.counts import PairCounts
from vlmpo.train.memory_choice import row_tokens
from vlmpo.train.sampler import explain_small_micro_batch
from vlmpo.tree.layout import PromptTree
from vlmpo.tree.packing import pack

MAX_ENCODED = 2000  # pairs encoded for lengths and tiles; of more pairs a seeded sample is encoded
SHOWN_KEYS = 50  # of those that nothing reads
_QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class PairSize:
    """Tokens of one encoded pair (``prompt`` includes ``image_tokens``; no ``rejected``: 0), and its image tiles."""

    prompt: int
    chosen: int
    rejected: int
    image_tokens: int
    tiles: int

    @classmethod
    def of(cls, pair: EncodedPair) -> PairSize:
        """Return the size of ``pair``."""
        rejected = 0 if pair.rejected_ids is None else pair.rejected_ids.numel()
        return cls(pair.prompt_ids.numel(), pair.chosen_ids.numel(), rejected, pair.image_tokens, pair.tiles)

    @property
    def longer(self) -> int:
        """Tokens of the prompt and the longer response, which ``data.max_length`` limits."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def shared(self) -> int:
        """Tokens the model reads for the pair if both responses share the prompt."""
        return self.prompt + self.chosen + self.rejected


@dataclass
class Encoded:
    """The training pairs that were encoded, or :data:`MAX_ENCODED` of them.

    Attributes:
        sizes: sizes of the pairs that can be used, in order.
        dropped: counts of the pairs that the processor or a limit refused.
        samples: a few encoded pairs, spread over the data.
        notices: remarks on the data and on the chat template.
        forms: in how many pairs of each data set images and videos are given in each form, kept or dropped here.
        end_id: token with which the model ends its turn.
        largest: the pair of the most tokens.
    """

    sizes: list[PairSize] = field(default_factory=list)
    dropped: PairCounts = field(default_factory=PairCounts)
    samples: list[EncodedPair] = field(default_factory=list)
    notices: Sequence[str] = ()
    forms: dict[str, Counter[str]] = field(default_factory=dict)
    end_id: int = -1
    largest: EncodedPair | None = None


def inspect(recipe: Recipe, pairs: int = 1, card: float | None = None) -> None:
    """Print ``pairs`` pairs as the model reads them, drops by reason, lengths and tiles, pairs and rows of a step.

    Args:
        recipe: of a run.
        pairs: how many pairs to show.
        card: GiB of the card to train on, for an estimate of memory; None: this machine's.

    Raises:
        VlmpoError: the recipe, the data or the processor cannot be used, or no pair is left to train on; the first bad
            record under ``data.on_bad_record: fail``.
    """
    check_training_keys(recipe)
    per_device = positive_setting(recipe, "per_device_train_batch_size")
    positive_setting(recipe, "gradient_accumulation_steps")  # refuse it before minutes of encoding
    processor = load_processor(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    data = open_run_data(recipe)
    encoded = encode_pairs(recipe, data, processor, num_samples=pairs)

    for name, infos in data.formats().items():
        print_line(f"data.{name}", style="bold")
        for info in infos:
            print_line(f"  {info.name}: {info.records} records, {info.container}, {info.title}: {info.why}")
    show_unread_keys(data)
    for line in describe_media(data, encoded.forms):
        print_line(line)
    for notice in [*data.notices, *encoded.notices]:
        print_line(f"note: {notice}", style="yellow")
    for number, pair in enumerate(encoded.samples, start=1):
        print_line(f"\npair {number} of {len(encoded.samples)}", style="bold")
        print_line(describe(pair, processor, encoded.end_id))

    show_pair_counts(data, encoded.dropped, trained=False)
    num_encoded = len(encoded.sizes) + encoded.dropped.num_dropped
    if num_encoded < len(data.train):
        sample = f"a seeded sample, {num_encoded} of {len(data.train)} pairs"
        print_line(f"Encoded: {sample}; over-long pairs and broken images were looked for only there.")
    for name, evaluation in data.evaluation.items():
        print_line(f"{name}: {len(evaluation)} pairs")
    if data.eval_screened.num_dropped:
        print_line(f"eval: {data.eval_screened.num_dropped} pairs dropped")
        show_examples(data.eval_screened)

    if not encoded.sizes:
        raise none_left("data.train", num_encoded, "train", encoded.dropped)
    show_sizes(encoded.sizes)
    memory, tokens = _memory(recipe, encoded.largest, per_device, card)
    for line in [*describe_steps(recipe, len(data.train), encoded.sizes, is_shared(recipe), tokens), *memory]:
        print_line(line)
    if (too_few := explain_small_micro_batch(recipe.data.group_by_prompt, per_device)) is not None:
        print_line(f"note: {too_few}", style="yellow")


def encode_pairs(recipe: Recipe, data: RunData, processor: Any, num_samples: int, most: int | None = None) -> Encoded:
    """Encode the training pairs as training would, or a seeded sample of ``most`` (:data:`MAX_ENCODED`) of them.

    Raises:
        RecordError: the first pair that cannot be used, under ``data.on_bad_record: fail``.
    """
    settings = recipe.data.model_dump(include={"max_length", "over_long", "max_tiles", "video_frames"})
    config = read_config(recipe)
    encoder = PairEncoder(
        processor,
        need_rejected=needs_reference(recipe.loss.weights),
        **({} if config is None else limits_of_config(config)),
        **settings,
    )
    if config is not None:
        check_config(config, encoder)
    indices = range(len(data.train))
    most = most or MAX_ENCODED
    if len(indices) > most:
        indices = np.sort(np.random.default_rng(0).choice(len(indices), most, replace=False)).tolist()
    encoded = Encoded()
    with Progress("encoding", len(indices), "pairs", transient=True) as progress:
        for position, index in enumerate(indices):
            progress.advance(1)
            try:
                encoded.forms.setdefault(data.train.source(index), Counter()).update(data.train.forms(index))
                pair = encoder.encode(data.train[index])
            except RecordError as error:
                if recipe.data.on_bad_record == "fail":
                    raise
                encoded.dropped.drop(data.train.source(index), error)
                continue
            encoded.sizes.append(PairSize.of(pair))
            if encoded.largest is None or PairSize.of(pair).shared > PairSize.of(encoded.largest).shared:
                encoded.largest = pair
            if len(encoded.samples) < num_samples and position * num_samples >= len(encoded.samples) * len(indices):
                encoded.samples.append(pair)
    encoded.notices, encoded.end_id = encoder.notices, encoder.end_id
    return encoded


def show_unread_keys(data: RunData) -> None:
    """Print for each data set the keys of its usable records of which nothing is read, and in how many they are."""
    datasets = {"train": data.train, "eval": data.evaluation.get("eval")}
    for name, pairs in datasets.items():
        for scanned in () if pairs is None else pairs.scan():
            counts, total = scanned.index.unread_keys(), len(scanned.index)
            if counts:
                by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
                listed = ", ".join(
                    f"{shorten(key)} (in {'all' if count == total else count})" for key, count in by_count[:SHOWN_KEYS]
                )
                if (more := len(by_count) - SHOWN_KEYS) > 0:
                    listed += f", and {more} more"
                line = f"  data.{name}, {scanned.name}: keys not read nor shown to the model: {listed}"
                print_line(printable(line))


def describe_media(data: RunData, forms: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Yield a line for each data set: in how many of the pairs looked at its images are given in which form.

    Paths that leave the image root are counted among all its records.
    """
    outside = data.screened.dropped
    for source in data.read:
        given = [f"{form} (in {count})" for form, count in sorted(forms.get(source, Counter()).items())]
        if count := outside[source, "outside_image_root"]:
            given.append(f"outside the image root, dropped (in {count})")
        if given:
            yield f"  data.train, {source}: images and videos given as {', '.join(given)}"


# ---- one pair ----


def describe(pair: EncodedPair, processor: Any, end_id: int) -> Text:
    """Return ``pair`` as the model reads it: runs of image tokens as a count, scored tokens between ‹ and ›.

    ``end_id`` is the token with which the model ends its turn; a response without it is called cut.
    """
    tokenizer = tokenizer_of(processor)
    size = PairSize.of(pair)
    text = Text(shown(f"{pair.source}, {pair.origin}").replace("\n", "\\n") + "\n")
    text.append(f"{size.prompt} prompt tokens, {size.image_tokens} of them from images in {size.tiles} tiles\n")
    text.append("prompt, not scored:\n", style="bold")
    text.append(_indented(collapse_images(pair.prompt_ids.tolist(), processor)))
    for name, ids, style in [("chosen", pair.chosen_ids, "green"), ("rejected", pair.rejected_ids, "red")]:
        if ids is not None:
            is_cut = int(ids[-1]) != end_id
            text.append(f"{name}, {ids.numel()} tokens scored{', cut' if is_cut else ''}:\n", style="bold")
            text.append(_indented(f"‹{_decode(ids.tolist(), tokenizer)}›"), style=style)
    text.right_crop()  # the last newline: printing adds one
    return text


def collapse_images(ids: Sequence[int], processor: Any) -> str:
    """Decode ``ids``, with each run of image tokens as ``[256 image tokens x 7 tiles = 1792]``.

    The tiles are left out if the processor does not say how many tokens one takes, or if there is only one.
    """
    parts: list[str] = []
    image, per_tile = image_token_id(processor), getattr(processor, "image_seq_length", None)
    for is_image, run in itertools.groupby(ids, key=lambda token: token == image):
        tokens = list(run)
        if not is_image:
            parts.append(_decode(tokens, tokenizer_of(processor)))
        elif per_tile and len(tokens) > per_tile and len(tokens) % per_tile == 0:
            parts.append(f"[{per_tile} image tokens x {len(tokens) // per_tile} tiles = {len(tokens)}]")
        else:
            parts.append(f"[{len(tokens)} image tokens]")
    return "".join(parts)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return shown(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _indented(text: str) -> str:
    return "".join(f"  | {line}\n" for line in text.split("\n"))


# ---- lengths, tiles and steps ----


def show_sizes(sizes: Sequence[PairSize]) -> None:
    """Print quantiles of the lengths in tokens, and of the tiles."""
    columns = {
        "prompt + longer response": [size.longer for size in sizes],
        "pair, prompt read once": [size.shared for size in sizes],
        "prompt": [size.prompt for size in sizes],
        "image tokens": [size.image_tokens for size in sizes],
        "chosen": [size.chosen for size in sizes],
        "rejected": [size.rejected for size in sizes],
        "tiles": [size.tiles for size in sizes],
    }
    if not any(columns["rejected"]):
        del columns["rejected"]
    rows: list[list[object]] = [["", *_QUANTILES], *([name, *quantiles(values)] for name, values in columns.items())]
    print_table(f"tokens and tiles of {len(sizes)} pairs", rows)


def quantiles(values: Sequence[int]) -> list[int]:
    """Return the quantiles of :data:`_QUANTILES`; each is one of ``values``, the lower of two middle ones."""
    return [int(value) for value in np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")]


def is_shared(recipe: Recipe) -> bool | None:
    """Return whether the responses to a prompt will share a row; None if the model's config cannot be read."""
    if recipe.model.attention == "separate":
        return False
    config = read_config(recipe)
    return None if config is None else support_for(config).shared


def read_config(recipe: Recipe) -> Any | None:
    """Return the model's config; None if it cannot be read: a processor alone is enough to inspect the data."""
    path = recipe.model.path
    try:
        return AutoConfig.from_pretrained(named_base(path) or path, trust_remote_code=recipe.model.trust_remote_code)
    except (OSError, ValueError):
        return None


def _memory(
    recipe: Recipe, largest: EncodedPair | None, per_device: int, card: float | None
) -> tuple[list[str], int | None]:
    """Return lines on memory, and how many tokens a row will have; None if that is not known."""
    config = read_config(recipe)
    if config is None or largest is None:
        return [], None
    shared = bool(is_shared(recipe))
    return describe_memory(recipe, config, tree_of(largest), pairs_at_once=per_device, shared=shared, card=card)


def describe_steps(
    recipe: Recipe, num_train: int, sizes: Sequence[PairSize], shared: bool | None, tokens: int | None = None
) -> list[str]:
    """Return lines on pairs, rows and tokens of an optimizer step, and steps of an epoch.

    Args:
        num_train: pairs to train on.
        sizes: sizes of some of them, for the estimate of rows.
        shared: what :func:`is_shared` returned.
        tokens: of a row, as estimated.

    Raises:
        RecipeError: a batch size or ``max_tokens_per_row`` is not a whole number above 0.
    """
    per_device = positive_setting(recipe, "per_device_train_batch_size")
    accumulation = positive_setting(recipe, "gradient_accumulation_steps")
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    pairs = per_device * accumulation * devices
    product = f"{per_device} a device x {accumulation} accumulated x {devices} device(s)"
    bound = _row_bound(recipe) if tokens is None else tokens
    lines = [f"\npairs per optimizer step: {pairs} ({product})"]
    if shared is None:
        lines.append("rows per optimizer step: not known, the model's config cannot be read")
    elif sizes:
        rows = pairs * _count_rows(sizes, per_device, bound, shared) / len(sizes)
        kind = "prompts shared" if shared else "one response a row"
        lines.append(f"rows per optimizer step: about {rows:.1f} ({kind})")
    lines.append(f"optimizer steps per epoch: {math.ceil(num_train / pairs)}")
    if shared and sizes:
        lines.append(row_line(bound, max(size.shared for size in sizes)))
    return lines


def positive_setting(recipe: Recipe, name: str) -> int:
    """Return ``training.<name>`` or its default. Raises RecipeError if it is not a whole number above 0."""
    default = next(f.default for f in dataclasses.fields(MPOConfig) if f.name == name)
    value = recipe.training.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"training.{name}: expected a whole number above 0, got {value!r}")
    return value


def _row_bound(recipe: Recipe) -> int | None:
    """Return ``training.max_tokens_per_row``, or the default for this machine; None if rows have no limit."""
    if recipe.training.get("max_tokens_per_row", "auto") == "auto":
        on_accelerator = torch.accelerator.is_available() and not recipe.training.get("use_cpu")
        return row_tokens("cuda" if on_accelerator else "cpu")
    unbounded = recipe.training["max_tokens_per_row"] is None
    return None if unbounded else positive_setting(recipe, "max_tokens_per_row")


def _count_rows(sizes: Sequence[PairSize], per_device: int, bound: int | None, shared: bool) -> int:
    """Return how many rows micro-batches of ``per_device`` pairs make, packed as training packs them."""
    if not shared:
        return sum(2 if size.rejected else 1 for size in sizes)

    def tokens(count: int) -> torch.Tensor:
        return torch.empty(count, device="meta")  # takes no memory

    trees = [
        PromptTree(tokens(size.prompt), tuple(tokens(n) for n in (size.chosen, size.rejected) if n)) for size in sizes
    ]
    return sum(len(pack(trees[at : at + per_device], bound)) for at in range(0, len(trees), per_device))


def row_line(bound: int | None, longest: int) -> str:
    """Return a line on what decides the memory: the tokens read at once, ``bound`` or those of the longest pair."""
    if bound is None:
        return f"tokens read at once: a whole micro-batch; the longest pair here has {longest}"
    line = f"tokens read at once: at most {bound} (training.max_tokens_per_row); the longest pair here has {longest}"
    if longest < bound:
        return f"{line}; a bound of {longest} would use the least memory and change no number"
    return line if longest == bound else f"{line} and gets a row of its own"
