"""What a run keeps for its report beside its metrics: margins of its pairs, and a few pairs scored token by token."""

from __future__ import annotations

import heapq
import json
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmpo.fileio import dump_json, replace_text

KEPT_FILE = "report_data.json"
PAIRS_SHOWN = 8  # with the largest margins, and as many with the most negative ones
_CANDIDATES = 4 * PAIRS_SHOWN  # kept of either kind while training: margins move
_MIN_WINDOW, _MAX_WINDOW = 50, 2000  # margins of a histogram


@dataclass(frozen=True)
class ScoredResponse:
    """Holds one response as policy and reference score it at the end of training.

    Attributes:
        tokens: of each shown token its text, the policy's log-prob and the reference's (None: only sums are known);
            tokens that make one character together count as one.
        num_tokens: scored tokens, those that are not shown included.
        policy, reference: log-prob of the whole response, in nats.
    """

    tokens: list[tuple[str, float, float | None]]
    num_tokens: int
    policy: float
    reference: float


@dataclass(frozen=True)
class ScoredPair:
    """Holds one pair of those with the largest or the most negative margin.

    Attributes:
        origin, source: ``file:line`` and data set.
        kind: ``largest`` or ``smallest``, by the margin when it was last seen in training.
        prompt: its text, cut.
        images: thumbnails, encoded files in base64.
        num_media: images and videos of the pair.
        seen_step, seen_margin: the optimizer step before which it was last seen, and its margin then.
        margin: at the end of training.
        chosen, rejected: the responses.
    """

    origin: str
    source: str
    kind: str
    prompt: str
    images: list[str]
    num_media: int
    seen_step: int
    seen_margin: float
    margin: float
    chosen: ScoredResponse
    rejected: ScoredResponse


@dataclass
class KeptData:
    """Holds what one run keeps for its report; of bounded size, however long the run.

    Attributes:
        window: margins in each histogram, at most.
        first, last: (step, margin) of the first and of the last pairs that training saw.
        largest, smallest: (step, margin) by origin of the pairs whose margins were the largest and the smallest when
            last seen.
        pairs: some of them, scored again at the end of training.
    """

    window: int = _MAX_WINDOW
    first: list[tuple[int, float]] = field(default_factory=list)
    last: deque[tuple[int, float]] = field(default_factory=deque)
    largest: dict[str, tuple[int, float]] = field(default_factory=dict)
    smallest: dict[str, tuple[int, float]] = field(default_factory=dict)
    pairs: list[ScoredPair] = field(default_factory=list)

    def plan(self, num_pairs: int) -> None:
        """Set the window for a run that will see ``num_pairs`` pairs, repeats included: a tenth of them."""
        self.window = min(max(num_pairs // 10, _MIN_WINDOW), _MAX_WINDOW)

    def see(self, step: int, margins: Iterable[tuple[str, float]]) -> None:
        """Take in the margins of pairs, by origin, that were seen up to ``step``."""
        for origin, margin in margins:
            if not math.isfinite(margin):
                continue
            if len(self.first) < self.window:
                self.first.append((step, margin))
            self.last.append((step, margin))
            if origin:
                self.largest[origin] = self.smallest[origin] = (step, margin)
        while len(self.last) > self.window:
            self.last.popleft()
        self.largest = dict(heapq.nlargest(_CANDIDATES, self.largest.items(), key=_margin))
        self.smallest = dict(heapq.nsmallest(_CANDIDATES, self.smallest.items(), key=_margin))

    def forget_after(self, step: int) -> None:
        """Forget what was seen after ``step``, from which the run goes on; and the pairs scored at its former end."""
        self.first = [seen for seen in self.first if seen[0] <= step]
        self.last = deque(seen for seen in self.last if seen[0] <= step)
        self.largest = {origin: seen for origin, seen in self.largest.items() if seen[0] <= step}
        self.smallest = {origin: seen for origin, seen in self.smallest.items() if seen[0] <= step}
        self.pairs = []

    def extremes(self) -> list[tuple[str, str, int, float]]:
        """Return (origin, kind, step, margin) of the pairs to show, each once, both kinds in turn."""
        largest = heapq.nlargest(PAIRS_SHOWN, self.largest.items(), key=_margin)
        smallest = heapq.nsmallest(PAIRS_SHOWN, self.smallest.items(), key=_margin)
        found: dict[str, tuple[str, str, int, float]] = {}
        for number in range(PAIRS_SHOWN):
            for kind, pairs in (("smallest", smallest), ("largest", largest)):
                if number < len(pairs):
                    origin, (step, margin) = pairs[number]
                    found.setdefault(origin, (origin, kind, step, margin))
        return list(found.values())

    def write(self, folder: Path) -> None:
        """Write ``report_data.json`` into ``folder``, atomically."""
        replace_text(folder / KEPT_FILE, dump_json({**asdict(self), "last": list(self.last)}) + "\n")


def _margin(item: tuple[str, tuple[int, float]]) -> float:
    return item[1][1]


def read_kept(folder: Path) -> KeptData | None:
    """Return what the run in ``folder`` kept; None if there is nothing, or the file is damaged."""
    try:
        found = json.loads((folder / KEPT_FILE).read_bytes())
        return KeptData(
            window=int(found["window"]),
            first=[(int(step), float(margin)) for step, margin in found["first"]],
            last=deque((int(step), float(margin)) for step, margin in found["last"]),
            largest={str(origin): (int(step), float(margin)) for origin, (step, margin) in found["largest"].items()},
            smallest={str(origin): (int(step), float(margin)) for origin, (step, margin) in found["smallest"].items()},
            pairs=[_pair(pair) for pair in found["pairs"]],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _pair(found: dict[str, Any]) -> ScoredPair:
    responses = {}
    for name in ("chosen", "rejected"):
        response = found[name]
        tokens = [
            (str(text), float(policy), None if reference is None else float(reference))
            for text, policy, reference in response["tokens"]
        ]
        responses[name] = ScoredResponse(
            tokens=tokens,
            num_tokens=int(response["num_tokens"]),
            policy=float(response["policy"]),
            reference=float(response["reference"]),
        )
    return ScoredPair(**{**found, **responses})
