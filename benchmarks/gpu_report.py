"""What the GPU check found, in Markdown, and what was to be reached; runs of several calls are put together.

    python -m benchmarks.gpu_report RUN/gpu.json OTHER_RUN/gpu.json --output benchmarks/results

writes ``gpu.json`` and ``gpu.md``; a part that several runs have is the last one's that came to its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import Figures
from vlmpo.fileio import replace_text

SHOWN = 40  # figures of a part without a table of its own
_PASSING = ("first loss", "waiting for data", "reference: its log-probs")  # what every run says
_CHECKS = ("device", "alignment", "parity", "start")
_ENOUGH = 10  # steps of a median by which a goal is judged without a remark


@dataclass(frozen=True)
class Goal:
    """Something that was to be reached.

    Attributes:
        what: it is about.
        wanted: the bound in words.
        figure: what was measured, in words.
        met: whether it was reached; None if it was not measured.
        steps: the fewest that one of its seconds is the median of; None: it is no time.
    """

    what: str
    wanted: str
    figure: str
    met: bool | None
    steps: int | None = None

    @property
    def verdict(self) -> str:
        """Return ``met``, ``NOT met`` or ``not measured``, and on how few steps."""
        few = self.met is not None and self.steps is not None and self.steps < _ENOUGH
        remark = f", on {self.steps} step{'s' if self.steps != 1 else ''}" if few else ""
        return {True: "met", False: "NOT met", None: "not measured"}[self.met] + remark


def arms_of(record: Figures, part: str) -> list[Figures]:
    """Return the arms of a part that were measured."""
    return [arm for arm in record["parts"].get(part, {}).get("arms", ()) if "error" not in arm]


def find(arms: list[Figures], name: str, recomputation: bool | None = None) -> Figures | None:
    """Return the first arm of a name that starts with ``name``."""
    named = [arm for arm in arms if arm["arm"].startswith(name)]
    return next((arm for arm in named if recomputation in (None, arm["recomputation"])), None)


def peer_of(arms: list[Figures], arm: Figures) -> Figures | None:
    """Return TRL's fastest setting for the model and the pairs a step of ``arm``."""
    trl = [each for each in arms if each["arm"].startswith("TRL") and _same(each, arm)]
    final = [each for each in trl if each.get("fastest")]
    return min(final or trl, key=lambda each: each["seconds"], default=None)


def _same(one: Figures, other: Figures) -> bool:
    return (one["size"], one["pairs"]) == (other["size"], other["pairs"])


# ---- what was to be reached ----


def goals(record: Figures) -> list[Goal]:
    """Return everything that was to be reached, measured or not: in miniature nothing is."""
    record = {"parts": {}} if record.get("miniature") else record
    found: list[Goal] = []
    for part, pairs, shares, times in (("8B", 4, (0.36, 0.45), (2.0, 2.6)), ("1B", 8, (0.24, 0.30), None)):
        arms = arms_of(record, part)
        for number, kind in enumerate(("online", "cached")):
            about, arm = f"{part}, {pairs} pairs a step, {kind}", find(arms, f"vlmpo, {kind}")
            share = arm and arm.get("mfu")
            found.append(_at_least(f"{about}: MFU of the step", share, shares[number], "{:.1%}", _fewest(arm)))
            if times is not None:
                peer = None if arm is None else peer_of(arms, arm)
                speed = arm["pairs_per_second"] / peer["pairs_per_second"] if arm and peer else None
                beside = f" ({peer['arm']}{_with(peer)}, {peer['seconds']:.3f} s)" if peer else ""
                what, steps = f"{about}: to TRL's fastest", _fewest(arm, peer)
                found.append(_at_least(what, speed, times[number], "{:.2f}x", steps, beside))
    return [*found, *_peaks(arms_of(record, "peaks-8B"))]


def _fewest(*arms: Figures | None) -> int | None:
    return min((arm["steps"] for arm in arms if arm), default=None)


def _at_least(what: str, figure: float | None, bound: float, form: str, steps: int | None, beside: str = "") -> Goal:
    wanted = f"at least {form.format(bound)}"
    if figure is None:
        return Goal(what, wanted, "-", None)
    return Goal(what, wanted, form.format(figure) + beside, figure >= bound, steps)


