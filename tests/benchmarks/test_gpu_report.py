"""benchmarks/gpu_report: goals met or not by hand, the table's ratios, runs put together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report


def arm(name: str, pairs: int, seconds: float, **more: Any) -> dict[str, Any]:
    phases = dict.fromkeys(("forward", "backward", "reference", "optimizer", "feeding"), 0.25)
    figures = {"arm": name, "size": "InternVL3", "pairs": pairs, "recomputation": False, "seconds": seconds}
    figures |= {"min": seconds, "max": seconds, "steps": 10, "phases": phases, "pairs_per_second": pairs / seconds}
    return {**figures, **more}


def record() -> dict[str, Any]:
    four = [
        arm("vlmpo, online", 4, 1.5, mfu=0.37, mfu_passes=0.45, peak_gib=60.0),
        arm("vlmpo, cached", 4, 1.25, mfu=0.44, mfu_passes=0.47, peak_gib=44.0, said=["first loss 1.0", "rows: of\n2"]),
        arm("TRL, 1 a micro-batch", 4, 3.5),
        arm("TRL, 4 a micro-batch", 4, 2.9, recomputation=True, steps=2),  # a try that was lucky
        arm("TRL, 4 a micro-batch", 4, 3.0, recomputation=True, fastest=True),
        {"arm": "floor", "size": "InternVL3", "pairs": 4, "recomputation": False, "error": "out of\n memory"},
    ]
    one = [
        arm("vlmpo, cached", 1, 0.3, peak_gib=36.0),
        arm("vlmpo, online", 1, 0.4, peak_gib=48.0),
        arm("TRL, 1 a micro-batch", 1, 0.9, peak_gib=72.0),
        arm("TRL, 1 a micro-batch, Liger", 1, 0.8, peak_gib=64.0),
        arm("vlmpo, cached", 1, 0.4, peak_gib=33.5, recomputation=True),
        arm("floor", 1, 0.4, peak_gib=30.0, recomputation=True),
    ]
    device = {"name": "NVIDIA H100 80GB HBM3", "gib": 79.2, "torch": "2.11.0", "cuda": "13.0"}
    parts = {"device": device, "8B": {"arms": four, "passed": True}, "peaks-8B": {"arms": one}}
    return {"miniature": False, "passed": True, "parts": parts}


def test_goals_by_hand() -> None:
    found = {goal.what: goal for goal in gpu_report.goals(record())}
    verdicts = {what: (goal.verdict, goal.figure.split(" (")[0]) for what, goal in found.items()}
    assert verdicts == {
        "8B, 4 pairs a step, online: MFU of the step": ("met", "37.0%"),
        "8B, 4 pairs a step, online: to TRL's fastest": ("met", "2.00x"),  # 3.0 / 1.5
        "8B, 4 pairs a step, cached: MFU of the step": ("NOT met", "44.0%"),
        "8B, 4 pairs a step, cached: to TRL's fastest": ("NOT met", "2.40x"),
        "1B, 8 pairs a step, online: MFU of the step": ("not measured", "-"),
        "1B, 8 pairs a step, cached: MFU of the step": ("not measured", "-"),
        "8B, 1 pair, cached: peak memory to TRL's": ("met", "0.50x"),
        "8B, 1 pair, online: peak memory to TRL's": ("met", "0.67x"),
        "8B, 1 pair, cached, recomputation: peak memory beside the floor's": ("NOT met", "+3.5 GiB"),
    }
    assert "of 64.0 with Liger" in found["8B, 1 pair, cached: peak memory to TRL's"].figure


def test_a_goal_says_on_how_few_steps_it_was_judged_and_in_miniature_none_is() -> None:
    few = record()
    few["parts"]["8B"]["arms"][0]["steps"] = 3
    few["parts"]["8B"]["arms"][4]["steps"] = 1  # TRL's fastest, beside both arms
    assert [goal.verdict for goal in gpu_report.goals(few)][:4] == [
        *("met, on 3 steps", "met, on 1 step", "NOT met", "NOT met, on 1 step")
    ]
    assert {goal.verdict for goal in gpu_report.goals(few | {"miniature": True})} == {"not measured"}


def test_the_report_names_card_peer_and_what_has_no_figures() -> None:
    text = gpu_report.markdown(record())
    assert text.startswith("# GPU check: NVIDIA H100 80GB HBM3 (79.2 GiB)\n")
    online = next(line for line in text.splitlines() if line.startswith("| InternVL3 | 4 | vlmpo, online |"))
    assert [cell.strip() for cell in online.split("|")][-5:-1] == ["2.67", "2.00x", "37.0% / 45.0%", "60.0"]
    assert "- InternVL3, 4 pairs, floor: out of memory" in text
    assert "- 8B: passed; 1 of 6 arms have no figures" in text
    assert "(fastest)" in text
    assert [line for line in text.splitlines() if "said:" in line] == [
        "- InternVL3, 4 pairs, vlmpo, cached, said: rows: of 2"
    ]


def test_a_part_without_a_table_is_listed() -> None:
    one = record()
    one["parts"]["kernels"] = {"passed": False, "kinds": {"norm": {"error": 0.123456}}}
    one["parts"]["exact"] = {"left_out": "no time was left"}
    text = gpu_report.markdown(one)
    assert "- kinds, norm, error: 0.1235" in text
    assert "- kernels: FAILED" in text
    assert "- exact: left out, no time was left" in text


def test_runs_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = record()
    other["parts"]["device"]["name"] = "NVIDIA H200"
    del other["parts"]["8B"]
    other["parts"]["peaks-8B"]["passed"] = False
    for number, each in enumerate((other, record())):
        (tmp_path / f"{number}.json").write_text(json.dumps(each))
    files = [str(tmp_path / f"{number}.json") for number in (1, 0)]
    monkeypatch.setattr(sys, "argv", ["gpu_report", *files, "--output", str(tmp_path / "out")])
    gpu_report.main()
    both = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {name: part["card"].split(" (")[0] for name, part in both["parts"].items()} == {
        "device": "NVIDIA H200",
        "8B": "NVIDIA H100 80GB HBM3",
        "peaks-8B": "NVIDIA H200",
    }
    assert not both["passed"]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "### 8B\n\nOn NVIDIA H100 80GB HBM3 (79.2 GiB).\n" in text
    assert "### peaks-8B\n\n| model" in text
    cut_short = {"miniature": False, "parts": {"8B": {"unfinished": True}, "head": {"left_out": "no time was left"}}}
    again = gpu_report.merged([both, {**cut_short, "parts": {**cut_short["parts"], "1B": {"unfinished": True}}}])
    assert {name: part["card"] for name, part in again["parts"].items() if name in both["parts"]} == {
        name: part["card"] for name, part in both["parts"].items()
    }
    assert again["parts"]["8B"] == both["parts"]["8B"]
    assert "- 1B: NOT finished, the run ended within it" in gpu_report.checks(again)
    assert not gpu_report.passed({"parts": {"1B": {"unfinished": True}}})


@pytest.mark.parametrize(
    ("text", "told"), [('{"a', "not JSON"), ("[]", "not a gpu.json"), (None, "No such file"), ("{}", "not a gpu.json")]
)
def test_what_cannot_be_read_or_written_is_one_line(
    text: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "gpu.json"
    if text is not None:
        run.write_text(text)
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(run), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        gpu_report.main()
    run.write_text(json.dumps(record()))
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(run), "--output", str(run)])
    with pytest.raises(SystemExit, match=r"error: .*File exists"):
        gpu_report.main()
