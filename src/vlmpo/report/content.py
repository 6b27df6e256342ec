"""Decide what a report shows: sections with their texts, charts, tables, pairs and answers, from the files of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmpo.errors import shorten
from vlmpo.report.curves import (
    ANSWERED,
    LOGPS,
    LOSS,
    MACHINE,
    REWARDS,
    Chart,
    both_fall,
    charts_of,
    margin_chart,
    source_chart,
)
from vlmpo.report.files import Run
from vlmpo.report.pairs import AnswerView, PairView, answer_views, fitted_thumbnails, pair_views

_RECIPE_SHOWN = 20_000  # characters
_ROWS_SHOWN = 60  # of a table
_KINDS = {
    frozenset({"sigmoid", "bco_pair", "nll"}): "MPO",
    frozenset({"sigmoid"}): "DPO",
    frozenset({"nll"}): "supervised fine-tuning",
}


@dataclass
class Table:
    """Holds a table: its caption, header and rows."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """Holds one section; what is empty is not drawn.

    Attributes:
        id, title: of the section.
        texts, warnings: paragraphs.
        charts, tables: in order.
        pairs: groups of pairs, (title, pairs).
        answers: (title, answers).
        codes: (title, text as it is).
    """

    id: str
    title: str
    texts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pairs: list[tuple[str, list[PairView]]] = field(default_factory=list)
    answers: list[tuple[str, list[AnswerView]]] = field(default_factory=list)
    codes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not any((self.texts, self.warnings, self.charts, self.tables, self.pairs, self.answers, self.codes))


@dataclass(frozen=True)
class Limits:
    """Bounds what a report takes: points of a curve, tokens of a response, characters of all thumbnails together."""

    points: int = 400
    tokens: int = 400
    thumbnails: int = 2_000_000

    def halved(self) -> Limits:
        """Return half of everything."""
        return Limits(max(self.points // 2, 50), self.tokens // 2, self.thumbnails // 2)


@dataclass
class Report:
    """Holds everything a report shows.

    Attributes:
        title: of the page.
        runs: names of the runs, in order of their colours.
        sections: in order.
    """

    title: str
    runs: list[str]
    sections: list[Section]


def report_of(runs: Sequence[Run], limits: Limits, *, curves_only: bool = False) -> Report:
    """Return what the report of ``runs`` shows.

    Args:
        runs: at least one; several are drawn over one another.
        limits: of its size.
        curves_only: without pairs, answers and evaluations: for a run that is under way.
    """
    names = run_names(runs)
    points = max(limits.points // len(runs), 50)
    sections = [
        Section("summary", "What was run", [paragraph(run, name) for run, name in zip(runs, names, strict=True)]),
        Section("loss", "Loss", charts=charts_of(LOSS, runs, names, points)),
        Section("rewards", "Rewards", charts=charts_of(REWARDS, runs, names, points)),
        _log_probs(runs, names, points),
        Section("margins", "Margins of single pairs", charts=margin_chart(runs, names)),
        _data_sets(runs, names, points, curves_only),
        *([] if curves_only else [_pairs(runs, names, limits), _answers(runs, names, points)]),
        Section("machine", "Optimizer, speed and memory", charts=charts_of(MACHINE, runs, names, points)),
        _counts(runs, names),
        _recipes(runs, names),
        _environment(runs, names),
    ]
    sections[0].tables += demo_table(runs)
    several = f"{len(runs)} runs: " if len(runs) > 1 else ""
    return Report(several + ", ".join(names), names, [section for section in sections if not section.is_empty])


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each run, no two alike."""
    short = [shorten(run.name, 40) for run in runs]
    if len(set(short)) < len(short):  # runs/a/run and runs/b/run
        short = [shorten(f"{run.folder.resolve().parent.name}/{run.name}", 40) for run in runs]
    return [name if short.index(name) == at else f"{name} ({at + 1})" for at, name in enumerate(short)]


# ---- the paragraph ----


