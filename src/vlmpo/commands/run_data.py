"""The data of a run, as its recipe says: opened, screened, the held-out part set aside, every pair accounted for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from tqdm.auto import tqdm

from vlmpo.data.dataset import PairDataset, SourceInfo, open_pairs
from vlmpo.data.index.filter import screen, split_hold_out
from vlmpo.data.index.overlap import Item, Overlap, find_overlaps
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.errors import DataError, RecipeError, RecordError
from vlmpo.log import logger, print_line, print_table
from vlmpo.loss import needs_reference
from vlmpo.recipe import Recipe, Source
from vlmpo.train.counts import PairCounts


@dataclass
class RunData:
    """What a run trains and evaluates on.

    Attributes:
        train: pairs to train on, screened.
        evaluation: pairs to evaluate on by name: ``eval`` (the recipe's own), ``held_out`` (of the training data).
        read: training pairs read, by data set.
        held_out: of these, how many were split off, by data set.
        screened: of these, what was dropped before training.
        eval_screened: what was dropped of the recipe's evaluation data.
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
        """What each source was found to be, those of ``train`` and those of ``eval``."""
        named = {"train": self.train, "eval": self.evaluation.get("eval")}
        return {name: pairs.infos for name, pairs in named.items() if pairs is not None}


def open_run_data(recipe: Recipe) -> RunData:
    """Open and screen the recipe's data.

    Raises:
        RecipeError: it names no data to train on.
        DataError: a data set cannot be opened, or nothing is left to train on.
        RecordError: the first bad record, under ``data.on_bad_record: fail``.
    """
    if not recipe.data.train:
        raise RecipeError("data.train: names no data set to train on; give at least one")
    seed = _seed(recipe)
    whole = _open(recipe, recipe.data.train, seed)
    kept, screened, read = _screen(recipe, whole)
    notices = list(whole.notices)
    evaluation: dict[str, PairDataset] = {}
    eval_screened = PairCounts()
    if recipe.data.eval:
        evaluation["eval"], eval_screened = open_eval(recipe)
        notices += evaluation["eval"].notices
    held_out: Counter[str] = Counter()
    if recipe.data.hold_out:
        kept, aside = split_hold_out(whole, kept, recipe.data.hold_out, seed)
        evaluation["held_out"] = whole.select(aside)
        held_out.update(whole.source(int(index)) for index in aside)
    if len(kept) == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in screened.reasons().items())
        raise DataError(f"data.train: of {len(whole)} pairs none is left to train on ({reasons or 'all held out'})")
    notices = list(dict.fromkeys(notices))  # the cache's is the same for all
    return RunData(whole.select(kept), evaluation, read, held_out, screened, eval_screened, notices)


def open_eval(recipe: Recipe) -> tuple[PairDataset, PairCounts]:
    """The pairs of ``data.eval`` that can be used, and what was dropped of them."""
    data = _open(recipe, recipe.data.eval, _seed(recipe))
    kept, screened, _ = _screen(recipe, data)
    return data.select(kept), screened


def _seed(recipe: Recipe) -> int:
    """What draws repeated parts and the held-out images: ``data_seed``, else ``seed``, else transformers' 42."""
    seeds = (recipe.training.get("data_seed"), recipe.training.get("seed"), 42)
    return next(int(seed) for seed in seeds if seed is not None)


def _open(recipe: Recipe, sources: Sequence[Source], seed: int) -> PairDataset:
    specs = [SourceSpec(**source.model_dump()) for source in sources]
    return open_pairs(specs, seed=seed, need_rejected=needs_reference(recipe.loss.weights))


def _screen(recipe: Recipe, data: PairDataset) -> tuple[np.ndarray, PairCounts, Counter[str]]:
    """Indices of the pairs that can be used, what was dropped of the others, and pairs read by data set."""
    with _reading() as progress:
        found = screen(data, progress=progress, waiting=_waits)
    pair_counts = PairCounts()
    for drop in found.dropped:
        error = RecordError(drop.reason, drop.origin, drop.detail)
        if recipe.data.on_bad_record == "fail":
            raise error
        pair_counts.drop(data.source(drop.index), error)
    read = Counter({name: counts.read for name, counts in found.sources.items() if counts.read})
    return found.kept, pair_counts, read


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """What shows how many records were read, where that takes more than a few seconds."""
    every = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log gets a line now and then
    with tqdm(desc="reading records", unit="", delay=3, mininterval=every, maxinterval=every, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _waits(path: str) -> None:
    logger.info(f"note: another process is reading {path} just now; waiting for what it finds")


def overlaps_with_training(data: RunData, others: Mapping[str, Sequence[Item]] | None = None) -> dict[str, Overlap]:
    """For each evaluation set, and each of ``others``, what of it the training pairs show too, by content."""
    evaluations: dict[str, PairDataset | Sequence[Item]] = {**data.evaluation, **(others or {})}
    return find_overlaps(data.train, evaluations) if evaluations else {}


def show_pair_counts(console: Console, data: RunData, trained: PairCounts) -> None:
    """Print what became of every training pair, by data set, and the first records dropped under each reason."""
    dropped = PairCounts.merged([data.screened, trained])
    reasons = list(dropped.reasons())
    rows: list[list[object]] = [["data set", "read", "used", "held out", *reasons, "not reached"]]
    for source, read in data.read.items():
        counts = [trained.used[source], data.held_out[source], *(dropped.dropped[source, r] for r in reasons)]
        rows.append([source, read, *counts, read - sum(counts)])
    print_table(console, "training pairs", rows)
    for reason, messages in dropped.examples.items():
        for message in messages:
            print_line(console, f"  {reason}: {message}")