def _peaks(arms: list[Figures]) -> Iterator[Goal]:
    """Yield the goals of memory: one pair a row, beside TRL without Liger; with it too, if that was measured."""
    plain = next((arm for arm in arms if _plain_trl(arm)), None)
    fused = next((arm for arm in arms if arm["arm"].endswith("Liger") and not arm["recomputation"]), None)
    for kind, bound in (("cached", 0.50), ("online", 0.70)):
        arm, what = find(arms, f"vlmpo, {kind}", False), f"8B, 1 pair, {kind}: peak memory to TRL's"
        if not (arm and plain and "peak_gib" in arm):
            yield Goal(what, f"at most {bound:.2f}x", "-", None)
            continue
        ratio = arm["peak_gib"] / plain["peak_gib"]
        figure = f"{ratio:.2f}x ({arm['peak_gib']:.1f} of {plain['peak_gib']:.1f} GiB"
        figure += f"; of {fused['peak_gib']:.1f} with Liger)" if fused else ")"
        yield Goal(what, f"at most {bound:.2f}x", figure, ratio <= bound)
    arm, floor = find(arms, "vlmpo, cached", True), find(arms, "floor", True)
    what, wanted = "8B, 1 pair, cached, recomputation: peak memory beside the floor's", "at most + 3.0 GiB"
    if arm and floor and "peak_gib" in arm:
        more = arm["peak_gib"] - floor["peak_gib"]
        figure = f"{more:+.1f} GiB ({arm['peak_gib']:.1f} beside {floor['peak_gib']:.1f})"
        yield Goal(what, wanted, figure, more <= 3.0)
    else:
        yield Goal(what, wanted, "-", None)


def _plain_trl(arm: Figures) -> bool:
    return arm["arm"].startswith("TRL") and not arm["recomputation"] and not arm["arm"].endswith("Liger")


def _with(arm: Figures) -> str:
    return ", recomputation" if arm["recomputation"] else ""


# ---- Markdown ----


def markdown(record: Figures) -> str:
    """Return the whole report."""
    device = record["parts"].get("device", {})
    names = ("torch", "transformers", "accelerate", "trl", "liger-kernel")
    versions = ", ".join(f"{name} {device[name]}" for name in names if device.get(name))
    card = f"{device['name']} ({device['gib']:.1f} GiB)" if "name" in device else str(device.get("device", "?"))
    lines = [f"# GPU check: {card}", "", f"`python -m benchmarks.gpu_check`; {versions}, CUDA {device.get('cuda')}."]
    lines += ["Earlier runs: [h100.md](h100.md). All figures: [gpu.json](gpu.json).", ""]
    if record.get("miniature"):
        lines += ["**In miniature: the figures mean nothing.**", ""]
    lines += ["## What was to be reached", "", "| | wanted | measured | |", "|---|---|---|---|"]
    lines += [f"| {goal.what} | {goal.wanted} | {goal.figure} | {goal.verdict} |" for goal in goals(record)]
    lines += ["", "## Checks of numbers", "", *checks(record), ""]
    lines += ["## Whole steps", "", *_LEGEND, ""]
    for name, part in record["parts"].items():
        if part.get("arms"):
            lines += [f"### {name}", "", *_from(part, card), *table(part["arms"]), *chosen(part["arms"]), ""]
    for name, part in record["parts"].items():
        if not part.get("arms") and name not in _CHECKS:
            lines += [f"## {name}", "", *_from(part, card), *_listed(part), ""]
    return "\n".join(lines)


_LEGEND = (
    "Random weights; images of 1,792 image tokens (7 tiles), responses of 150 to 300 tokens. 8B and the Qwens: bf16",
    "weights, SGD; 1B: float32 weights read in bf16, AdamW. Medians of so many steps after a warm-up; forward to",
    "feeding are on the card's own time line (optimizer: with clipping; feeding: waiting for pairs). MFU: 3 times the",
    "forward of every unique token over the card's dense bf16 peak, for the step / for forward and backward alone.",
    "Peak: of a step, the reference gone from the card in cached arms, whose store was filled before. To TRL: pairs a",
    "second to TRL's fastest setting in the table. Floor: forward and backward over the unique tokens, pair by pair.",
)


def _from(part: Figures, card: str) -> list[str]:
    """Return a line that says which card a part ran on if it was another."""
    return [f"On {part['card']}.", ""] if part.get("card", card) != card else []


_COLUMNS = (
    *("model", "pairs", "arm", "s a step (min - max)", "steps"),
    *("forward", "backward", "reference", "optimizer", "feeding", "pairs/s", "to TRL", "MFU", "peak GiB"),
)


def table(arms: list[Figures]) -> list[str]:
    """Return the table of a part's arms; those without figures are listed below."""
    measured = [arm for arm in arms if "error" not in arm]
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *(_cells(arm, peer_of(measured, arm)) for arm in measured)]
    without = [f"- {_named(arm)}: {_short(arm['error'])}" for arm in arms if "error" in arm]
    return [*(f"| {' | '.join(map(str, row))} |" for row in rows), "", *without]


def _cells(arm: Figures, peer: Figures | None) -> list[Any]:
    """Return a row of the table."""
    rows = f", {arm['pairs_a_row']} pairs a row" if "pairs_a_row" in arm and "rows of" not in arm["arm"] else ""
    name = arm["arm"] + rows + _with(arm) + (" (fastest)" if arm.get("fastest") else "")
    speed, phases = arm["pairs_per_second"], arm["phases"]
    return [
        *(arm["size"], arm["pairs"], name, f"{arm['seconds']:.3f} ({arm['min']:.3f} - {arm['max']:.3f})", arm["steps"]),
        *(f"{phases[each]:.3f}" for each in ("forward", "backward", "reference", "optimizer", "feeding")),
        f"{speed:.2f}",
        f"{speed / peer['pairs_per_second']:.2f}x" if peer else "-",
        f"{arm['mfu']:.1%} / {arm['mfu_passes']:.1%}" if "mfu" in arm else "-",
        _peak(arm),
    ]


