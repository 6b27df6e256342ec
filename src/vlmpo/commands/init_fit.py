"""What ``vlmpo init`` settles for the data and the model found: lengths, batches, what fits into memory."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vlmpo.commands.init_found import Found, FoundData, near
from vlmpo.commands.inspect import Encoded, encode_pairs, read_config
from vlmpo.commands.inspect_memory import estimate_memory
from vlmpo.commands.run_data import none_left, open_run_data
from vlmpo.data.dataset import PairDataset, open_pairs
from vlmpo.data.encode.processors import own_tiles, tile_kind
from vlmpo.data.index.filter import Screening, screen, split_hold_out
from vlmpo.data.readers.json import JsonRecords
from vlmpo.data.readers.near_root import find_root
from vlmpo.data.readers.questions import QuestionSet, read_questions
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.errors import DataError, RecipeError, RecordError, VlmpoError, examples_by_reason, first_line, first_records
from vlmpo.log import Progress
from vlmpo.models.families import support_for
from vlmpo.models.loading import load_processor
from vlmpo.recipe import Recipe
from vlmpo.train.batching import tree_of
from vlmpo.train.counts import PairCounts
from vlmpo.train.device_memory import in_units

ENCODED = 200  # pairs encoded for their lengths
_MISSING = {"missing_image", "missing_video"}
_EVALUATED = 500  # held-out pairs that are enough
_ROUND = 256  # tokens


@dataclass
class Fit:
    """Holds what a recipe is written with; None: not known, and left to a placeholder or a default.

    Attributes:
        train, eval: data sets, as the recipe's ``data.train.0`` and ``data.eval.0``, or the questions.
        needs_root: whether the images were not found.
        pairs: usable pairs to train on.
        supervised: whether the data hold no rejected responses.
        questions: usable questions, if pairs are to be made of them first.
        with_answers: whether responses to them can be judged.
        splits: of the questions, those to train and to evaluate on.
        per_device, accumulation: as ``per_device_train_batch_size`` and ``gradient_accumulation_steps``.
        checkpointing, lora, cache: how the model is trained, and where the reference's log-probs come from.
        remarks: why some key is as it is, by key.
        notes: lines for the user.
    """

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    needs_root: bool = False
    pairs: int | None = None
    supervised: bool = False
    questions: int | None = None
    with_answers: bool = True
    splits: tuple[str, str] | None = None
    max_length: int = 8192
    max_tiles: int | None = None
    hold_out: float = 0.0
    epochs: int = 1
    per_device: int = 4
    accumulation: int = 8
    checkpointing: bool = False
    lora: bool = False
    cache: bool = False
    remarks: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of an optimizer step, on as many processes as this machine has cards."""
        return self.per_device * self.accumulation * devices()

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None if the number of pairs is not known."""
        if self.pairs is None:
            return None
        return math.ceil(self.pairs * (1 - self.hold_out) / self.pairs_per_step) * self.epochs


def devices() -> int:
    """Return how many processes this machine trains with."""
    return max(torch.cuda.device_count(), 1)


def fit(found: Found) -> Fit:
    """Settle a recipe for what was found.

    Raises:
        VlmpoError: no pair or question can be used, or the model cannot read them.
    """
    result = Fit()
    if found.train is not None and found.train.kind == "questions":
        _fit_questions(found.train, result)
    elif found.train is not None and found.train.kind == "pairs":
        _fit_pairs(found.train, found.eval, result)
    elif found.train is not None:
        result.train = {"path": found.train.path}
        result.notes.append(f"data: {found.train.path} is taken for a data set of the Hub, which was not looked at")
    _fit_batches(result)
    if found.model is not None:
        _fit_model(found.model, result)
    return result


# ---- data ----


def _fit_pairs(data: FoundData, evaluation: FoundData | None, result: Fit) -> None:
    """Find the images, count the usable pairs and split some off."""
    entry, pairs, screening = _usable(data, need_rejected=True)
    if not len(screening.kept) and not {drop.reason for drop in screening.dropped} <= _MISSING:
        as_examples = _usable(data, need_rejected=False)
        if not len(as_examples[2].kept):
            raise _nothing_usable(data, pairs, screening)
        entry, pairs, screening = as_examples
        result.supervised = True
        result.notes.append(
            "data: no record has a rejected response, so the recipe is of supervised fine-tuning (loss.weights: nll "
            "alone); for MPO make pairs first (vlmpo sample, vlmpo pair)"
        )
    result.train, result.pairs = entry, len(screening.kept) or len(pairs)
    reasons = Counter(drop.reason for drop in screening.dropped)
    dropped = "".join(f", {count} dropped as {reason}" for reason, count in reasons.most_common())
    in_root = f"; images in {near(entry['image_root'])}" if "image_root" in entry else ""
    result.notes.append(f"data: {near(data.path)}: {data.title}, {len(screening.kept)} usable pairs{dropped}{in_root}")
    if not len(screening.kept):
        result.needs_root = True
        result.notes.append(f"images: none of them was found, the first: {screening.dropped[0].detail}")
        return
    if evaluation is not None:
        result.eval, _, kept = _usable(evaluation, need_rejected=not result.supervised)
        if len(kept.kept):
            return
        result.notes.append(f"evaluation: none of the pairs in {near(evaluation.path)} can be used; it is left out")
        result.eval = None
    _fit_hold_out(pairs, screening, result)


def _usable(data: FoundData, need_rejected: bool) -> tuple[dict[str, Any], PairDataset, Screening]:
    """Return a data set's entry of the recipe, with the image root by which most of its pairs can be used."""
    entry: dict[str, Any] = {"path": data.path}
    pairs = open_pairs([SourceSpec(**entry)], need_rejected=need_rejected)
    screening = _screened(pairs)
    roots = set(screening.roots.values())
    if len(roots) == 1 and len(pairs.infos) == 1 and not data.path.endswith(".json"):
        other = {**entry, "image_root": roots.pop()}
        again = open_pairs([SourceSpec(**other)], need_rejected=need_rejected)
        screened_again = _screened(again)
        if len(screened_again.kept) > len(screening.kept):
            return other, again, screened_again
    return entry, pairs, screening