def paragraph(run: Run, name: str) -> str:
    """Say in a paragraph what was run and how it ended."""
    steps = [log for log in run.logs if "loss" in log]
    last = steps[-1] if steps else {}
    if not steps and not run.manifest:
        return f"{name}: an evaluation. No training was found in its folder."
    loss = _mapping(run.recipe.get("loss"))
    weights = _mapping(loss.get("weights")) or {key[5:]: None for key in last if key.startswith("loss/")}
    kind = _KINDS.get(frozenset(weights) - {"router_aux"}, "a part of MPO's terms")
    terms = ", ".join(
        f"{term} {weight:g}" if isinstance(weight, int | float) else term for term, weight in weights.items()
    )
    model = _mapping(run.recipe.get("model")).get("path") or _mapping(run.manifest.get("model")).get("path")
    on = f" of {shorten(str(model).rstrip('/').split('/')[-1], 60)}" if model else ""
    text = f"{name}: {kind}{on} ({terms})" if terms else f"{name}: training{on}"
    sets = _mapping(_mapping(run.manifest.get("data")).get("sets"))
    read = sum(int(counts.get("read") or 0) for counts in map(_mapping, sets.values()))
    if read:
        text += f", on {read:,} pairs of {len(sets)} data set{'s' * (len(sets) != 1)}"
    elif pairs := _mapping(run.demo.get("pairs")).get("train"):
        text += f", on {pairs:,} pairs of its own right and wrong answers"
    text += f". {_end(run, run.logs[-1].get('step') if run.logs else 0)}"
    figures = []
    for metric, word, form in (
        ("loss", "loss", ".4g"),
        ("rewards/accuracies", "reward accuracy", ".3f"),
        ("rewards/margins", "reward margin", "+.3g"),
    ):
        if isinstance(last.get(metric), int | float):
            figures.append(f"{word} {last[metric]:{form}}")
    if figures:
        text += f" Last logged: {', '.join(figures)}."
    return text


def _end(run: Run, step: Any) -> str:
    """Say how far the run has come."""
    seconds = next((log["train_runtime"] for log in reversed(run.logs) if log.get("train_runtime")), None)
    took = f" in {_duration(seconds)}" if isinstance(seconds, int | float) else ""
    status = run.manifest.get("status")
    started = str(run.manifest.get("started") or "")[:16].replace("T", " ")
    begun = f"Begun {started} UTC, it" if started else "It"
    if status == "failed":
        errors = [entry.get("error") for entry in run.manifest.get("history") or () if isinstance(entry, dict)]
        error = next((error for error in reversed(errors) if error), "")
        return f"{begun} failed after step {step}{': ' if error else ''}{shorten(error, 300)}."
    if status == "interrupted":
        return f"{begun} was interrupted after step {step}."
    if status == "running":
        return f"{begun} had reached step {step} when this was written."
    return f"{begun} {'finished at' if status == 'finished' else 'reached'} step {step}{took}."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def demo_table(runs: Sequence[Run]) -> list[Table]:
    """Return the table of a demo's results; none for other runs."""
    results = next((run.demo for run in runs if run.demo), {})
    rows = []
    for name, arm in _mapping(results.get("arms")).items():
        numbers = [_mapping(arm).get(key) for key in ("accuracy", "low", "high", "unparsed", "worked")]
        if all(isinstance(number, int | float) for number in numbers):
            accuracy, low, high, unparsed, worked = numbers
            interval = f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"
            rows.append([name.replace("_", " "), interval, f"{unparsed:.1%}", f"{worked:.0%}"])
    asked = _mapping(results.get("settings")).get("test_questions", "")
    header = ["arm", "accuracy, 95 % interval", "unparsed", "counts aloud first"]
    return [Table(f"The demo: answers to {asked} held-out questions", header, rows)] if rows else []


# ---- sections ----


