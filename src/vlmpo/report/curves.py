"""Curves of a run's metrics: which there are, thinned out, summarised in a sentence and in a table."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmpo.errors import shorten
from vlmpo.report.files import Run

_TABLE_ROWS = 12
_NAME = 40  # characters of a name from data


@dataclass
class Line:
    """Holds one curve.

    Attributes:
        label: what it is called beside the others.
        run: number of its run.
        kind: number of its quantity in the chart.
        held_out: measured in evaluations, not on training pairs.
        x, y: its points; y None: not finite.
        low, high: bounds of an interval at each point, if there are any.
    """

    label: str
    run: int
    kind: int
    held_out: bool
    x: list[float]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None


@dataclass
class Chart:
    """Holds one chart with all that is written about it.

    Attributes:
        id, title: of the chart.
        note: what is drawn, in a sentence.
        lines: the curves.
        x_title, y_title: of the axes.
        form: how numbers are written.
        shape: ``lines`` or ``histogram``.
        log: whether y is logarithmic.
        noisy: whether a smoothed curve is drawn over a long one.
        summary: a sentence a curve.
        header, rows: some of its values.
    """

    id: str
    title: str
    note: str
    lines: list[Line]
    x_title: str = "optimizer step"
    y_title: str = ""
    form: str = ".4g"
    shape: str = "lines"
    log: bool = False
    noisy: bool = True
    summary: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Spec:
    """Says what a chart draws: ``metrics`` are pairs of a metric's name and its label."""

    id: str
    title: str
    note: str
    metrics: tuple[tuple[str, str], ...]
    y_title: str = ""
    form: str = ".4g"
    with_held_out: bool = True
    log: bool = False
    noisy: bool = True
    scale: float = 1.0


LOSS = (
    Spec("loss", "Loss", "The weighted sum of the terms.", (("loss", "loss"),)),
    Spec(
        "terms",
        "Terms of the loss",
        "Each before its weight.",
        (("loss/sigmoid", "sigmoid (DPO)"), ("loss/bco_pair", "bco_pair"), ("loss/router_aux", "router")),
        with_held_out=False,
    ),
    Spec("nll", "NLL", "The chosen responses' negative log-prob, per token.", (("loss/nll", "nll"),), "nats per token"),
)
REWARDS = (
    Spec(
        "rewards",
        "Rewards",
        "Beta times how far the log-prob of a response has moved from the reference's.",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
        with_held_out=False,
    ),
    Spec(
        "margin",
        "Reward margin",
        "The chosen response's reward less the rejected one's.",
        (("rewards/margins", "margin"),),
    ),
    Spec(
        "accuracy",
        "Reward accuracy",
        "How often the chosen response has the higher reward; not in a tie, as all pairs are before the first step.",
        (("rewards/accuracies", "accuracy"),),
        form=".3f",
    ),
    Spec("delta", "Delta", "The reward shift of the bco_pair term.", (("reward_shift", "delta"),), noisy=False),
)
LOGPS = (
    Spec(
        "logps",
        "Log-probabilities",
        "Of whole responses, by the policy: mean over pairs.",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
        "nats",
        with_held_out=False,
    ),
)
MACHINE = (
    Spec("learning_rate", "Learning rate", "As scheduled.", (("learning_rate", "rate"),), form=".2e", noisy=False),
    Spec("grad_norm", "Gradient norm", "Before clipping.", (("grad_norm", "norm"),), log=True),
    Spec("speed", "Pairs a second", "On all devices together.", (("pairs_per_second", "pairs/s"),), form=".2f"),
    Spec(
        "waiting",
        "Waiting for data",
        "Share of the steps' time.",
        (("data_wait_share", "waiting"),),
        "%",
        form=".1f",
        scale=100.0,
    ),
    Spec(
        "memory",
        "Memory",
        "The most that a process has held so far.",
        (("memory_gib", "memory"),),
        "GiB",
        form=".2f",
        noisy=False,
    ),
)
ANSWERED = (
    Spec("answered", "Answers", "Share of held-out questions answered correctly.", (("answers/accuracy", "accuracy"),)),
)
_SOURCES = re.compile(r"rewards/accuracies/(.+)", re.DOTALL)
_BOUNDS = {
    "rewards/margins": ("rewards/margins_low", "rewards/margins_high"),
    "rewards/accuracies": ("rewards/accuracies_low", "rewards/accuracies_high"),
    "answers/accuracy": ("answers/low", "answers/high"),
}


