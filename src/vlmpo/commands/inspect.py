"""``vlmpo inspect``: what the model will see of the data, before a GPU is spent on it. Loads no weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.text import Text
from transformers import AutoConfig, TrainingArguments

from vlmpo.commands.run_data import RunData, open_run_data
from vlmpo.commands.train import load_processor
from vlmpo.data.encode.encoder import EncodedPair, PairEncoder
from vlmpo.data.encode.processors import image_token_id, tokenizer_of
from vlmpo.errors import RecipeError, RecordError
from vlmpo.log import print_line, print_table
from vlmpo.loss import needs_reference
from vlmpo.models.families import support_for
from vlmpo.recipe import Recipe, check_training_keys
from vlmpo.train.config import MPOConfig, row_tokens
from vlmpo.train.counts import PairCounts
from vlmpo.train.order import room_for_groups
from vlmpo.tree.layout import PromptTree
from vlmpo.tree.packing import pack

MAX_EXAMINED = 2000  # pairs encoded for the distributions; above it a sample, the same each time, speaks for the rest
_BINS = 8
_BAR = 40


@dataclass(frozen=True)
class PairSize:
    """One encoded pair in tokens: its prompt (image tokens included) and its responses; and its tiles."""

    prompt: int
    chosen: int
    rejected: int
    image_tokens: int
    tiles: int

    @property
    def longer(self) -> int:
        """Prompt and longer response: what ``data.max_length`` bounds."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def shared(self) -> int:
        """Tokens read for the pair when the prompt is read once."""
        return self.prompt + self.chosen + self.rejected


@dataclass
class Findings:
    """What :func:`examine` found.

    Attributes:
        data: the run's data, screened.
        sizes: of the examined pairs that can be used, in order.
        dropped: examined pairs that the processor or a limit refused.
        samples: a few of the encoded pairs, spread over the data.
        notices: remarks on the data and on the chat template.
    """

    data: RunData
    sizes: list[PairSize] = field(default_factory=list)
    dropped: PairCounts = field(default_factory=PairCounts)
    samples: list[EncodedPair] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def num_examined(self) -> int:
        """Pairs that were encoded, or tried."""
        return len(self.sizes) + self.dropped.num_dropped


@dataclass(frozen=True)
class StepPlan:
    """How the pairs fall into optimizer steps.

    Attributes:
        per_device, accumulation, world_size: their product is the pairs of a step.
        steps_per_epoch: optimizer steps that take every pair once; the last may be smaller.
        rows_per_step: rows a step reads, as an estimate from the examined pairs; None where the model is not known.
        shared: whether the responses to a prompt share a row; None where the model is not known.
    """

    per_device: int
    accumulation: int
    world_size: int
    steps_per_epoch: int
    rows_per_step: float | None
    shared: bool | None

    @property
    def pairs_per_step(self) -> int:
        """The global batch."""
        return self.per_device * self.accumulation * self.world_size


def inspect(recipe: Recipe, pairs: int = 1, console: Console | None = None) -> None:
    """Print ``pairs`` pairs as the model reads them, what is dropped and why, lengths and tiles, pairs and rows a step.

    Raises:
        VlmpoError: the recipe, the data or the processor is at fault; the first bad record under
            ``data.on_bad_record: fail``.
    """
    check_training_keys(recipe, [f.name for f in dataclasses.fields(TrainingArguments)])
    plan_steps(recipe, num_train=1, sizes=[], shared=None)  # a wrong batch size is told before minutes of encoding
    console = console or Console()
    processor = load_processor(recipe)
    found = examine(recipe, processor, pairs)
    show_sources(console, found.data)
    for remark in found.notices:
        print_line(console, f"note: {remark}", style="yellow")
    for number, encoded in enumerate(found.samples, start=1):
        print_line(console, f"\npair {number} of {len(found.samples)}", style="bold")
        console.print(describe(encoded, processor), soft_wrap=True)
    show_counts(console, found)
    show_sizes(console, found)
    shared = is_shared(recipe)
    show_plan(console, plan_steps(recipe, len(found.data.train), found.sizes, shared))
    too_small = room_for_groups(recipe.data.group_by_prompt, _whole(recipe, "per_device_train_batch_size"))
    if too_small is not None:
        print_line(console, f"note: {too_small}", style="yellow")
    if shared and found.sizes:
        print_line(console, row_line(_row_bound(recipe), max(size.shared for size in found.sizes)))


