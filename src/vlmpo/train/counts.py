"""Count what became of every pair, by data set: used, or dropped and for what reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vlmpo.errors import DataError, RecordError, first_records
from vlmpo.train.batching import Batch

EXAMPLES = 3  # records named for each reason; all are counted


@dataclass
class PairCounts:
    """Counts used and dropped pairs.

    Attributes:
        used: by data set.
        dropped: by data set and reason.
        examples: for each reason, the messages of the first few records.
        dropped_later: by data set and reason, in later epochs than the first; a pair counts each time.
        empty_steps: optimizer steps without a usable pair, which moved no weight.
    """

    used: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    dropped_later: Counter[tuple[str, str]] = field(default_factory=Counter)
    empty_steps: int = 0

    def drop(self, source: str, error: RecordError) -> None:
        """Count a pair of the data set ``source`` that cannot be used."""
        self.add_example(error.reason, str(error))
        self.dropped[source, error.reason] += 1

    def count(self, batch: Batch, *, first_epoch: bool) -> list[RecordError]:
        """Count the pairs of a batch, and its records that cannot be used; return those that become examples.

        Args:
            batch: the batch.
            first_epoch: whether every record comes for the first time.
        """
        shown = []
        for unusable in batch.dropped:
            if self.add_example(unusable.error.reason, str(unusable.error)):
                shown.append(unusable.error)
            counts = self.dropped if first_epoch else self.dropped_later
            counts[unusable.source, unusable.error.reason] += 1
        if first_epoch:
            self.used.update(source for part in batch.micro_batches for source in part.sources)
        return shown

    def add_example(self, reason: str, message: str) -> bool:
        """Keep ``message`` if it is new and one of the first of its reason; return whether it is."""
        messages = self.examples.setdefault(reason, [])
        is_new = len(messages) < EXAMPLES and message not in messages
        if is_new:
            messages.append(message)
        return is_new

    @property
    def num_dropped(self) -> int:
        """Pairs dropped, of all data sets and for all reasons."""
        return self.dropped.total()

    def reasons(self) -> dict[str, int]:
        """Count dropped pairs by reason, the most frequent first."""
        total: Counter[str] = Counter()
        for (_, reason), count in self.dropped.items():
            total[reason] += count
        return dict(total.most_common())

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Return ``{source: {used: n, dropped: {reason: n}}}``, in alphabetical order."""
        sources = sorted({*self.used, *(source for source, _ in self.dropped)})
        counts: dict[str, dict[str, Any]] = {name: {"used": self.used[name], "dropped": {}} for name in sources}
        for (source, reason), count in sorted(self.dropped.items()):
            counts[source]["dropped"][reason] = count
        return counts

    @classmethod
    def merged(cls, parts: Iterable[PairCounts]) -> PairCounts:
        """Add up the counts of several ranks or stages."""
        total = cls()
        for part in parts:
            total.used.update(part.used)
            total.dropped.update(part.dropped)
            total.dropped_later.update(part.dropped_later)
            total.empty_steps += part.empty_steps
            for reason, messages in part.examples.items():
                for message in messages:
                    total.add_example(reason, message)
        return total

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON: ``{used: {source: n}, dropped: {source: {reason: n}}, examples: {reason: [message]}}``."""
        dropped = {name: counts["dropped"] for name, counts in self.by_source().items() if counts["dropped"]}
        counts = {"used": dict(sorted(self.used.items())), "dropped": dropped, "examples": self.examples}
        return {**counts, **self.mishaps()}

    def mishaps(self) -> dict[str, Any]:
        """Return what should not have happened after the first epoch began, in plain JSON; empty if nothing did."""
        found: dict[str, Any] = {"empty_steps": self.empty_steps} if self.empty_steps else {}
        if self.dropped_later:
            found["dropped_later"] = _nested(self.dropped_later)
        return found

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PairCounts:
        """Return the counts that :meth:`to_json` wrote."""
        return cls(
            used=Counter(record["used"]),
            dropped=_flat(record["dropped"]),
            examples={reason: list(messages) for reason, messages in record["examples"].items()},
            dropped_later=_flat(record.get("dropped_later", {})),
            empty_steps=record.get("empty_steps", 0),
        )


def nothing_left(fault: str, counts: PairCounts, remedy: str = "") -> DataError:
    """Return the error of a run that has nothing, or too little, to train on; it shows the first records dropped.

    Args:
        fault: what was found, without a full stop.
        counts: what became of the pairs.
        remedy: what to do, if the records do not tell.
    """
    reasons = counts.reasons() or dict.fromkeys(counts.examples, 0)
    shown = ", ".join(f"{count} {reason}" if count else reason for reason, count in reasons.items())
    first = first_records({reason: counts.examples.get(reason, []) for reason in {**reasons, **counts.examples}})
    parts = [f"{fault}{f' ({shown})' if shown else ''}", remedy, f"the first: {first}" if first else ""]
    return DataError("; ".join(filter(None, parts)))


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(counts.items()):
        nested.setdefault(source, {})[reason] = count
    return nested


def _flat(counts: dict[str, dict[str, int]]) -> Counter[tuple[str, str]]:
    return Counter({(source, reason): n for source, by in counts.items() for reason, n in by.items()})
