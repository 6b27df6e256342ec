"""What a case found, and whether two run folders are the same run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.scene import STEPS

TIMES = ("_seconds", "_per_second", "_runtime", "_share", "_gib")


@dataclass
class Outcome:
    """What a case found.

    Attributes:
        case: its name, with which it is repeated.
        kind: what was done: ``kill``, ``damage``, ``full`` (disk) or ``build``.
        what: what was done in detail.
        result: in a word or two how it ended.
        faults: what must not be; none: it passed.
        kills: starts that were killed.
        while_writing: of these, while a checkpoint was written.
        seconds: it took.
        output: end of what the faulty start printed.
    """

    case: str
    kind: str
    what: str = ""
    result: str = "bit-equal"
    faults: list[str] = field(default_factory=list)
    kills: int = 0
    while_writing: int = 0
    seconds: float = 0.0
    output: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def differences(run: Path, whole: Path) -> list[str]:
    """In what a finished run differs from an uninterrupted one of the same recipe, times aside."""
    found = []
    mine, theirs = _weights(run), _weights(whole)
    if mine.keys() != theirs.keys():
        return [f"final weights: {', '.join(sorted(mine)) or 'none'}, not {', '.join(sorted(theirs))}"]
    found += [f"{name} has other weights" for name in sorted(mine) if mine[name] != theirs[name]]
    found += _metrics_differ(run / "metrics.jsonl", whole / "metrics.jsonl")
    one, other = (json.loads((folder / "manifest.json").read_text()) for folder in (run, whole))
    if one["status"] != "finished":
        found.append(f"the manifest says {one['status']}")
    if one["data"]["sets"] != other["data"]["sets"]:
        found.append(f"the manifest counts {one['data']['sets']}, not {other['data']['sets']}")
    return found


def _weights(run: Path) -> dict[str, str]:
    files = [*run.glob("*.safetensors"), *run.glob("ema/*.safetensors")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _metrics_differ(file: Path, other: Path) -> list[str]:
    try:
        mine, theirs = _metrics(file), _metrics(other)
    except (OSError, ValueError) as error:
        return [f"metrics.jsonl: {error}"]
    if len(mine) != len(theirs):
        found = [f"metrics.jsonl has {len(mine)} lines, not {len(theirs)}"]
        return found + [f"  step {line['step']} is there {mine.count(line)} times" for line in mine[-1:]]
    for one, two in zip(mine, theirs, strict=True):
        if one != two:
            keys = [key for key in {**one, **two} if one.get(key) != two.get(key)]
            return [f"metrics.jsonl differs at step {one.get('step')} in {', '.join(keys)}"]
    return []


def _metrics(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]


def first_step(output: str) -> int | None:
    """The first step that a start printed: it went on from the one before."""
    for line in output.replace("\r", "\n").splitlines():
        words = line.split()
        step, _, steps = words[1].partition("/") if len(words) > 2 else ("", "", "")
        if step.isdecimal() and steps.isdecimal() and (words[0], words[2]) == ("step", "loss"):
            return int(step)
    return None


def is_whole(run: Path) -> bool:
    """Whether a run folder holds all steps in its metrics."""
    file = run / "metrics.jsonl"
    return file.exists() and f'"step": {STEPS}' in file.read_text()