def chosen(arms: list[Figures]) -> list[str]:
    """Return what vlmpo said that it chose, each line once, with the first arm that said it."""
    said: dict[str, str] = {}
    for arm in arms:
        for line in arm.get("said", ()):
            if not line.startswith(_PASSING):
                said.setdefault(line, _named(arm))
    return [f"- {arm}, said: {' '.join(line.split())}" for line, arm in said.items()]


def _named(arm: Figures) -> str:
    return f"{arm['size']}, {arm['pairs']} pairs, {arm['arm']}{_with(arm)}"


def _peak(arm: Figures) -> str:
    if "peak_gib" not in arm:
        return "-"
    stays = ", with the reference" if arm.get("reference_on_device") else ""
    return f"{arm['peak_gib']:.1f}{stays}"


def checks(record: Figures) -> list[str]:
    """Return a line for each part: whether it passed or what failed, and how many of its arms have no figures."""
    lines = []
    for name, part in record["parts"].items():
        state = {None: "done", True: "passed", False: "FAILED"}[part.get("passed")]
        if "error" in part:
            state = f"FAILED, {_short(str(part['error']).strip().splitlines()[-1])}"
        if "left_out" in part:
            state = f"left out, {part['left_out']}"
        if "unfinished" in part:
            state = "NOT finished, the run ended within it"
        without = [arm for arm in part.get("arms", ()) if "error" in arm]
        tail = f"; {len(without)} of {len(part['arms'])} arms have no figures" if without else ""
        lines.append(f"- {name}: {state}{tail}")
    return lines


def _listed(part: Figures) -> list[str]:
    """Return the figures of a part without a table, a line each, as many as SHOWN."""
    lines = [f"- {path}: {value}" for path, value in _flat(part) if path not in ("seconds", "card")]
    more = [f"- {len(lines) - SHOWN} more in gpu.json"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{path}, {name}" if path else str(name))
    else:
        yield path, f"{value:.4g}" if isinstance(value, float) else _short(str(value))


def _short(text: str) -> str:
    """Return a text in one line of Markdown's table cells."""
    return " ".join(text.split()).replace("|", "/")[:160]


def summary(record: Figures) -> str:
    """Return the goals and the checks in a few plain lines."""
    lines = [f"{goal.verdict:22} {goal.what}: {goal.figure} (wanted {goal.wanted})" for goal in goals(record)]
    return "\n".join(["== what was to be reached", *lines, "== checks", *checks(record)])


# ---- files ----


def write(record: Figures, folder: Path) -> None:
    """Write ``gpu.json`` and ``gpu.md``, each in one step: a run that is killed leaves whole ones.

    Raises:
        OSError: ``folder`` cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "gpu.json", json.dumps(record, indent=1) + "\n")
    replace_text(folder / "gpu.md", markdown(record) + "\n")


def read(path: Path) -> Figures:
    """Return the record of a run.

    Raises:
        ValueError: the file holds none.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as fault:
        raise ValueError(f"{path}: not JSON ({fault})") from fault
    if not (isinstance(record, dict) and isinstance(record.get("parts"), dict) and "miniature" in record):
        raise ValueError(f"{path}: not a gpu.json of benchmarks.gpu_check")
    return record


def passed(record: Figures) -> bool:
    """Return whether no part of a record has failed or was cut short."""
    return all(part.get("passed", True) and "unfinished" not in part for part in record["parts"].values())


def merged(records: list[Figures]) -> Figures:
    """Return one record with the parts of all, each with the name of its card.

    Later ones go before earlier ones, but one that was left out or cut short only before others like it. A record may
    itself be of several runs.
    """
    parts: dict[str, Figures] = {}
    for record in records:
        card = record["parts"].get("device", {})
        name = f"{card['name']} ({card['gib']:.1f} GiB)" if "name" in card else "?"
        for part, figures in record["parts"].items():
            if part not in parts or _has_ended(figures) or not _has_ended(parts[part]):
                parts[part] = {"card": name, **figures}
    whole: Figures = {"miniature": any(record["miniature"] for record in records), "parts": parts}
    return {**whole, "passed": passed(whole)}


def _has_ended(part: Figures) -> bool:
    return "left_out" not in part and "unfinished" not in part


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="gpu.json of each run, the oldest first")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    try:
        record = merged([read(path) for path in options.runs])
        write(record, options.output)
    except (OSError, ValueError) as fault:
        sys.exit(f"error: {fault}")
    print(summary(record))


if __name__ == "__main__":
    main()
