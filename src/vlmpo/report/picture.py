"""Draw the main curves of runs as one PNG."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from vlmpo.log import shown
from vlmpo.report.content import Report
from vlmpo.report.curves import Chart, Line

_PANELS = ("loss", "rewards", "margin", "accuracy", "logps", "margins", "nll", "delta")  # the first six there are
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0558f", "#a87b00", "#2f9bd6", "#555555")
_STYLES = ("-", ":", "-.", "--")


def png_picture(report: Report) -> bytes | None:
    """Return the picture, 1200 pixels wide; None if the report has no curves."""
    charts = {chart.id: chart for section in report.sections for chart in section.charts}
    panels = [charts[name] for name in _PANELS if name in charts][:6]
    if not panels:
        return None
    import matplotlib  # slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with matplotlib.rc_context(style):
        across = min(3, len(panels))
        down = -(-len(panels) // across)
        figure = Figure(figsize=(4 * across, 2.7 * down), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        for number, chart in enumerate(panels):
            _draw(figure.add_subplot(down, across, number + 1), chart, len(report.runs))
        file = io.BytesIO()
        figure.savefig(file, format="png")
    small = io.BytesIO()  # a fixed palette takes a third of the bytes
    with Image.open(file) as image:
        image.convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def _draw(axes: Any, chart: Chart, runs: int) -> None:
    axes.set_title(chart.title, loc="left", fontsize=10, fontweight="bold")
    kinds = 1 + max(line.kind for line in chart.lines)
    for line in chart.lines:
        colour = _COLOURS[(line.run if runs > 1 else line.kind + kinds * line.held_out) % len(_COLOURS)]
        styles = (":", "-") if chart.shape == "histogram" else _STYLES  # the end is what counts
        style = "--" if line.held_out else styles[line.kind % len(styles)] if runs > 1 else "-"
        unnamed = runs > 1 and line.held_out  # its colour tells
        _plot(axes, line, "" if unnamed else line.label, colour, style, chart.shape == "histogram")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_xlabel(chart.x_title, fontsize=8)
    axes.set_ylabel(chart.y_title, fontsize=8)
    if len(chart.lines) > 1:
        axes.legend(fontsize=7, frameon=False)


def _plot(axes: Any, line: Line, name: str, colour: str, style: str, is_histogram: bool) -> None:
    y = [float("nan") if value is None else value for value in line.y]
    label = f" {shown(name)}" if name else None  # matplotlib leaves names that begin with _ out
    drawstyle = "steps-mid" if is_histogram else "default"
    marker = "o" if line.held_out or len(y) < 12 else ""
    axes.plot(
        line.x, y, style, color=colour, linewidth=1.4, label=label, drawstyle=drawstyle, marker=marker, markersize=3
    )