def examine(recipe: Recipe, processor: Any, num_samples: int) -> Findings:
    """Open and screen the data as training would; encode the training pairs, or MAX_EXAMINED of them."""
    data = open_run_data(recipe)
    found = Findings(data, notices=list(data.notices))
    encoder = PairEncoder(
        processor,
        max_length=recipe.data.max_length,
        over_long=recipe.data.over_long,
        max_tiles=recipe.data.max_tiles,
        need_rejected=needs_reference(recipe.loss.weights),
        video_frames=recipe.data.video_frames,
    )
    indices = _sampled(len(data.train))
    screen = Console(stderr=True)
    watched = track(indices, "encoding", console=screen, transient=True, disable=not screen.is_terminal)
    for position, index in enumerate(watched):
        try:
            encoded = encoder.encode(data.train[index])
        except RecordError as error:
            if recipe.data.on_bad_record == "fail":
                raise
            found.dropped.drop(data.train.source(index), error)
            continue
        found.sizes.append(_size(encoded))
        if len(found.samples) < num_samples and position * num_samples >= len(found.samples) * len(indices):
            found.samples.append(encoded)
    found.notices += encoder.notices
    return found


def _sampled(count: int) -> list[int]:
    if count <= MAX_EXAMINED:
        return list(range(count))
    return np.sort(np.random.default_rng(0).choice(count, MAX_EXAMINED, replace=False)).tolist()


def _size(encoded: EncodedPair) -> PairSize:
    return PairSize(
        prompt=encoded.prompt_ids.numel(),
        chosen=encoded.chosen_ids.numel(),
        rejected=0 if encoded.rejected_ids is None else encoded.rejected_ids.numel(),
        image_tokens=encoded.image_tokens,
        tiles=encoded.tiles,
    )


# ---- one pair ----


def describe(encoded: EncodedPair, processor: Any) -> Text:
    """The pair as the model reads it: runs of image tokens as a count, scored tokens between ‹ and ›."""
    size = _size(encoded)
    text = Text(f"{encoded.source}, {encoded.origin}\n")
    text.append(f"{size.prompt} prompt tokens, {size.image_tokens} of them from images in {size.tiles} tiles\n")
    text.append("prompt, not scored:\n", style="bold")
    text.append(_indented(collapse_images(encoded.prompt_ids.tolist(), processor)))
    responses = [("chosen", encoded.chosen_ids, "green"), ("rejected", encoded.rejected_ids, "red")]
    for name, ids, style in responses:
        if ids is None:
            continue
        cut = ", cut" if encoded.cut else ""
        text.append(f"{name}, {ids.numel()} tokens scored{cut}:\n", style="bold")
        text.append(_indented(f"‹{_decode(ids.tolist(), processor)}›"), style=style)
    text.right_crop()  # the last newline: printing adds one
    return text


def collapse_images(ids: Sequence[int], processor: Any) -> str:
    """Decoded ``ids`` with each run of image tokens as ``[256 image tokens x 7 tiles = 1792]``.

    The tiles are told where the processor says how many tokens one takes, and the run holds more than one.
    """
    parts: list[str] = []
    image = image_token_id(processor)
    for is_image, start, end in _runs([token == image for token in ids]):
        if not is_image:
            parts.append(_decode(ids[start:end], processor))
            continue
        count, per_tile = end - start, getattr(processor, "image_seq_length", None)
        if per_tile and count > per_tile and count % per_tile == 0:
            parts.append(f"[{per_tile} image tokens x {count // per_tile} tiles = {count}]")
        else:
            parts.append(f"[{count} image tokens]")
    return "".join(parts)


