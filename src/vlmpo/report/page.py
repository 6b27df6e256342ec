"""Write a report as one HTML page that needs no network and runs no script but its own two."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from vlmpo.fileio import dump_json
from vlmpo.log import shown
from vlmpo.report.content import Report

# Colours of runs, or of the quantities of one run: Okabe and Ito's, which colour-blind people tell apart.
_NUM_COLOURS = 7


def html_page(report: Report) -> str:
    """Return the page.

    All that comes from data passes ``shown`` (no control character) and Jinja's escaping. The curves are JSON in a
    block that is no script, without ``<``. By its content security policy the page loads nothing, runs no script but
    those whose hashes it names, and never evaluates text as code: plotly's lines and bars do not need it.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    scripts = [plotly_script(), _resource("report.js")]
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    template = environment.from_string(_resource("report.html.jinja"))
    return template.render(
        report=report,
        policy=Markup(policy),
        style=Markup(_resource("report.css")),
        scripts=[Markup(script) for script in scripts],
        data=Markup(_json_block(_chart_data(report))),
        colours=_NUM_COLOURS,
    )


def plotly_script() -> str:
    """Return plotly's JavaScript, from its Python package."""
    from plotly.offline import get_plotlyjs  # slow to import

    script: str = get_plotlyjs()
    if re.search(r"</script|<!--", script, re.IGNORECASE):
        raise ValueError("plotly's script cannot stand in a page")
    return script


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _resource(name: str) -> str:
    return files("vlmpo.report").joinpath(name).read_text(encoding="utf-8")


def _visible(value: Any) -> Any:
    """Write control characters out, but of what is markup already."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _json_block(value: Any) -> str:
    """Return JSON that cannot end the element it stands in."""
    return dump_json(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart_data(report: Report) -> dict[str, Any]:
    charts = {}
    for chart in (chart for section in report.sections for chart in section.charts):
        kinds = 1 + max(line.kind for line in chart.lines)
        lines = [{**asdict(line), "label": _plotly_text(line.label)} for line in chart.lines]
        charts[chart.id] = {
            "lines": lines,
            "kinds": kinds,
            "x": chart.x_title,
            "y": chart.y_title,
            "shape": chart.shape,
            "noisy": chart.noisy,
            "log": chart.log and all(value is None or value > 0 for line in chart.lines for value in line.y),
        }
    return {"charts": charts, "runs": len(report.runs)}


def _plotly_text(text: str) -> str:
    """Escape a name for plotly, which reads some HTML in names."""
    return shown(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