def _screened(pairs: PairDataset) -> Screening:
    with Progress("reading records", 0, "records", transient=True) as progress:
        return screen(pairs, progress=progress.update)


def _nothing_usable(data: FoundData, pairs: PairDataset, screening: Screening) -> DataError:
    counts = PairCounts()
    for drop in screening.dropped:
        counts.drop(pairs.source(drop.index), RecordError(drop.reason, drop.origin, drop.detail))
    return none_left(f"--data {data.path}", len(pairs), "train", counts)


def _fit_hold_out(pairs: PairDataset, screening: Screening, result: Fit) -> None:
    count = len(screening.kept)
    fraction = round(min(0.1, _EVALUATED / count), 4)
    if count < 20:
        result.remarks["hold_out"] = f"{count} pairs are too few to hold some out; name others under eval"
        return
    try:
        split_hold_out(pairs, screening.kept, fraction, 42)
    except RecipeError:
        result.remarks["hold_out"] = "the pairs share too few images to hold some out; name others under eval"
        return
    result.hold_out = fraction
    result.remarks["hold_out"] = "of the pairs, kept for evaluation, split by image"


def _fit_questions(data: FoundData, result: Fit) -> None:
    """Count the usable questions, and find their images."""
    root: str | None = None
    asked = read_questions(data.path, need_answer=False)
    if _share_missing(asked) > 0.5:
        folder = os.path.dirname(data.path)
        root = find_root(folder, names) if (names := _image_names(data.path)) else None
        if root is not None:
            asked = read_questions(data.path, root, need_answer=False)
    result.train = {"path": data.path} | ({"image_root": root} if root else {})
    if not asked.questions:
        if not asked.dropped or {error.reason for error in asked.dropped} - _MISSING:
            examples = first_records(examples_by_reason(asked.dropped))
            raise DataError(f"--data {data.path}: none of its questions can be asked: {examples}")
        result.needs_root = True
        result.notes.append(f"images: none of them was found, the first: {asked.dropped[0].detail}")
    result.questions = len(asked.questions) or len(asked.dropped)
    answered = sum(bool(question.answer.strip()) for question in asked.questions)
    result.with_answers = answered * 2 >= len(asked.questions)
    splits = Counter(question.split for question in asked.questions if question.split)
    tests = [name for name in ("test", "val", "validation", "dev", "eval") if name in splits]
    if "train" in splits and tests:
        result.splits = "train", tests[0]
    judged = f"{answered} with an answer" if answered else "without answers, so that no response can be judged"
    result.notes.append(
        f"data: {near(data.path)}: {result.questions} questions, {judged}. Pairs are to be made first: the model's own "
        "responses to them, right ones and wrong ones"
    )
    if len(asked.dropped) and asked.questions:
        result.notes.append(f"data: {len(asked.dropped)} questions cannot be used: {first_line(asked.dropped[0])}")


def _share_missing(asked: QuestionSet) -> float:
    missing = sum(error.reason in _MISSING for error in asked.dropped)
    return missing / max(len(asked.questions) + len(asked.dropped), 1)


def _image_names(path: str) -> list[str]:
    """Return the relative image paths of the first records."""
    records, names = JsonRecords(path), []
    for index in range(min(8, len(records))):
        try:
            image = records.record(index).get("image")
        except RecordError:
            continue
        first = image[0] if isinstance(image, list) and image else image
        if isinstance(first, str) and first and not os.path.isabs(first):
            names.append(first)
    return names[:3]


# ---- batches ----


