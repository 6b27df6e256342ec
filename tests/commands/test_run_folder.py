"""A run's folder: nothing of others written over, no input as output, and its end in the manifest."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from vlmpo.commands.guard import end_noted
from vlmpo.commands.run_folder import STATUSES, WRITTEN, check_run_folder, read_paths, refuse_inputs
from vlmpo.errors import RecipeError, RunError
from vlmpo.interrupt import Interrupted
from vlmpo.recipe import Recipe

KEY = "training.output_dir"


# ---- what others left ----


@pytest.mark.parametrize(
    "name",
    ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "README.md", "manifest.json", "checkpoint-5"],
)
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    for resume in (None, True):
        with pytest.raises(RunError, match=rf"{re.escape(name)}(, which no run of| is not of a run of) vlmpo"):
            check_run_folder(tmp_path, resume)


@pytest.mark.parametrize(
    "name", ["slurm-123.out", "train.log", "job.err", "events.out.tfevents.1", "runs/", "wandb/", "notes.txt", "set/"]
)
def test_logs_are_no_hindrance(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("x")
    for folder, resume in ((tmp_path, None), (tmp_path, True), (tmp_path / "new", True)):
        assert check_run_folder(folder, resume) is None


def test_a_run_of_vlmpo_is_told_by_its_manifest_or_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    for status in STATUSES:
        (tmp_path / "manifest.json").write_text(json.dumps({"status": status}))
        assert check_run_folder(tmp_path, True) == {"status": status}
        with pytest.raises(RunError, match="already holds a run"):
            check_run_folder(tmp_path, None)
    for content, words in (('{"status": "deployed"}', "is not of a run of vlmpo"), ("{", "cannot be read")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(RunError, match=words):
            check_run_folder(tmp_path, True)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "vlmpo_state.json").write_text("{}")
    assert check_run_folder(tmp_path, True) is None
    with pytest.raises(RunError, match="already holds a run; set"):  # of MPOTrainer, without a manifest
        check_run_folder(tmp_path, None)
    with pytest.raises(RunError, match="is a file; name a folder"):
        check_run_folder(tmp_path / "model.safetensors", None)


# ---- inputs ----


def test_the_model_is_never_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    for output in (model, tmp_path / "link", Path("."), Path("../model"), tmp_path / "x" / ".." / "model"):
        with pytest.raises(RecipeError, match=r"training\.output_dir: .* is where model\.path lies"):
            refuse_inputs({"model.path": str(model)}, output, KEY, WRITTEN, whole=True)
    for output in (model / "run", tmp_path, tmp_path / "other"):  # nothing of it is written over
        refuse_inputs({"model.path": str(model)}, output, KEY, WRITTEN, whole=True)


@pytest.mark.parametrize("inside", ["checkpoint-5", "ema", "metrics.jsonl", "checkpoint-5/adapter"])
def test_nor_is_what_lies_where_it_writes(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"training\.output_dir: .* is where reference lies"):
        refuse_inputs({"reference": str(tmp_path / inside)}, tmp_path, KEY, WRITTEN, whole=True)


def test_globs_are_followed_and_hub_names_are_not(tmp_path: Path) -> None:
    (tmp_path / "hard.jsonl").write_text("")
    with pytest.raises(RecipeError, match=r"is where build\.questions lies \(.*hard\.jsonl\)"):
        refuse_inputs({"build.questions": str(tmp_path / "h*.jsonl")}, tmp_path, KEY, ("hard.jsonl",))
    refuse_inputs({"model.path": "org/name", "y": str(tmp_path)}, tmp_path, KEY, ("hard.jsonl",))


def test_only_what_a_command_reads_is_its_input(tmp_path: Path) -> None:
    """One recipe makes the pairs, trains on them, and evaluates the model it has made."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "B"}')
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(tmp_path / "adapter")},
            "data": {"train": ["run/build/pairs_correctness.jsonl"]},
            "build": {"questions": "questions.jsonl", "output_dir": "run/build"},
            "evaluate": {"model": "run", "questions": "test.jsonl"},
        }
    )
    model = {"model.path": str(tmp_path / "adapter"), "the base model of model.path": "B"}
    data = {"data.train.0.path": "run/build/pairs_correctness.jsonl"}
    asked = {"evaluate.questions": "test.jsonl"}
    assert read_paths(recipe, "pair") == read_paths(recipe, "sample") == {**model, "build.questions": "questions.jsonl"}
    assert read_paths(recipe, "train") == {**model, **data, **asked}
    assert read_paths(recipe, "evaluate") == {**model, **data, **asked, "evaluate.model": "run"}


# ---- the end ----

ENDS = {
    "interrupted": (Interrupted(signal.SIGTERM, 7), {"signal": "SIGTERM", "step": 7}),
    "failed": (RunError("the loss is NaN\nat step 3"), {"error": "the loss is NaN"}),
}


@pytest.mark.parametrize("status", ENDS)
def test_the_end_is_noted(tmp_path: Path, status: str) -> None:
    error, noted = ENDS[status]
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"status": "running", "seed": 1, "history": [{"resumed": "yesterday"}]}))
    with pytest.raises(type(error)), end_noted(tmp_path):
        raise error
    written = json.loads(file.read_text())
    assert (written["status"], written["seed"], written["history"][0]) == (status, 1, {"resumed": "yesterday"})
    assert {key: value for key, value in written["history"][1].items() if key != status} == noted
    assert written["history"][1][status].startswith("20")


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    """An upload that fails, a signal while the last lines are printed."""
    file = tmp_path / "manifest.json"
    for content in ('{"status": "finished"}', "{", None):
        file.write_text(content) if content is not None else file.unlink()
        for error, _ in ENDS.values():
            with pytest.raises(type(error)), end_noted(tmp_path):
                raise error
        assert (file.read_text() if file.exists() else None) == content
