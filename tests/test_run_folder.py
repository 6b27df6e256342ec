"""A run's folder: one process at a time, nothing of others written over, no input as output."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmpo.errors import RunError
from vlmpo.run_folder import STALE, WRITTEN, locked, refuse_foreign, refuse_inputs

KEY = "training.output_dir"


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "train", KEY):
        words = (
            rf"is in use by another vlmpo train \(host {re.escape(socket.gethostname())}, pid {os.getpid()}, since 2"
        )
        with pytest.raises(RunError, match=words), locked(tmp_path / "run", "train", KEY):
            pass
        with locked(tmp_path / "run", "evaluate", KEY):  # another lock
            pass
    with locked(tmp_path / "run", "train", KEY):
        pass
    assert not (tmp_path / "run").exists()  # nothing came into it


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "_train.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "since": "ever"}))
    with locked(tmp_path, "train", KEY):
        assert json.loads((tmp_path / "_train.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("age", "refused"), [(0, True), (STALE - 5, True), (STALE + 5, False), (9999, False)])
def test_on_another_host_signs_of_life_decide(tmp_path: Path, age: float, refused: bool) -> None:
    lock = tmp_path / "_train.lock"
    lock.write_text(json.dumps({"host": "node-7", "pid": 12, "since": "2026-01-01 10:00:00 UTC"}))
    os.utime(lock, (time.time() - age, time.time() - age))
    if not refused:
        with locked(tmp_path, "train", KEY):
            pass
        return
    with pytest.raises(RunError, match=r"\(host node-7, pid 12, since 2026-01-01"), locked(tmp_path, "train", KEY):
        pass
    assert lock.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff", '{"pid": "x"}'])
def test_a_damaged_lock_file_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / "_train.lock").write_text(content)
    with locked(tmp_path, "train", KEY):
        pass


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    with locked(tmp_path, "train", KEY):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        with locked(tmp_path, "train", KEY):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vlmpo.run_folder import locked\n"
        "with locked(Path(sys.argv[1]), 'train', 'k'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(RunError, match=f"pid {holder.pid}"), locked(tmp_path, "train", KEY):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, "train", KEY):
        pass


# ---- what others left ----


@pytest.mark.parametrize(
    "name",
    ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "README.md", "manifest.json", "checkpoint-5"],
)
def test_files_of_others_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match=f"no run of vlmpo wrote.*{re.escape(name)}"):
        refuse_foreign(tmp_path, KEY)


@pytest.mark.parametrize(
    "name", ["slurm-123.out", "train.log", "job.err", "events.out.tfevents.1", "runs/", "wandb/", "notes.txt", "set/"]
)
def test_logs_are_no_hindrance(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("x")
    refuse_foreign(tmp_path, KEY)
    refuse_foreign(tmp_path / "new", KEY)


def test_a_run_of_vlmpo_is_told_by_its_manifest_or_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    (tmp_path / "manifest.json").write_text('{"status": "running"}')
    refuse_foreign(tmp_path, KEY)
    (tmp_path / "manifest.json").write_text('{"name": "an app", "version": 3}')
    with pytest.raises(RunError, match=r"manifest\.json"):
        refuse_foreign(tmp_path, KEY)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "vlmpo_state.json").write_text("{}")
    refuse_foreign(tmp_path, KEY)
    with pytest.raises(RunError, match="is a file; name a folder"):
        refuse_foreign(tmp_path / "model.safetensors", KEY)


# ---- inputs ----


def test_the_model_is_never_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    for output in (model, tmp_path / "link", Path("."), Path("../model"), tmp_path / "x" / ".." / "model"):
        with pytest.raises(RunError, match=r"model\.path and training\.output_dir are the same folder"):
            refuse_inputs({"model.path": str(model)}, output, KEY, WRITTEN, whole=True)
    for output in (model / "run", tmp_path, tmp_path / "other"):  # nothing of it is written over
        refuse_inputs({"model.path": str(model)}, output, KEY, WRITTEN, whole=True)


@pytest.mark.parametrize("inside", ["checkpoint-5", "ema", "metrics.jsonl", "checkpoint-5/adapter"])
def test_nor_is_what_lies_where_it_writes(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True)
    with pytest.raises(RunError, match=r"reference: .* lies where training\.output_dir"):
        refuse_inputs({"reference": str(tmp_path / inside)}, tmp_path, KEY, WRITTEN, whole=True)


def test_globs_are_followed_and_hub_names_are_not(tmp_path: Path) -> None:
    (tmp_path / "hard.jsonl").write_text("")
    with pytest.raises(RunError, match=r"build\.questions: .*hard\.jsonl lies where"):
        refuse_inputs({"build.questions": str(tmp_path / "h*.jsonl")}, tmp_path, KEY, ("hard.jsonl",))
    refuse_inputs({"model.path": "org/name", "x": None, "y": str(tmp_path)}, tmp_path, KEY, ("hard.jsonl",))
