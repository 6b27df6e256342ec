"""The table of verdicts: responses, truths and the verdicts each may get, worked out by hand.

``python -m tests.verifiers.verdict_table [FILE ...]`` prints, by kind: lines, false correct, false wrong, and unparsed
of the lines that allow ``correct``. With ``-v`` also every line outside its ``may_be``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmpo.verifiers.verifiers import verify

TABLE = Path(__file__).with_name("verdicts.jsonl")
COLUMNS = ("lines", "false correct", "false wrong", "outside", "allow correct", "unparsed of these")


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def status(line: dict[str, Any]) -> str:
    return verify(line["response"], line["truth"], line.get("verifier", "auto")).status


def count(lines: Iterable[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Count by kind what came out."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        counted, found = counts[line.get("kind", "visible")], status(line)
        counted["lines"] += 1
        counted["outside"] += found not in line["may_be"]
        for verdict in ("correct", "wrong"):
            counted[f"false {verdict}"] += found == verdict and verdict not in line["may_be"]
        if "correct" in line["may_be"]:
            counted["allow correct"] += 1
            counted["unparsed of these"] += found == "unparsed"
    return counts


def main(arguments: list[str]) -> None:
    paths = [Path(name) for name in arguments if name != "-v"] or [TABLE]
    lines = [line for path in paths for line in read_table(path)]
    counts = count(lines)
    counts["all"] = sum(counts.values(), Counter())
    print(f"{'kind':40}" + "".join(f"{column:>19}" for column in COLUMNS))
    for kind, counted in counts.items():
        print(f"{kind:40}" + "".join(f"{counted[column]:>19}" for column in COLUMNS))
    for line in lines if "-v" in arguments else ():
        if (found := status(line)) not in line["may_be"]:
            print(found, json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:])
