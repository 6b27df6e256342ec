"""Open the data of a recipe: drop unusable pairs, split off the held-out ones, account for every pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vlmpo.data.dataset import PairDataset, SourceInfo, open_pairs
from vlmpo.data.index.filter import screen, split_hold_out
from vlmpo.data.index.overlap import Item, find_overlaps
from vlmpo.data.readers.near_root import has_files, with_root
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Question
from vlmpo.errors import DataError, RecipeError, RecordError
from vlmpo.log import Progress, logger, print_line, print_table
from vlmpo.loss import needs_reference
from vlmpo.recipe import Recipe, Source
from vlmpo.train.counts import PairCounts, nothing_left


@dataclass
class RunData:
    """The pairs a run trains and evaluates on.

    Attributes:
        train: usable pairs to train on.
        evaluation: pairs to evaluate on by name: ``eval`` (``data.eval``), ``held_out`` (split off the training data).
        read: number of training pairs read, by data set.
        held_out: number of these that were held out, by data set.
        screened: counts of these that were dropped before training.
        eval_screened: counts of the pairs of ``data.eval`` that were dropped.
        notices: remarks on the data sets.
    """

    train: PairDataset
    evaluation: dict[str, PairDataset]
    read: Counter[str]
    held_out: Counter[str]
    screened: PairCounts
    eval_screened: PairCounts
    notices: list[str] = field(default_factory=list)

    def formats(self) -> dict[str, list[SourceInfo]]:
        """Return what was detected about each source, under ``train`` and ``eval``."""
        named = {"train": self.train, "eval": self.evaluation.get("eval")}
        return {name: pairs.infos for name, pairs in named.items() if pairs is not None}


def open_run_data(recipe: Recipe) -> RunData:
    """Open the recipe's data and drop the pairs that cannot be used.

    Raises:
        RecipeError: the recipe names no data to train on.
        DataError: a data set cannot be opened, or no pair is left to train on.
        RecordError: the first bad record, under ``data.on_bad_record: fail``.
    """
    if not recipe.data.train:
        raise RecipeError("data.train: names no data set to train on; give at least one")
    seed = _seed(recipe)
    pairs = _open(recipe, recipe.data.train, seed)
    kept, screened, read = _screen(recipe, pairs)
    notices = list(pairs.notices)
    evaluation: dict[str, PairDataset] = {}
    eval_screened = PairCounts()
    if recipe.data.eval:
        evaluation["eval"], eval_screened = open_eval(recipe)
        notices += evaluation["eval"].notices
    held_out: Counter[str] = Counter()
    if recipe.data.hold_out:
        kept, split_off = split_hold_out(pairs, kept, recipe.data.hold_out, seed)
        evaluation["held_out"] = pairs.select(split_off)
        held_out.update(pairs.source(int(index)) for index in split_off)
    if len(kept) == 0:
        raise none_left("data.train", len(pairs), "train", screened)
    notices = list(dict.fromkeys(notices))  # all data sets repeat the one of the cache
    return RunData(pairs.select(kept), evaluation, read, held_out, screened, eval_screened, notices)


def open_eval(recipe: Recipe) -> tuple[PairDataset, PairCounts]:
    """Return the usable pairs of ``data.eval`` and the counts of those that were dropped.

    Raises:
        DataError: a data set cannot be opened, or no pair is left.
        RecordError: the first bad record, under ``data.on_bad_record: fail``.
    """
    data = _open(recipe, recipe.data.eval, _seed(recipe))
    kept, screened, _ = _screen(recipe, data)
    if len(kept) == 0:
        raise none_left("data.eval", len(data), "evaluate", screened)
    return data.select(kept), screened


def none_left(key: str, total: int, purpose: str, counts: PairCounts) -> DataError:
    """Return the error for data of which nothing can be used; it names the first records and the cause of each."""
    held_out = "" if counts.num_dropped else " (all held out)"
    return nothing_left(f"{key}: of {total} pairs none is left to {purpose} on{held_out}", counts)


def _seed(recipe: Recipe) -> int:
    """Return the seed of repeated parts and of the held-out split: ``data_seed``, else ``seed``, else 42."""
    seeds = (recipe.training.get("data_seed"), recipe.training.get("seed"), 42)
    return next(int(seed) for seed in seeds if seed is not None)


def _open(recipe: Recipe, sources: Sequence[Source], seed: int) -> PairDataset:
    specs = [SourceSpec(**source.model_dump(), confine=recipe.data.confine) for source in sources]
    return open_pairs(specs, seed=seed, need_rejected=needs_reference(recipe.loss.weights))


def _screen(recipe: Recipe, data: PairDataset) -> tuple[np.ndarray, PairCounts, Counter[str]]:
    """Return the indices of the usable pairs, counts of the dropped ones, pairs read by data set, and why each fell."""
    with Progress("reading records", 0, "records", transient=True) as progress:
        screening = screen(data, progress=progress.update, waiting=_report_waiting)
    pair_counts = PairCounts()
    for drop in screening.dropped:
        error = RecordError(drop.reason, drop.origin, drop.detail)
        if (near := screening.roots.get(data.source(drop.index))) is not None:
            error = with_root(error, near)
        if recipe.data.on_bad_record == "fail":
            error.met_by = "node"  # every rank reads the same files
            raise error
        pair_counts.drop(data.source(drop.index), error)
    for name, near in screening.roots.items():
        logger.info(f"data set {name}: {has_files(near)}")
    read = Counter({name: count for name, count in screening.read.items() if count})
    return screening.kept, pair_counts, read


def _report_waiting(path: str) -> None:
    logger.info(f"note: another process is reading {path}; waiting for its result")


def overlaps_with_training(data: RunData, questions: Sequence[Question] = ()) -> dict[str, dict[str, Any]]:
    """Return what the training pairs have in common, by content, with each evaluation set and with ``questions``.

    Whatever there is in common is logged too.
    """
    evaluations: dict[str, PairDataset | Sequence[Item]] = dict(data.evaluation)
    if questions:
        evaluations["questions"] = [
            Item(question.question, (*question.images, *question.videos), question.origin) for question in questions
        ]
    overlaps = find_overlaps(data.train, evaluations) if evaluations else {}
    for message in filter(None, (overlap.message(name) for name, overlap in overlaps.items())):
        logger.info(f"note: {message}")
    return {name: asdict(overlap) for name, overlap in overlaps.items()}


def show_pair_counts(data: RunData, counts: PairCounts, *, trained: bool = True) -> None:
    """Print what became of every training pair, by data set, and the first records dropped for each reason.

    Args:
        counts: pairs used and dropped after ``data`` was opened.
        trained: whether the pairs were trained on; if not, all that remain are shown as kept.
    """
    dropped = PairCounts.merged([data.screened, counts])
    reasons = list(dropped.reasons())
    columns = ["used", "held out", *reasons, "not reached"] if trained else ["kept", "held out", *reasons]
    rows: list[list[object]] = [["data set", "read", *columns]]
    for source, read in data.read.items():
        removed = [data.held_out[source], *(dropped.dropped[source, reason] for reason in reasons)]
        kept, used = read - sum(removed), counts.used[source]
        rows.append([source, read, used, *removed, max(0, kept - used)] if trained else [source, read, kept, *removed])
    print_table("training pairs", rows)
    show_examples(dropped)


def show_examples(counts: PairCounts) -> None:
    """Print the first records dropped for each reason."""
    for reason, messages in counts.examples.items():
        for message in messages:
            print_line(f"  {reason}: {message}")
