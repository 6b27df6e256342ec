"""What became of every pair: used, or dropped under a reason, by data set. Nothing disappears in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmpo.errors import RecordError

if TYPE_CHECKING:
    from vlmpo.train.batching import Batch

EXAMPLES = 3  # records named per reason; the counts are always whole


@dataclass
class PairCounts:
    """Pairs by what became of them.

    Attributes:
        used: by data set.
        dropped: by data set and reason.
        examples: for each reason, messages of the first few records.
    """

    used: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def is_news(self, error: RecordError) -> bool:
        """Note the error as an example of its reason; whether it is one of the first, worth showing."""
        known = self.examples.setdefault(error.reason, [])
        if len(known) >= EXAMPLES or str(error) in known:
            return False
        known.append(str(error))
        return True

    def add(self, batches: Iterable[Batch]) -> None:
        """Count the pairs of ``batches``."""
        for batch in batches:
            self.used.update(source for part in batch.micro_batches for source in part.sources)
            self.dropped.update((unusable.source, unusable.error.reason) for unusable in batch.dropped)

    def drop(self, source: str, error: RecordError, count: int = 1) -> None:
        """Count a pair that was found unusable before training."""
        self.is_news(error)
        self.dropped[source, error.reason] += count

    @property
    def num_used(self) -> int:
        """Pairs used, of all data sets."""
        return sum(self.used.values())

    @property
    def num_dropped(self) -> int:
        """Pairs dropped, of all data sets and reasons."""
        return sum(self.dropped.values())

    def reasons(self) -> dict[str, int]:
        """Pairs dropped by reason, the most frequent first."""
        total: Counter[str] = Counter()
        for (_, reason), count in self.dropped.items():
            total[reason] += count
        return dict(total.most_common())

    @classmethod
    def merged(cls, parts: Sequence[PairCounts]) -> PairCounts:
        """PairCounts of several ranks or stages in one."""
        whole = cls()
        for part in parts:
            whole.used.update(part.used)
            whole.dropped.update(part.dropped)
            for reason, messages in part.examples.items():
                known = whole.examples.setdefault(reason, [])
                known += [message for message in messages if message not in known][: EXAMPLES - len(known)]
        return whole

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: ``{used: {source: n}, dropped: {source: {reason: n}}, examples: {reason: [..]}}``."""
        dropped: dict[str, dict[str, int]] = {}
        for (source, reason), count in sorted(self.dropped.items()):
            dropped.setdefault(source, {})[reason] = count
        return {"used": dict(sorted(self.used.items())), "dropped": dropped, "examples": self.examples}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PairCounts:
        """Inverse of :meth:`to_json`."""
        dropped = {(s, reason): n for s, reasons in record["dropped"].items() for reason, n in reasons.items()}
        return cls(Counter(record["used"]), Counter(dropped), {k: list(v) for k, v in record["examples"].items()})