def charts_of(specs: Sequence[Spec], runs: Sequence[Run], names: Sequence[str], points: int) -> list[Chart]:
    """Return those of the charts for which some run has values, with at most ``points`` points a curve."""
    found = []
    for spec in specs:
        lines: list[Line] = []
        for number, run in enumerate(runs):
            for kind, (metric, label) in enumerate(spec.metrics):
                named = label if len(spec.metrics) > 1 else ""
                lines += _training_line(run, metric, spec, _label(names, number, named), number, kind, points)
                if spec.with_held_out:
                    lines += _held_out_lines(run, metric, names, number, kind, len(spec.metrics), points)
        if lines:
            note = f"{spec.note} Dashed, with points: held out." if any(line.held_out for line in lines) else spec.note
            chart = Chart(spec.id, spec.title, note, lines, y_title=spec.y_title, form=spec.form, log=spec.log)
            chart.noisy = spec.noisy
            found.append(described(chart))
    return found


def source_chart(runs: Sequence[Run], names: Sequence[str], points: int) -> list[Chart]:
    """Return the chart of reward accuracy by data set; none if no run has several. At most eight are drawn."""
    sources = sorted({found[1] for run in runs for log in run.logs[-50:] for key in log if (found := _source(key))})
    metrics = tuple((f"rewards/accuracies/{source}", shorten(source, _NAME)) for source in sources[:8])
    left = f" {len(sources) - 8} more are not drawn." if len(sources) > 8 else ""
    note = f"How often the chosen response has the higher reward, on training pairs.{left}"
    spec = Spec("sources", "Reward accuracy by data set", note, metrics, form=".3f", with_held_out=False)
    return charts_of([spec], runs, names, points) if metrics else []


def _source(key: str) -> re.Match[str] | None:
    return _SOURCES.fullmatch(key)


def _label(names: Sequence[str], run: int, kind: str) -> str:
    parts = [names[run]] if len(names) > 1 else []
    return ", ".join([*parts, *([kind] if kind else [])]) or "training"


def _training_line(run: Run, metric: str, spec: Spec, label: str, number: int, kind: int, points: int) -> list[Line]:
    is_answer = metric.startswith("answers/")
    x, y = [], []
    for log in run.logs:
        value = log.get(metric)
        known = isinstance(value, int | float) and not is_answer
        if "loss" in log and (known or metric in log.get("not_finite", ())):
            x.append(float(log["step"]))
            y.append(None if value is None else float(value) * spec.scale)
    if not any(value is not None for value in y):
        return []
    return [Line(label, number, kind, False, *thinned(x, y, points))]


def _held_out_lines(
    run: Run, metric: str, names: Sequence[str], number: int, kind: int, kinds: int, points: int
) -> list[Line]:
    """Return a curve for each evaluation set in which ``metric`` was measured while training."""
    pattern = re.compile(rf"eval_(?:(.+)_)?{re.escape(metric)}", re.DOTALL)
    by_set: dict[str, list[tuple[float, ...]]] = {}
    for log in run.logs:
        for key in log:
            found = pattern.fullmatch(key)
            if found is None or not isinstance(log[key], int | float):
                continue
            stem = key.removesuffix(metric)
            bounds = [log.get(f"{stem}{bound}", math.nan) for bound in _BOUNDS.get(metric, ("", ""))]
            by_set.setdefault(found[1] or "", []).append((log["step"], log[key], *(_number(b) for b in bounds)))
    lines = []
    for name, seen in list(by_set.items())[:4]:
        x, y, low, high = (list(column) for column in zip(*seen[-points:], strict=True))
        label = _label(names, number, shorten(name, _NAME) if name else "held out")
        has_bounds = all(math.isfinite(value) for value in (*low, *high))
        lines.append(
            Line(label, number, kind, True, x, list(y), list(low) if has_bounds else None, list(high))
            if has_bounds
            else Line(label, number, kind, True, x, list(y))
        )
    return lines


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def thinned(x: Sequence[float], y: Sequence[float | None], points: int) -> tuple[list[float], list[float | None]]:
    """Return at most ``points`` points: means over equal stretches of the curve."""
    if len(x) <= points:
        return list(x), [_rounded(value) for value in y]
    bounds = [round(number * len(x) / points) for number in range(points + 1)]
    new_x, new_y = [], []
    for start, end in itertools.pairwise(bounds):
        finite = [value for value in y[start:end] if value is not None and math.isfinite(value)]
        new_x.append(x[end - 1])
        new_y.append(_rounded(sum(finite) / len(finite)) if finite else None)
    return new_x, new_y


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


# ---- words and tables ----


def described(chart: Chart) -> Chart:
    """Add to a chart of curves a sentence for each, and a table of some of their values."""
    chart.summary = [f"{line.label}: {_sentence(line, chart)}" for line in chart.lines]
    steps = sorted({x for line in chart.lines for x in line.x})
    chosen = [steps[round(number * (len(steps) - 1) / (_TABLE_ROWS - 1))] for number in range(_TABLE_ROWS)]
    chart.header = ["step", *(line.label for line in chart.lines)]
    for step in dict.fromkeys(chosen):
        values = [dict(zip(line.x, line.y, strict=True)).get(step, "") for line in chart.lines]
        chart.rows.append([f"{step:g}", *(_written(value, chart.form) for value in values)])
    return chart


