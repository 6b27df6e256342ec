"""A launcher whose processes do not see each other is refused; one process in an allocation is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.test_train import call, checkpoint, records, write_data, write_recipe  # noqa: F401
from vlmpo.errors import RecipeError
from vlmpo.train.launcher import one_of_several, only_cpu, refuse_unseen_ranks, started_processes

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


MEETING = {"MASTER_ADDR": "node0"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}


def test_the_cpu_is_used_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert {name: only_cpu(environment) for name, environment in ALONE.items()} == {
        **dict.fromkeys(ALONE, True),
        # accelerate would take MPI's number of processes, or that of the Slurm step, for the run's
        **dict.fromkeys(["torchrun with one process", "a run by itself under MPI"], False),
    }
    assert not any(only_cpu(environment) for environment in SEVERAL.values())  # no place to meet: to be refused
    together = {name: only_cpu(environment | MEETING) for name, environment in SEVERAL.items()}
    assert together == {**dict.fromkeys(SEVERAL, True), "by hand": False, "srun": False}
    assert not only_cpu({"ACCELERATE_USE_DEEPSPEED": "true"})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert not only_cpu({})


def test_one_process_where_several_were_asked_for_is_told() -> None:
    assert "--multi_gpu" in (one_of_several(ACCELERATE | MEETING) or "")
    assert one_of_several(ACCELERATE) is None  # one was asked for
    assert one_of_several(ACCELERATE | MEETING | SEVERAL["torchrun"]) is None
    assert one_of_several(MEETING) is None


def test_a_process_that_sees_no_other_leaves_no_run(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_data(tmp_path, records(4))
    result = call("train", write_recipe(tmp_path, checkpoint, training={"use_cpu": False}))
    assert result.exit_code == 2
    assert "error: 2 processes were started (WORLD_SIZE=2)" in result.output
    assert not (tmp_path / "run").exists()
