"""``vlmpo train --overwrite`` deletes a run of ours and nothing else; ``--dry-run`` changes nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.tiny_models import model, processor, random_pair
from tests.training import logged
from vlmpo.cli import app
from vlmpo.commands.folder_lock import locked, refuse_if_held
from vlmpo.commands.overwrite import delete, find_old_run
from vlmpo.errors import RunError, VlmpoError
from vlmpo.train.checkpoint_io import STATE_FILE

OURS = ("recipe.yaml", "metrics.jsonl", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json")
INSIDE = ("checkpoint-4/" + STATE_FILE, "_model.partial/x", "ema/model.safetensors", "evaluation/evaluation.json")
FOREIGN = ("notes.txt", "slurm-1.out", "wandb/run", "build/responses.jsonl", "checkpoint-best/model.safetensors")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    put(folder, *OURS, *INSIDE)
    (folder / "checkpoint-4" / STATE_FILE).write_text("{}")
    (folder / "README.md").write_text("trained with vlmpo")
    (folder / "manifest.json").write_text(
        json.dumps({"status": "failed", "versions": {"vlmpo": "1"}, "started": "today"})
    )
    return folder


@pytest.fixture(autouse=True)
def _any_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmpo.commands.overwrite.read_state", lambda path: {"files": {"known": [0, 0]}})


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_a_run_goes_and_what_is_not_its_own_stays(run: Path) -> None:
    put(run, "notes.txt", "slurm-1.out", "wandb/run", "build/responses.jsonl", "evaluation/mine.txt")
    outside = run.parent / "outside"
    put(outside, "weights")
    (run / "checkpoint-8").symlink_to(outside)  # the link goes, not what it leads to
    old = find_old_run(run, {"model.path": str(outside), "data": str(run / "build" / "responses.jsonl")})
    assert old is not None
    assert old.own[-1].name == "manifest.json"
    assert "2 checkpoints; kept, as no run wrote it: build, evaluation/mine.txt, notes.txt" in old.describe()
    delete(old)
    assert names(run) == {"notes.txt", "slurm-1.out", "wandb/run", "build/responses.jsonl", "evaluation/mine.txt"}
    assert names(outside) == {"weights"}
    assert find_old_run(run, {}) is None
    assert find_old_run(run / "absent", {}) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("best.safetensors", "holds best.safetensors, which the run there did not write"),
        ("checkpoint-best/model.safetensors", "holds checkpoint-best, which"),
        ("checkpoint-4/notes.txt", "holds notes.txt, which it was not written with"),
        ("checkpoint-9/model.safetensors", "is no complete checkpoint of vlmpo"),
        ("README.md", "holds README.md"),
    ],
)
def test_files_that_would_be_lost_are_named(run: Path, name: str, words: str) -> None:
    put(run, name)
    before = names(run)
    with pytest.raises(RunError, match=re.escape(words)):
        find_old_run(run, {})
    assert names(run) == before


def test_what_is_no_run_of_ours_is_left_alone(run: Path) -> None:
    (run.parent / "link").symlink_to(run)
    with pytest.raises(RunError, match="is a link to"):
        find_old_run(run.parent / "link", {})
    for inside in (run / "base", run / "checkpoint-4", run):
        inside.mkdir(exist_ok=True)
        with pytest.raises(VlmpoError, match=r"model\.path"):
            find_old_run(run, {"model.path": str(inside)})
    with pytest.raises(VlmpoError, match=r"is where data\.train\.0\.path lies"):
        find_old_run(run, {"data.train.0.path": str(run / "metrics.jsonl")})
    (run / "manifest.json").write_text('{"status": "finished"}')
    with pytest.raises(RunError, match="does not say that vlmpo made this run"):
        find_old_run(run, {})
    (run / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"checkpoints, but no manifest\.json"):
        find_old_run(run, {})


def test_a_folder_in_use_is_refused_without_a_trace(run: Path) -> None:
    refuse_if_held(run, "train", "k")
    assert not (run / "_train.lock").exists()
    with locked(run / "evaluation", "evaluate", "k"), pytest.raises(RunError, match="in use by another vlmpo evaluate"):
        find_old_run(run, {})
    (run / "_train.lock").write_text('{"host": "node-7", "pid": 12}')
    with pytest.raises(RunError, match=r"in use by another vlmpo train \(host node-7, pid 12"):
        refuse_if_held(run, "train", "k")
    os.utime(run / "_train.lock", (0, 0))
    refuse_if_held(run, "train", "k")


# ---- through the command line ----


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("first")
    model().save_pretrained(folder / "tiny")
    processor().save_pretrained(folder / "tiny")
    pairs = [random_pair(seed, images=0) for seed in range(6)]
    lines = [{"question": p.prompt[0].text, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2, "disable_tqdm": True}
    training |= {"use_cpu": True, "save_steps": 2, "logging_steps": 1}
    values = {"model": {"path": "tiny"}, "data": {"train": ["pairs.jsonl"]}, "training": training}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "r.yaml")


def train(recipe: str, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["train", recipe, *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_a_dry_run_trains_and_writes_nothing(recipe: str) -> None:
    """This test is not marked slow: the guard of tests/conftest.py fails it if an optimizer steps."""
    folder = Path(recipe).parent
    before = names(folder)
    said = train(recipe, "--dry-run")
    assert names(folder) == before
    assert not (folder / "run").exists()
    assert "optimizer steps: 3 in all" in said
    assert re.search(r"memory: .* a row of the largest of 8 pairs \(\d+ tokens, 0 patches\), measured", said)
    assert f"run folder: {folder / 'run'}, which would be made" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.optim=nope"], "training: optim cannot be 'nope'"),
        (["training.output_dir=/proc/nowhere/run"], "/proc/nowhere/run: No such file or directory"),
        (["data.max_length=3"], "none is left to train on"),
        (["--overwrite", "training.resume_from_checkpoint=true"], "leave one out"),
        (["model.path=nowhere/else/model"], "no processor can be loaded from nowhere/else/model"),
    ],
)
def test_a_dry_run_fails_as_the_run_would(recipe: str, arguments: list[str], words: str) -> None:
    before = names(Path(recipe).parent)
    assert words in train(recipe, "--dry-run", *arguments, code=2)
    assert names(Path(recipe).parent) == before


@pytest.mark.slow
def test_a_run_is_tried_out_resumed_and_overwritten(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    folder = Path(recipe).parent / "run"
    train(recipe)
    assert "--overwrite to delete it and start anew" in train(recipe, code=2)
    (folder / "notes.txt").write_text("mine")
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    assert "its run is finished" not in train(recipe, "--dry-run", "--overwrite")
    assert "whose run is finished" in train(recipe, "--dry-run", "training.resume_from_checkpoint=true")
    longer = ["training.resume_from_checkpoint=true", "training.num_train_epochs=2"]
    longer += ["--allow-changes", "training.num_train_epochs"]
    assert f"would go on from {folder / 'checkpoint-3'}" in train(recipe, "--dry-run", *longer)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert "no such folder" in train(recipe, "--overwrite", "model.path=./gone", code=2)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before  # a mistake costs no run
    train(recipe, "--overwrite", "training.max_steps=1", "training.seed=3")
    assert [line["step"] for line in logged(folder)] == [1]
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 3
    assert not (folder / "checkpoint-3").exists()
