"""Say, before the first step, what a run is: a summary of some dozen lines."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmpo.data.encode.encoder import EncodedPair, EncodedPairs
from vlmpo.log import aligned, cell, fit, line_width
from vlmpo.train.cached_reference import CachedReference
from vlmpo.train.memory_choice import spread
from vlmpo.train.reference import AdapterReference, Reference

_SETS = 4  # data sets that have a line of their own
_NAME = 40  # columns of a data set's name


@dataclass(frozen=True)
class Opening:
    """Holds what a run is, and shows it.

    Attributes:
        device: type of the device that each rank has.
        ranks: how many.
        precision: in which the model is read and trained.
        parameters: all, and those that train.
        adapter: what kind it is of; None: there is none.
        pairs: to train on.
        sets: of each data set ``read``, ``held_out`` and ``dropped`` (by reason); empty: nobody has counted.
        sizes: of a few pairs: tokens of pair and prompt, and tiles.
        per_device: pairs of a micro-batch.
        accumulation: micro-batches of a step.
        steps, epochs: of the run.
        done: steps of the checkpoint that it goes on from.
        reference: what the policy is compared with.
        memory: what bounds the memory.
        folder: the run's.
        held_out: pairs to evaluate on, by set; the name of a single one may be empty.
    """

    device: str
    ranks: int
    precision: str
    parameters: tuple[int, int]
    adapter: str | None
    pairs: int
    sets: Mapping[str, Mapping[str, Any]]
    sizes: Sequence[tuple[int, int, int]]
    per_device: int
    accumulation: int
    steps: int
    epochs: float
    done: int
    reference: str
    memory: str
    folder: str
    held_out: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the summary, in lines of at most 100 columns, and no more than the terminal has."""
        every, trained = self.parameters
        adapter = "" if self.adapter is None else f"; {self.adapter}"
        step = self.per_device * self.ranks * self.accumulation
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        resumed = f", {self.done} of them done" if self.done else ""
        rows: list[tuple[str, object]] = [
            ("device", f"{self.device}, {ranks}"),
            ("precision", self.precision),
            ("parameters", f"{trained:,} of {every:,} train{adapter}"),
            *self._pairs(),
            ("tokens", self._sizes()),
            ("batch", f"{step} pairs a step: {self.per_device} a device x {ranks} x {self.accumulation} accumulated"),
            ("steps", f"{self.steps}, {self.epochs:g} epoch{'' if self.epochs == 1 else 's'}{resumed}"),
            ("reference", self.reference),
            ("memory", self.memory),
            ("run folder", self.folder),
        ]
        return aligned([row for row in rows if row[1]], line_width())

    def _pairs(self) -> list[tuple[str, object]]:
        total = f"{self.pairs:,} to train on"
        if self.held_out:
            held_out = [
                f"{count:,} in {fit(cell(name), _NAME)}" if name else f"{count:,}"
                for name, count in self.held_out.items()
            ]
            total += f"; to evaluate on {', '.join(held_out[:_SETS])}"
        rows: list[tuple[str, object]] = [("pairs", total)]
        ordered = sorted(self.sets.items(), key=lambda item: -item[1]["read"])
        first = ordered if len(ordered) <= _SETS else ordered[: _SETS - 1]
        rows += [("", f"{fit(cell(name), _NAME)}: {_counts([counts])}") for name, counts in first]
        if rest := [counts for _, counts in ordered[len(first) :]]:
            rows.append(("", f"{len(rest)} more data sets: {_counts(rest)}"))
        return rows

    def _sizes(self) -> str:
        if not self.sizes:
            return ""
        pair, prompt, tiles = (sum(column) / len(self.sizes) for column in zip(*self.sizes, strict=True))
        return (
            f"about {pair:.0f} a pair, {prompt:.0f} of them its prompt; {tiles:.2g} tiles ({len(self.sizes)} looked at)"
        )


def _counts(sets: Sequence[Mapping[str, Any]]) -> str:
    """Return what will become of the pairs of some data sets."""
    read, held_out = (sum(counts[name] for counts in sets) for name in ("read", "held_out"))
    reasons: dict[str, int] = {}
    for counts in sets:
        for reason, count in counts["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    dropped = sum(reasons.values())
    text = f"{read - held_out - dropped:,} of {read:,}"
    if held_out:
        text += f", {held_out:,} held out"
    return f"{text}, {dropped:,} dropped ({', '.join(cell(reason) for reason in reasons)})" if dropped else text


def device_name(device: torch.device) -> str:
    """Return a device as a user knows it, e.g. ``NVIDIA H100 80GB HBM3`` or ``cpu (x86_64)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})" if device.type == "cpu" else device.type


def sizes_of_some(pairs: EncodedPairs) -> list[tuple[int, int, int]]:
    """Return tokens, tokens of the prompt and tiles of a few pairs, spread over the data set."""
    found = (pairs[index] for index in spread(len(pairs)))
    return [(pair.num_tokens, pair.prompt_ids.numel(), pair.tiles) for pair in found if isinstance(pair, EncodedPair)]


def reference_words(reference: Reference | None) -> str:
    """Return what the policy is compared with."""
    if reference is None:
        return "none: only nll is on"
    if isinstance(reference, CachedReference):
        return f"cache of log-probs in {reference.store.folder}"
    if isinstance(reference, AdapterReference):
        return reference.words
    return "a frozen model, kept beside the one that trains"
