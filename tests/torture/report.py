"""What was found, as tables and as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.torture.outcome import Outcome

TITLES = {
    "kill": "kills of `vlmpo train`",
    "damage": "damaged checkpoints",
    "full": "full disks",
    "build": "kills of `cache`, `sample`, `pair`",
}


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row for each kind of case."""
    rows = []
    for kind, title in TITLES.items():
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if not of_kind:
            continue
        rows.append(
            {
                "what": title,
                "cases": len(of_kind),
                "kills": sum(outcome.kills for outcome in of_kind),
                "while a checkpoint was written": sum(outcome.while_writing for outcome in of_kind),
                "results": dict(Counter(outcome.result for outcome in of_kind).most_common()),
                "cases with faults": sum(bool(outcome.faults) for outcome in of_kind),
            }
        )
    return rows


def table(outcomes: Sequence[Outcome]) -> str:
    """The summary as a table in Markdown."""
    lines = [
        "| | cases | kills | of them while a checkpoint was written | results | faults |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for row in summary(outcomes):
        results = ", ".join(f"{count} {result}" for result, count in row["results"].items())
        cells = [row["what"], row["cases"], row["kills"], row["while a checkpoint was written"], results]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['cases with faults']} |")
    return "\n".join(lines)


def show_fault(outcome: Outcome, seed: int) -> None:
    """Print a case with faults, and the command that repeats it alone."""
    print(f"\nFAULT {outcome.case}: {outcome.what}")
    for fault in outcome.faults:
        print(f"  {fault}")
    print(f"  again: python -m tests.torture --seed {seed} --only {outcome.case}", flush=True)


def groups(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Faults that read alike, with their cases; the most frequent first."""
    found: dict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        for fault in outcome.faults:
            words = [word for word in fault.split() if "/" not in word and not any(sign.isdigit() for sign in word)]
            found[" ".join(words)[:100]].append(outcome.case)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def write(path: Path, outcomes: Sequence[Outcome], seed: int, seconds: float) -> None:
    """Write all outcomes as JSON."""
    content = {
        "seed": seed,
        "seconds": round(seconds),
        "python": sys.version.split()[0],
        "summary": summary(outcomes),
        "faults": groups(outcomes),
        "cases": [outcome.to_json() for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