def _fit_batches(result: Fit) -> None:
    """Choose the pairs of a step so that a run has some hundred steps, and at most the 256 pairs of InternVL's runs."""
    if (result.pairs is None or result.needs_root) and result.eval is None:
        result.hold_out = 0.1  # there will be enough pairs
        result.remarks["hold_out"] = "of the pairs, kept for evaluation, split by image"
    if result.pairs is not None:
        result.epochs = 3 if result.pairs < 2000 else 1
        wanted = min(max(2 ** int(math.log2(max(result.pairs, 1) / 100 + 1)), 8), 256)
        result.accumulation = max(wanted // (result.per_device * devices()), 1)


# ---- the model ----


def _fit_model(path: str, result: Fit) -> None:
    """Encode some pairs with the model's processor, and choose how it is trained by what fits into memory."""
    is_local = os.path.isdir(path)
    draft = _recipe(path, result)
    try:
        processor = load_processor(path)
    except VlmpoError as error:
        if is_local:
            raise
        result.notes.append(f"model: {path} could not be looked at, so nothing is fitted to it: {first_line(error)}")
        return
    if tile_kind(processor) == "grid":
        result.max_tiles = own_tiles(processor)
        result.remarks["max_tiles"] = "the processor's own"
    if result.pairs is None or result.needs_root:
        result.notes.append("lengths and memory: not fitted, as there are no pairs yet; vlmpo inspect shows them")
        return
    encoded = encode_pairs(draft, open_run_data(draft), processor, num_samples=0, most=ENCODED)
    if not encoded.sizes or encoded.largest is None:
        raise none_left("--data", encoded.dropped.num_dropped, "train", encoded.dropped)
    config = read_config(draft)
    _fit_lengths(encoded, config, result)
    if config is not None:
        _fit_memory(path, config, encoded, result)


def _recipe(path: str, result: Fit, **changes: Any) -> Recipe:
    """Return the recipe that ``result`` stands for, with absolute paths."""
    result = replace(result, **changes)
    training: dict[str, Any] = {"per_device_train_batch_size": result.per_device}
    if result.checkpointing:
        training["activation_checkpointing"] = True
    values = {
        "model": {"path": path} | ({"lora": {"r": 16}, "dtype": "bfloat16"} if result.lora else {}),
        "reference": {"kind": "cache" if result.cache else "auto"},
        "data": {"train": [result.train or {"path": "none.jsonl"}], "max_length": None},
        "loss": {"weights": {"nll": 1.0}} if result.supervised else {},
        "training": training,
    }
    return Recipe.model_validate(values)


def _fit_lengths(encoded: Encoded, config: Any, result: Fit) -> None:
    longest, tiles = max(size.longer for size in encoded.sizes), max(size.tiles for size in encoded.sizes)
    count = len(encoded.sizes)
    of_all = count + encoded.dropped.num_dropped >= (result.pairs or 0) * (1 - result.hold_out)
    wanted = math.ceil(longest * (1 if of_all else 1.5) / _ROUND) * _ROUND
    limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    result.max_length = min(wanted, limit) if isinstance(limit, int) and limit > 0 else wanted
    seen = f"the longest of {count} pairs looked at has {longest} tokens"
    result.remarks["max_length"] = f"of prompt and longer response; {seen}; longer pairs are dropped, and counted"
    if result.max_tiles is not None:
        result.remarks["max_tiles"] += f"; the pairs looked at take up to {tiles}, thumbnails counted"
    result.notes.append(f"lengths: {seen}{f', {tiles} image tiles at most' if tiles else ''}")
    if encoded.dropped.num_dropped:
        examples = first_records(encoded.dropped.examples)
        result.notes.append(f"lengths: {encoded.dropped.num_dropped} of them cannot be encoded: {examples}")


# Tried in this order: what trains most first.
_WAYS: Sequence[tuple[str, dict[str, bool]]] = (
    ("all weights are trained", {}),
    ("all weights are trained, activations computed again", {"checkpointing": True}),
    (
        "all weights are trained, activations computed again, the reference's log-probs from disk",
        {"checkpointing": True, "cache": True},
    ),
    ("a LoRA adapter is trained", {"lora": True}),
    ("a LoRA adapter is trained, activations computed again", {"lora": True, "checkpointing": True}),
)


def _fit_memory(path: str, config: Any, encoded: Encoded, result: Fit) -> None:
    """Choose the first way to train that fits into this machine's memory."""
    assert encoded.largest is not None
    shared = support_for(config).shared
    machine = "" if torch.accelerator.is_available() else "; no accelerator is here, so a run uses the CPU"
    ways = [item for item in _WAYS if not (result.supervised and "cache" in item[1])]  # it needs no reference
    for way, changes in ways:
        recipe = _recipe(path, result, **changes)
        try:
            found = estimate_memory(
                recipe, config, tree_of(encoded.largest), pairs_at_once=result.per_device, shared=shared, card=None
            )
        except VlmpoError:
            raise
        except Exception as error:  # of a family that asks for values
            result.notes.append(f"memory: not estimated for this model ({type(error).__name__}){machine}")
            return
        line = f"{way}: about {in_units(found.resident)} for {found.parts}, {in_units(found.peak)} for a row, of the "
        line += f"{found.where}, estimated"
        if found.fits:
            break
    for name, value in changes.items():
        setattr(result, name, value)
    result.notes.append(f"memory: {line}{machine}")
    if not found.fits:
        result.notes.append(
            "memory: even that does not fit here: train on more or larger cards (docs/distributed.md), lower "
            "data.max_tiles, or take a smaller model"
        )