def _written(value: float | str | None, form: str) -> str:
    return value if isinstance(value, str) else "not finite" if value is None else f"{value:{form}}"


def _sentence(line: Line, chart: Chart) -> str:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    if not known:
        return "no finite value"
    unit = f" {chart.y_title}" if chart.y_title else ""
    (first_x, first), (last_x, last) = known[0], known[-1]
    if len(known) == 1:
        return f"{first:{chart.form}}{unit} at step {first_x:g}"
    low, high = min(y for _, y in known), max(y for _, y in known)
    text = f"from {first:{chart.form}} (step {first_x:g}) to {last:{chart.form}}{unit} (step {last_x:g})"
    return f"{text}, between {low:{chart.form}} and {high:{chart.form}}"


# ---- what curves warn of ----


def both_fall(run: Run) -> str | None:
    """Return a warning if the log-probs of both responses have fallen below the reference's; None if not.

    Rewards are compared, not log-probs: of the same pairs, they say what moved. The last tenth of the logged steps
    counts, and a mean within two standard errors of 0 has not moved.
    """
    means = []
    for name in ("rewards/chosen", "rewards/rejected"):
        values = [float(log[name]) for log in run.logs if "loss" in log and isinstance(log.get(name), int | float)]
        last = values[-max(1, len(values) // 10) :]
        if not last or (mean := sum(last) / len(last)) >= 0:
            return None
        error = math.sqrt(sum((value - mean) ** 2 for value in last) / max(1, len(last) - 1) / len(last))
        if mean > -2 * error:
            return None
        means.append(mean)
    beta = _beta(run)
    moved = [f"{abs(mean) / beta:.3g} nats" if beta else f"{abs(mean):.3g} (in rewards)" for mean in means]
    return (
        f"The log-probs of both responses have fallen below the reference's: of the chosen ones by {moved[0]}, of the "
        f"rejected ones by {moved[1]} on average over the last steps. The model may be moving to responses that are in "
        "neither; a larger weight of nll, a larger beta or a lower learning rate holds the chosen ones up."
    )


def _beta(run: Run) -> float | None:
    loss = run.recipe.get("loss")
    beta = loss.get("beta", 0.1) if isinstance(loss, dict) else run.demo.get("settings", {}).get("beta")
    return float(beta) if isinstance(beta, int | float) and beta > 0 else None


# ---- histograms ----


def margin_chart(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Return the chart of margins at the start and at the end of training; none if no run kept any."""
    kept = [(number, run.kept) for number, run in enumerate(runs) if run.kept is not None and run.kept.first]
    if not kept:
        return []
    values = sorted(margin for _, data in kept for _, margin in (*data.first, *data.last))
    low, high = values[len(values) // 200], values[-1 - len(values) // 200]
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = 40
    centres = [float(f"{low + (high - low) * (number + 0.5) / bins:.4g}") for number in range(bins)]
    lines, summary, rows = [], [], []
    for number, data in kept:
        for kind, (when, seen) in enumerate((("start", data.first), ("end", list(data.last)))):
            margins = [margin for _, margin in seen]
            counts = [0] * bins
            for margin in margins:
                counts[min(max(int((margin - low) / (high - low) * bins), 0), bins - 1)] += 1
            label = _label(names, number, when)
            lines.append(Line(label, number, kind, False, centres, [100 * n / len(margins) for n in counts]))
            below = sum(margin <= 0 for margin in margins) / len(margins)
            ordered = sorted(margins)
            tenths = [ordered[round(part * (len(ordered) - 1))] for part in (0.1, 0.5, 0.9)]
            steps = f"steps {seen[0][0]} to {seen[-1][0]}" if seen[0][0] != seen[-1][0] else f"step {seen[0][0]}"
            summary.append(
                f"{label}: {len(margins)} pairs up to {steps.removeprefix('steps ')}, median {tenths[1]:+.3g}"
                if steps.startswith("step ")
                else f"{label}: {len(margins)} pairs of {steps}, median {tenths[1]:+.3g}, {below:.0%} at or below 0"
            )
            rows.append([label, str(len(margins)), *(f"{part:+.3g}" for part in tenths), f"{below:.0%}"])
    note = (
        "Share of pairs, each as it was before the step that trained on it: the first and the last tenth of the pairs "
        "that training saw, at most 2,000 each. The outer bins hold all that lies beyond."
    )
    chart = Chart("margins", "Margins at start and end", note, lines, "reward margin", "% of the pairs", ".1f")
    chart.shape, chart.summary, chart.rows = "histogram", summary, rows
    chart.header = ["", "pairs", "a tenth lies below", "median", "a tenth lies above", "at or below 0"]
    return [chart]
