"""SIGTERM and Ctrl-C to whole runs, and two runs of one folder: exit codes, checkpoints, messages, what goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.test_train import call, checkpoint, manifest, records, write_data, write_recipe  # noqa: F401
from tests.paths import REPO
from tests.training import logged

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# A worker at its second step, which takes long; then the signal is in the middle of it.
SLOW_STEP = """
import sys, time
from vlmpo.train.trainer import MPOTrainer
step = MPOTrainer.training_step
def slow(self, *given, **named):
    if self.state.global_step == 1:
        print("IN STEP 2", flush=True)
        time.sleep({seconds})
    return step(self, *given, **named)
MPOTrainer.training_step = slow
from vlmpo.cli import main
sys.argv[0] = "vlmpo"
main()
"""

SLOW_LOADING = """
import sys, time
from vlmpo.commands import train
def slow(recipe):
    print("LOADING", flush=True)
    time.sleep(60)
train.open_run_data = slow
from vlmpo.cli import main
sys.argv[0] = "vlmpo"
main()
"""


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path) -> str:  # noqa: F811
    write_data(tmp_path, records(12))
    training = {"max_steps": 400, "save_strategy": "steps", "save_steps": 1000, "dataloader_num_workers": 1}
    return write_recipe(tmp_path, checkpoint, training=training)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], text: str, *, errors: bool = False) -> None:
    """Wait until the process has printed ``text``; ``errors``: on stderr, as what is logged."""
    stream = process.stderr if errors else process.stdout
    assert stream is not None
    for line in stream:
        if text in line:
            return
    pytest.fail(f"it ended: {process.stderr.read() if process.stderr else ''}")


def last_line(errors: str) -> str:
    return errors.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_is_finished_and_a_checkpoint_written(tmp_path: Path, recipe: str, number: int, code: int) -> None:
    run = start("-c", SLOW_STEP.format(seconds=1), "train", recipe)
    wait_for(run, "IN STEP 2")
    os.killpg(run.pid, number)  # the loader's workers get it too
    time.sleep(0.3)
    os.killpg(run.pid, number)  # as launchers do
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code, errors
    assert "Traceback" not in errors
    name = signal.Signals(number).name
    assert last_line(errors) == (
        f"interrupted by {name} after step 2, whose checkpoint is written; to go on: vlmpo train {recipe} "
        "training.resume_from_checkpoint=true"
    )
    assert errors.count("a second") == 1
    assert (tmp_path / "run" / "checkpoint-2" / "vlmpo_state.json").is_file()
    assert not list((tmp_path / "run").glob("_*"))
    found = manifest(tmp_path)
    assert found["status"] == "interrupted"
    assert found["history"][-1] | {"interrupted": ""} == {"interrupted": "", "signal": name, "step": 2}
    again = call("train", recipe, "training.resume_from_checkpoint=true", "training.max_steps=4")
    assert again.exit_code == 0, again.output
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4]
    assert manifest(tmp_path)["status"] == "finished"


@pytest.mark.slow
def test_a_second_signal_ends_it_within_the_step(tmp_path: Path, recipe: str) -> None:
    run = start("-c", SLOW_STEP.format(seconds=60), "train", recipe)
    wait_for(run, "IN STEP 2")
    for pause in (0.5, 2.0, 0.0):
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        time.sleep(pause)
    _, errors = run.communicate(timeout=5)
    assert run.returncode == 143
    assert last_line(errors) == "interrupted by SIGTERM: ended at once"
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_two_runs_of_one_folder(tmp_path: Path, recipe: str) -> None:
    """The second is refused by name and leaves the first alone; once that is killed, the folder is free."""
    first = start("-m", "vlmpo", "train", recipe)
    wait_for(first, "step 2/", errors=True)
    for further in ((), ("training.resume_from_checkpoint=true",)):
        second = call("train", recipe, *further)
        assert second.exit_code == 2
        assert f"is in use by another vlmpo train (host {os.uname().nodename}, pid {first.pid}, since" in second.output
    assert first.poll() is None
    first.kill()
    first.wait()
    third = call("train", recipe)
    assert "is in use" not in third.output


@pytest.mark.slow
def test_outside_of_steps_it_ends_at_once(tmp_path: Path, recipe: str) -> None:
    run = start("-c", SLOW_LOADING, "train", recipe)
    wait_for(run, "LOADING")
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=30)  # of the 60 it would load; taking torch down takes some
    assert run.returncode == 143
    assert last_line(errors).startswith("interrupted by SIGTERM; to go on: vlmpo train")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_ranks_stop_after_the_same_step(tmp_path: Path, recipe: str) -> None:
    run = start(*TORCHRUN, "-m", "vlmpo", "train", recipe, "training.ddp_backend=gloo")
    wait_for(run, "step 2/", errors=True)
    ranks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True, check=True)
    one = int(ranks.stdout.split()[-1])
    os.kill(one, signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1  # torchrun's own
    assert errors.count("exitcode  : 143") == 2, errors[-3000:]
    assert errors.count("interrupted by SIGTERM after step") == 1
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    state = json.loads((saved / "trainer_state.json").read_text())
    assert state["global_step"] == manifest(tmp_path)["history"][-1]["step"] == int(saved.name.split("-")[1])
    assert manifest(tmp_path)["status"] == "interrupted"


@pytest.mark.slow
def test_the_model_is_not_trained_over(tmp_path: Path, recipe: str, checkpoint: Path) -> None:  # noqa: F811
    before = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(checkpoint)
    for output in (checkpoint, tmp_path / "link", Path(os.path.relpath(checkpoint))):
        refused = call("train", recipe, f"training.output_dir={output}")
        assert refused.exit_code == 2
        assert "is where model.path lies" in refused.output
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert not list(checkpoint.glob("manifest.json"))