def _log_probs(runs: Sequence[Run], names: Sequence[str], points: int) -> Section:
    warned = [(name, warning) for run, name in zip(runs, names, strict=True) if (warning := both_fall(run))]
    warnings = [f"{name}: {warning}" if len(runs) > 1 else warning for name, warning in warned]
    return Section("logps", "Log-probabilities", warnings=warnings, charts=charts_of(LOGPS, runs, names, points))


def _data_sets(runs: Sequence[Run], names: Sequence[str], points: int, curves_only: bool) -> Section:
    section = Section("sources", "By data set", charts=source_chart(runs, names, points))
    for run, name in zip(runs, names, strict=True) if not curves_only else ():
        found = {"final model": _mapping(run.manifest.get("evaluation"))}
        found |= {where: _mapping(evaluation.get("pairs")) for where, evaluation in run.evaluations.items()}
        rows = [
            [shorten(where, 40), *row]
            for where, sets in found.items()
            for set_name, metrics in sets.items()
            for row in _evaluation_rows(set_name, _mapping(metrics))
        ]
        if rows:
            header = ["evaluated", "set", "data set", "pairs", "accuracy, 95 % interval", "margin, 95 % interval"]
            section.tables.append(Table(f"Held-out pairs, {name}", header, rows[:_ROWS_SHOWN]))
    return section


def _evaluation_rows(name: str, metrics: Mapping[str, Any]) -> list[list[str]]:
    prefix = f"{name}_pairs"
    suffixes = [key.removeprefix(prefix) for key in metrics if key == prefix or key.startswith(f"{prefix}/")]
    rows = []
    for suffix in suffixes:
        row = [shorten(name, 40), shorten(suffix[1:], 60) or "all", f"{metrics[prefix + suffix]:g}"]
        for metric, form in (("accuracies", ".3f"), ("margins", "+.3f")):
            values = [metrics.get(f"{name}_rewards/{metric}{end}{suffix}") for end in ("", "_low", "_high")]
            if not all(isinstance(value, int | float) for value in values):
                row.append("")
                continue
            mean, low, high = values
            row.append(f"{mean:{form}} [{low:{form}}, {high:{form}}]")
        rows.append(row)
    return rows


def _pairs(runs: Sequence[Run], names: Sequence[str], limits: Limits) -> Section:
    section = Section("pairs", "Pairs at the ends")
    images = fitted_thumbnails(runs, limits.thumbnails)
    tokens = limits.tokens // len(runs)
    for run, name in zip(runs, names, strict=True):
        of = f", {name}" if len(runs) > 1 else ""
        for kind, words in (("largest", "Largest margins"), ("smallest", "Most negative margins")):
            views = pair_views(run.kept.pairs, kind, tokens, images) if run.kept else []
            if views:
                section.pairs.append((words + of, views))
    if section.pairs:
        section.texts.append(
            "The pairs with the largest and the most negative margin when training last saw them, scored again with "
            "the final weights. A token's colour says how its log-prob moved from the reference's: blue and underlined "
            "if it rose, orange and dotted if it fell, the stronger the more (0.05, 0.25, 1 and 3 nats)."
        )
    elif any(run.kept is not None and run.kept.largest for run in runs):
        section.texts.append("Pairs are scored again at the end of training; this run has not come so far.")
    return section


def _answers(runs: Sequence[Run], names: Sequence[str], points: int) -> Section:
    section = Section("answers", "Answers to held-out questions", charts=charts_of(ANSWERED, runs, names, points))
    for run, name in zip(runs, names, strict=True):
        of = f", {name}" if len(runs) > 1 else ""
        rows = []
        for where, evaluation in run.evaluations.items():
            questions = _mapping(evaluation.get("questions"))
            for model, figures in _mapping(questions.get("models")).items():
                rows.append([shorten(where, 40), shorten(model, 60), *_figures(_mapping(figures))])
        if rows:
            header = ["evaluated", "model", "questions", "accuracy, 95 % interval", "unparsed"]
            section.tables.append(Table(f"Greedy answers{of}", header, rows))
        views, changes = answer_views(run)
        if changes:
            section.tables.append(Table(f"Verdicts before and after{of}", ["before", "after", "questions"], changes))
        if views:
            section.answers.append((f"Examples{of}; changed verdicts first", views))
    return section


