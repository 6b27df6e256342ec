"""What a run says on the screen: its lines by hand, on a terminal and in a pipe; and that all get the same names."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from tests.commands.test_train import records, write_data
from tests.paths import REPO
from tests.tiny_models import model, processor
from tests.training import logged, pairs, trainer
from vlmpo import log, quiet
from vlmpo.log import aligned, cell, fit
from vlmpo.train.console import RunConsole, duration, step_line
from vlmpo.train.opening import Opening

HOSTILE = "a_very_long_data_set_name_" * 8 + "\x1b[31mred\x1b]0;title\x07\r"
LOGS = {
    "loss": 0.123456,
    "rewards/margins": 1.5,
    "rewards/accuracies": 0.75,
    "grad_norm": 12.3456,
    "learning_rate": 1e-6,
    "pairs_per_second": 45.678,
    "data_wait_share": 0.25,
}


# ---- lines ----


def test_a_step_by_hand() -> None:
    all_of_it = (
        "step 20/400  loss 0.1235  margin +1.5000  accuracy 0.75  lr 1.00e-06  45.68 pairs/s  waiting 25%  1:02:03 left"
    )
    assert step_line(20, 400, LOGS, 3723.4, 200) == all_of_it.replace("lr", "grad 12.3  lr")
    assert step_line(20, 400, LOGS | {"data_wait_share": 0.02}, 3723.4, 100) == (
        "step 20/400  loss 0.1235  margin +1.5000  accuracy 0.75  lr 1.00e-06  45.68 pairs/s  1:02:03 left"
    )
    assert step_line(20, 400, {"loss": 0.5}, None, 100) == "step 20/400  loss 0.5000"
    assert step_line(100, 400, {"loss": 0.5}, 7, 60, bar=True) == (
        "step 100/400  ━━━━────────────  loss 0.5000  0:07 left"
    )


@pytest.mark.parametrize("width", [12, 30, 60, 80, 100])
def test_no_step_is_wider_than_there_is_room(width: int) -> None:
    wide = dict.fromkeys(LOGS, -1000000000000.0) | {"data_wait_share": 1.0}
    for logs in (LOGS, wide, {}):
        assert cell_len(step_line(123456, 9999999, logs, 1e7, width, bar=True)) <= width


def test_times_by_hand() -> None:
    assert [duration(seconds) for seconds in (0, 7.4, 754, 10921, 183721)] == [
        *("0:00", "0:07", "12:34", "3:02:01", "2 d 3:02:01")
    ]


def test_the_ends_of_a_name_tell() -> None:
    assert fit("abcdefghij", 10) == "abcdefghij"
    assert fit("abcdefghij", 5) == "ab…ij"
    assert cell_len(fit("漢字漢字漢字漢字", 7)) <= 7


def test_a_path_is_folded_or_stands_whole() -> None:
    path = "/a" * 60
    assert all(len(line) <= 100 for line in aligned([("model", path)]))
    assert aligned([("model", f"see {path}")], fold=False) == ["  model  see", f"         {path}"]


def opening(**changes: Any) -> list[str]:
    counts = {"read": 1200, "held_out": 100, "dropped": {"missing_image": 3, "over_long": 4}}
    settings = {
        **{"device": "NVIDIA " * 30, "ranks": 8, "precision": "bf16", "parameters": (2000, 1000), "adapter": None},
        **{"pairs": 1093, "sets": {HOSTILE: counts}, "sizes": [(100, 60, 2), (200, 140, 3)], "per_device": 4},
        **{"accumulation": 2, "steps": 18, "epochs": 1.0, "done": 9, "reference": "r", "memory": "m " * 90},
        **{"folder": "/folder" * 40, "held_out": {HOSTILE: 100}},
    }
    return Opening(**{**settings, **changes}).lines()


def test_an_opening_by_hand() -> None:
    lines = opening()
    assert all(cell_len(line) <= 100 and line == cell(line) for line in lines)
    text = re.sub(r"\s+", " ", " ".join(lines))
    for part in (
        "parameters 1,000 of 2,000 train",
        "1,093 of 1,200, 100 held out, 7 dropped (missing_image, over_long)",
        "tokens about 150 a pair, 100 of them its prompt; 2.5 tiles (2 looked at)",
        "batch 64 pairs a step: 4 a device x 8 ranks x 2 accumulated",
        "steps 18, 1 epoch, 9 of them done",
    ):
        assert part in text


def test_an_opening_of_many_data_sets_is_short() -> None:
    counts = {"read": 10, "held_out": 1, "dropped": {"over_long": 2}}
    sets = {"largest": counts | {"read": 20}, **{f"set {number}": counts for number in range(40)}}
    lines = opening(sets=sets, device="cpu", memory="", folder="run", held_out={})
    assert len(lines) <= 14
    assert lines[4].strip() == "largest: 17 of 20, 1 held out, 2 dropped (over_long)"
    assert lines[7].strip() == "38 more data sets: 266 of 380, 38 held out, 76 dropped (over_long)"


def test_an_evaluation_waits_for_whether_it_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    console, args = RunConsole(), SimpleNamespace(metric_for_best_model="eval_loss", disable_tqdm=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, max_steps=10)
    console.on_train_begin(args, state, None)
    console.evaluated(args, state, {f"eval {HOSTILE}": {"loss": 0.5, "rewards/margins": 1.0}, "eval b": {"loss": 0.25}})
    assert capsys.readouterr().err == ""
    console.judged("best so far")
    first, second = capsys.readouterr().err.splitlines()
    assert len(first) <= 100
    assert first.endswith("step 5/10  loss 0.5000  margin +1.0000")
    assert second == "eval b  step 5/10  loss 0.2500  best so far"
    console.evaluated(args, state, {"eval": {"loss": 1.0}})
    console.close()  # nobody has judged it
    assert capsys.readouterr().err == "eval  step 5/10  loss 1.0000\n"
    state.is_world_process_zero = False
    console.evaluated(args, state, {"eval": {"loss": 1.0}})
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    """A terminal, as far as it is asked."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 100])
def test_the_line_that_moves(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Each of its states is narrower than the terminal; what is logged stays above; at the end the cursor is back."""
    terminal = Terminal()
    screen = Console(file=terminal, force_terminal=True, width=columns, height=40, legacy_windows=False)
    monkeypatch.setattr(log, "stderr", screen)
    console, args = RunConsole(), SimpleNamespace(metric_for_best_model=None, disable_tqdm=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=8)
    console.on_train_begin(args, state, None)
    for step in range(8):
        console.on_step_begin(args, state, None)
        state.global_step = step + 1
        console.on_step_end(args, state, None)
        console.on_log(args, state, None, logs=LOGS)
        console.evaluated(args, state, {"eval": {"loss": step}})
    console.close()
    sent = terminal.getvalue()
    states = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", sent)]
    moving = [line for line in states if line.startswith("step")]
    assert all(cell_len(line) < columns for line in moving)
    bar = "━━━━━━━━────────  " if columns == 100 else ""
    assert any(re.match(rf"step 4/8  {bar}loss 0.1235  .*45.68 pairs/s.*  \d:\d\d left$", line) for line in moving)
    assert [line for line in states if line.startswith("eval")] == [
        f"eval  step {n + 1}/8  loss {n}.0000" for n in range(8)
    ]
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") == 1


# ---- noise ----


class Kept(logging.Handler):
    """Keeps what a logger lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_only_what_the_table_names_is_held_back() -> None:
    library, kept = logging.getLogger("transformers.trainer_utils"), Kept()
    library.addHandler(kept)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.hold_back_noise()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
        library.warning("The tokenizer has new PAD/BOS/EOS tokens that differ from the model config and more")
        library.warning("the weights are damaged")
    library.removeHandler(kept)
    assert [str(one.message) for one in seen] == ["`something_else` is deprecated"]
    assert kept.texts == ["the weights are damaged"]


def test_at_debug_nothing_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet.logger, "isEnabledFor", lambda level: True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.hold_back_noise()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert len(seen) == 1


# ---- one log for all ----


class Reporter(TrainerCallback):
    """Keeps what a reporter such as TensorBoard is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})


@pytest.mark.slow
def test_reporters_get_what_the_file_gets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    trainer(tmp_path, pairs(8), eval_dataset=pairs(3, 20), callbacks=[reporter], **settings).train()
    in_file = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert reporter.logs == in_file
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 4]
    names = rewrite_logs(reporter.logs[0])
    assert {"train/rewards/chosen", "train/rewards/margins", "train/loss/sigmoid", "train/logps/chosen"} <= set(names)
    assert {"eval/rewards/chosen", "eval/loss"} <= set(rewrite_logs(reporter.logs[2]))
    said = capsys.readouterr().err
    assert said.count("  batch       2 pairs a step: 2 a device x 1 rank x 1 accumulated\n") == 1
    assert len(re.findall(r"^step \d/4  loss", said, re.MULTILINE)) == 3
    assert len(re.findall(r"^eval  step [24]/4  loss", said, re.MULTILINE)) == 2


# ---- a real run ----


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with two data sets, one of a hostile name, one record without its image, and a best checkpoint."""
    folder = tmp_path_factory.mktemp("terminal")
    model().save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    lines = records(16)
    lines[3]["image"] = "gone.png"
    write_data(folder, lines)
    entry = {"root": "set/images", "annotation": "set/pairs.jsonl", "repeat_time": 1, "length": 16}
    (folder / "two.json").write_text(json.dumps({"noise": entry, HOSTILE: entry}))
    settings = {
        "model": {"path": "model"},
        "data": {"train": ["two.json"], "hold_out": 0.25, "max_tiles": 2},
        "training": {
            **{"output_dir": "run", "per_device_train_batch_size": 2, "use_cpu": True},
            **{"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "max_steps": 11},
            **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        },
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(settings))
    return folder / "r.yaml"


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    return {**kept, "PYTHONPATH": str(REPO / "src"), "TERM": "xterm-256color"}


COMMAND = (sys.executable, "-m", "vlmpo", "train", "r.yaml")


@pytest.mark.slow
def test_a_run_in_a_pipe(recipe: Path) -> None:
    done = subprocess.run(COMMAND, cwd=recipe.parent, env=environment(), capture_output=True, timeout=300, check=False)
    said, printed = done.stderr.decode(), done.stdout.decode()
    assert done.returncode == 0, said
    assert not re.search(r"[\r\x1b\x07]", said + printed)
    # Whole: nothing but ours. Tables and messages that name files or data are as long as these.
    assert all(
        len(line) <= 100 for line in said.splitlines() if not line.startswith(("waiting for", "best checkpoint"))
    )
    manifest = json.loads((recipe.parent / "run" / "manifest.json").read_text())
    words = re.sub(r"\s+", " ", said)
    for name, counts in manifest["data"]["sets"].items():
        left = counts["read"] - counts["held_out"] - sum(counts["dropped"].values())
        assert left == counts["used"] + counts["not_reached"]
        shown = f"{fit(cell(name), 40)}: {left} of {counts['read']}, {counts['held_out']} held out, 1 dropped"
        assert f"{shown} (missing_image)" in words
        assert any(line.startswith(f"  {cell(name)}  ") for line in printed.splitlines())  # no name is cut
    assert [line.split("  loss")[0] for line in said.splitlines() if re.match("(eval  )?step ", line)] == [
        *("step 1/11", "step 10/11", "eval  step 10/11", "eval  step 11/11")
    ]
    assert said.count("best so far") == 2
    box = printed.split("\ndone\n")[1]
    best = manifest["final_model"]
    assert f"(of step {best['step']}, the best by eval_loss: {best['best_by']['eval_loss']:.4g})" in box
    for command in (
        "try it    vlmpo chat run",
        "report    run/report.html",
        "evaluate  vlmpo evaluate run/recipe.yaml",
    ):
        assert f"  {command}\n" in box
