"""A launcher whose processes do not see each other is refused; one process in an allocation is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.test_train import checkpoint, records, write_data, write_recipe  # noqa: F401
from tests.paths import REPO
from vlmpo.errors import RecipeError
from vlmpo.train.launcher import refuse_unseen_ranks, started_processes

SEVERAL = {
    "torchrun": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    "by hand": {"WORLD_SIZE": "2"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
    "MPICH": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "srun": {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
}
ALONE: dict[str, dict[str, str]] = {
    "nothing": {},
    "a Slurm allocation": {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},
    "one task of srun": {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "torchrun with one process": {"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    "a run by itself under MPI": {"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
    "no number": {"WORLD_SIZE": "many"},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_processes_that_do_not_see_each_other_are_refused(name: str) -> None:
    environment = SEVERAL[name]
    variable, count = started_processes(environment)
    assert environment[variable] == str(count)
    with pytest.raises(RecipeError, match=rf"^{count} processes were started \({variable}={count}\), but") as raised:
        refuse_unseen_ranks(environment, 1)
    assert "training.use_cpu: true" in str(raised.value)
    assert "torchrun or accelerate launch" in str(raised.value)
    refuse_unseen_ranks(environment, count)


@pytest.mark.parametrize("name", ALONE)
def test_a_single_process_may_run_anywhere(name: str) -> None:
    refuse_unseen_ranks(ALONE[name], 1)


@pytest.mark.slow
def test_two_processes_without_use_cpu_leave_no_run(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(4))
    recipe = write_recipe(tmp_path, checkpoint, training={"use_cpu": False})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, "-m", "vlmpo", "train", recipe], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert "exitcode  : 2 " in done.stderr
    assert done.stderr.count("error: 2 processes were started (WORLD_SIZE=2)") == 1
    assert not (tmp_path / "run").exists()