def _runs(flags: Sequence[bool]) -> Iterator[tuple[bool, int, int]]:
    """(flag, start, end) of each stretch of equal flags."""
    start = 0
    for at in range(1, len(flags) + 1):
        if at == len(flags) or flags[at] != flags[start]:
            yield flags[start], start, at
            start = at


def _decode(ids: Sequence[int], processor: Any) -> str:
    return tokenizer_of(processor).decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _indented(text: str) -> str:
    return "".join(f"  | {line}\n" for line in text.split("\n"))


# ---- all pairs ----


def show_sources(console: Console, data: RunData) -> None:
    """Print what each data set was found to be: how many records of which format, in what, and why that format."""
    for name, infos in data.formats().items():
        print_line(console, f"data.{name}", style="bold")
        for info in infos:
            print_line(console, f"  {info.name}: {info.records} records, {info.container}, {info.title}: {info.why}")


def show_counts(console: Console, found: Findings) -> None:
    """Print pairs read, kept, held out and dropped by reason, for each data set, and examples of what was dropped."""
    data = found.data
    dropped = PairCounts.merged([data.screened, found.dropped])
    reasons = list(dropped.reasons())
    rows: list[list[object]] = [["data set", "read", "kept", "held out", *reasons]]
    for source, read in data.read.items():
        counts = [data.held_out[source], *(dropped.dropped[source, reason] for reason in reasons)]
        rows.append([source, read, read - sum(counts), *counts])
    print_table(console, "training pairs", rows)
    if found.num_examined < len(data.train):
        share = f"{found.num_examined} of {len(data.train)}"
        print_line(
            console,
            f"Encoded: a seeded sample, {share} pairs; over-long pairs and broken images were sought there only.",
        )
    for name, evaluation in data.evaluation.items():
        print_line(console, f"{name}: {len(evaluation)} pairs")
    for reason, messages in dropped.examples.items():
        for message in messages:
            print_line(console, f"  {reason}: {message}")


def show_sizes(console: Console, found: Findings) -> None:
    """Print the distributions of lengths and tiles over the examined pairs that can be used."""
    if not found.sizes:
        print_line(console, "no pair could be encoded")
        return
    columns = {
        "prompt + longer response": [size.longer for size in found.sizes],
        "pair, prompt read once": [size.shared for size in found.sizes],
        "prompt": [size.prompt for size in found.sizes],
        "image tokens": [size.image_tokens for size in found.sizes],
        "chosen": [size.chosen for size in found.sizes],
        "rejected": [size.rejected for size in found.sizes],
        "tiles": [size.tiles for size in found.sizes],
    }
    if not any(columns["rejected"]):
        del columns["rejected"]
    rows: list[list[object]] = [["", "min", "median", "p95", "max"]]
    rows += [[name, *summary(values)] for name, values in columns.items()]
    print_table(console, f"tokens and tiles of {len(found.sizes)} pairs", rows)
    for name in ("prompt + longer response", "tiles"):
        print_line(console, f"\n{name}", style="bold")
        for line in histogram(columns[name]):
            print_line(console, line)


def summary(values: Sequence[int]) -> tuple[int, int, int, int]:
    """Minimum, median, 95th percentile and maximum; of two middle values the lower, so each is a value that occurs."""
    low, median, p95, high = np.quantile(values, [0, 0.5, 0.95, 1], method="inverted_cdf").tolist()
    return int(low), int(median), int(p95), int(high)


def histogram(values: Sequence[int]) -> list[str]:
    """One line a bin, ``low - high | bar count``; at most _BINS bins of equal whole width, none of them left out."""
    low, high = min(values), max(values)
    width = math.ceil((high - low + 1) / _BINS)
    counts = np.bincount((np.asarray(values) - low) // width)
    labels = [_range(low + bin_ * width, min(low + (bin_ + 1) * width - 1, high)) for bin_ in range(len(counts))]
    pad = max(map(len, labels))
    tallest = counts.max()
    return [
        f"  {label:>{pad}} | {'#' * math.ceil(_BAR * count / tallest)} {count}"
        for label, count in zip(labels, counts.tolist(), strict=True)
    ]


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} - {high}"