def _figures(figures: Mapping[str, Any]) -> list[str]:
    numbers = [figures.get(key) for key in ("items", "accuracy", "low", "high", "unparsed")]
    if not all(isinstance(number, int | float) for number in numbers):
        return [str(figures.get("items", "")), "", ""]
    items, accuracy, low, high, unparsed = numbers
    return [f"{items:g}", f"{accuracy:.3f} [{low:.3f}, {high:.3f}]", f"{unparsed:.1%}"]


def _counts(runs: Sequence[Run], names: Sequence[str]) -> Section:
    section = Section("counts", "Pairs used and dropped")
    for run, name in zip(runs, names, strict=True):
        of = f", {name}" if len(runs) > 1 else ""
        data = _mapping(run.manifest.get("data"))
        rows, reasons = [], []
        for source, counts in _mapping(data.get("sets")).items():
            counts = _mapping(counts)
            dropped = _mapping(counts.get("dropped"))
            numbers = [counts.get("read"), counts.get("used"), counts.get("held_out")]
            numbers += [sum(dropped.values()), counts.get("not_reached")]
            rows.append([shorten(source, 60), *("" if n is None else f"{n:,}" for n in numbers)])
            reasons += [[shorten(source, 60), reason, f"{count:,}"] for reason, count in dropped.items()]
        if rows:
            header = ["data set", "read", "used", "held out", "dropped", "not reached"]
            section.tables.append(Table(f"Pairs in the first epoch{of}", header, rows[:_ROWS_SHOWN]))
        if reasons:
            section.tables.append(
                Table(f"Dropped, by reason{of}", ["data set", "reason", "pairs"], reasons[:_ROWS_SHOWN])
            )
        examples = [shorten(text, 300) for texts in _mapping(data.get("examples")).values() for text in texts]
        if examples:
            section.codes.append((f"First records dropped{of}", "\n".join(examples[:30])))
    if section.tables and not any(table.title.startswith("Dropped") for table in section.tables):
        section.texts.append("No pair was dropped.")
    return section


def _recipes(runs: Sequence[Run], names: Sequence[str]) -> Section:
    section = Section("recipe", "Recipe")
    for run, name in zip(runs, names, strict=True):
        if run.recipe_text:
            section.codes.append((f"recipe.yaml of {name}", run.recipe_text[:_RECIPE_SHOWN]))
    demo = next((run.demo for run in runs if run.demo), {})
    settings = [[key, str(value)] for key, value in _mapping(demo.get("settings")).items()]
    if settings:
        section.tables.append(Table("Settings of the demo", ["setting", "value"], settings))
    return section


def _environment(runs: Sequence[Run], names: Sequence[str]) -> Section:
    facts: dict[str, list[str]] = {}
    for at, run in enumerate(runs):
        manifest = run.manifest
        values: dict[str, Any] = dict(_mapping(manifest.get("versions")))
        values |= {"processes": manifest.get("world_size"), "seed": manifest.get("seed", run.demo.get("seed"))}
        values |= {"reference": manifest.get("reference_hash")}
        hashes = _mapping(_mapping(manifest.get("data")).get("hashes"))
        values |= {
            f"hash of {shorten(str(path).split('/')[-1], 40)}": value for path, value in list(hashes.items())[:20]
        }
        for key, value in values.items():
            if value is not None:
                facts.setdefault(key, [""] * len(runs))[at] = shorten(value, 60)
    rows = [[key, *values] for key, values in facts.items()]
    header = ["", *names] if len(runs) > 1 else ["", "value"]
    return Section("environment", "Environment", tables=[Table("Versions and seeds", header, rows)] if rows else [])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