# ---- the steps ----


def is_shared(recipe: Recipe) -> bool | None:
    """Whether the responses to a prompt will share a row; None where the model's config cannot be read."""
    if recipe.model.attention == "separate":
        return False
    try:
        return support_for(AutoConfig.from_pretrained(recipe.model.path)).shared
    except (OSError, ValueError):
        return None  # a processor alone is enough to inspect the data


def plan_steps(recipe: Recipe, num_train: int, sizes: Sequence[PairSize], shared: bool | None) -> StepPlan:
    """How ``num_train`` pairs fall into steps, from the recipe and WORLD_SIZE; rows by the ``sizes`` of some of them.

    Raises RecipeError where a batch size is no whole number above 0.
    """
    per_device = _whole(recipe, "per_device_train_batch_size")
    accumulation = _whole(recipe, "gradient_accumulation_steps")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch = per_device * accumulation * world_size
    rows = None
    if shared is not None and sizes:
        rows = global_batch * _rows(sizes, per_device, _row_bound(recipe), shared) / len(sizes)
    return StepPlan(per_device, accumulation, world_size, math.ceil(num_train / global_batch), rows, shared)


def _whole(recipe: Recipe, name: str) -> int:
    default = next(f.default for f in dataclasses.fields(MPOConfig) if f.name == name)
    value = recipe.training.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"training.{name}: expected a whole number above 0, got {value!r}")
    return value


def _row_bound(recipe: Recipe) -> int | None:
    """As the recipe has it, else what suits the machine this is asked on."""
    if "max_tokens_per_row" not in recipe.training:
        here = torch.accelerator.is_available() and not recipe.training.get("use_cpu")
        return row_tokens("cuda" if here else "cpu")
    unbounded = recipe.training["max_tokens_per_row"] is None
    return None if unbounded else _whole(recipe, "max_tokens_per_row")


def row_line(bound: int | None, longest: int) -> str:
    """What decides the memory: tokens that are read at once, by ``max_tokens_per_row`` and the longest pair's."""
    if bound is None:
        return f"tokens read at once: all of a micro-batch; the longest pair here takes {longest}"
    told = f"tokens read at once: at most {bound} (training.max_tokens_per_row); the longest pair here takes {longest}"
    if longest < bound:
        return f"{told}; with a bound of that much it alone decides the memory, and no number changes"
    return told if longest == bound else f"{told}, in a row by itself"


def _rows(sizes: Sequence[PairSize], per_device: int, bound: int | None, shared: bool) -> int:
    """Rows that micro-batches of ``per_device`` pairs come to, packed as training packs them."""
    if not shared:
        return sum(2 if size.rejected else 1 for size in sizes)
    trees = [_tree(size) for size in sizes]
    return sum(len(pack(trees[at : at + per_device], bound)) for at in range(0, len(trees), per_device))


def _tree(size: PairSize) -> PromptTree:
    """A tree of that size; on the meta device its tokens take no memory."""
    lengths = [length for length in (size.chosen, size.rejected) if length]
    return PromptTree(
        torch.empty(size.prompt, device="meta"), tuple(torch.empty(length, device="meta") for length in lengths)
    )


def show_plan(console: Console, plan: StepPlan) -> None:
    """Print pairs and rows a step and steps an epoch."""
    product = f"{plan.per_device} a device x {plan.accumulation} accumulated x {plan.world_size} device(s)"
    print_line(console, f"\npairs per optimizer step: {plan.pairs_per_step} ({product})")
    if plan.rows_per_step is None:
        print_line(console, "rows per optimizer step: not known, the model's config cannot be read")
    else:
        kind = "prompts shared" if plan.shared else "one response a row"
        print_line(console, f"rows per optimizer step: about {plan.rows_per_step:.1f} ({kind})")
    print_line(console, f"optimizer steps per epoch: {plan.steps_per_epoch}")
