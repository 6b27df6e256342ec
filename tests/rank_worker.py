"""One rank of a data-parallel run, started by test_ranks.py through torchrun: ``rank_worker.py FOLDER RUNS``.

RUNS is JSON: a list of runs, one after another in the same process group. Each leaves what its rank knows at the end in
``NAME/rankR.pt``. Beside MPOConfig's fields a run may have:

- ``family``: of the zoo, with pairs of its own; else tiny InternVL and:
- ``count``: pairs, of ``skewed`` kind unless ``mixed`` or ``uneven`` is set;
- ``tied``, ``bits``: of the model: tied embeddings; 64 (default) or 32 bits;
- ``unfit``: indices of pairs that cannot be used;
- ``lora``: put a fresh adapter on it;
- ``evaluate``: pairs to evaluate on;
- ``score_only``: evaluate, and be refused training afterwards;
- ``resume``: go on from this step of the run of this name: ``[NAME, STEP]``;
- ``damage``: change a byte of this file in the checkpoints of these steps, once copied: ``[FILE, [STEP, ...]]``;
- ``save``: write the final model;
- ``spoil``: ``[RANK, WHAT, STEP]``, see tests.ranks.spoil: training must end in an error;
- ``garbage``: every rank but the first begins with weights of its own, as where only the first loads them;
- ``standins``: fused kernels, by stand-ins;
- ``out_of_step``: break what is tested: rows without an image are left so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import tests.conftest  # noqa: F401  torchvision and threads, before anything else
from tests.fused_standins import FUNCTIONS
from tests.ranks import family_trainer, full_weights, make_trainer, sharded_on_cpu, spoil
from tests.training import AfterSteps
from vlmpo.errors import RunError, VlmpoError
from vlmpo.models.kernels import is_bound
from vlmpo.train import kernel_choice, rank_sync
from vlmpo.train.trainer import MPOTrainer


def main() -> None:
    """Do the runs."""
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    sharded_on_cpu()
    for run in runs:
        name = run.pop("name")
        state = one(folder, name, run)
        (folder / name).mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / name / f"rank{state['rank']}.pt")
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that is torn down in order


def one(folder: Path, name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Train, and say what this rank knows afterwards."""
    resume, save, score_only = run.pop("resume", None), run.pop("save", False), run.pop("score_only", False)
    damaged, steps = run.pop("damage", ("", []))
    spoilt = run.pop("spoil", None)
    if run.pop("out_of_step", False):
        rank_sync.append_dummy = lambda row, tree: row  # type: ignore[assignment]
    if run.pop("standins", False):
        kernel_choice.why_unusable = lambda device: None
        kernel_choice.load_functions = lambda: FUNCTIONS
    if run.pop("garbage", False) and os.environ["RANK"] != "0":
        run["model_seed"] = 99
    make = family_trainer if "family" in run else make_trainer
    made = make(folder / name, *([run.pop("family")] if "family" in run else []), ddp_backend="gloo", **run)
    if resume is not None and made.accelerator.is_main_process:
        _cut_back(folder / resume[0], folder / name, resume[1])
        for step in steps:
            _damage(folder / name / f"checkpoint-{step}" / damaged)
    made.accelerator.wait_for_everyone()
    if score_only:
        return _scores(made)
    if spoilt is not None:
        return _stopped(made, *spoilt)
    try:
        made.train(resume_from_checkpoint=True if resume else None)
    except RunError as error:
        if not damaged:
            raise
        return {"rank": made.accelerator.process_index, "refused": str(error)}
    if save:
        made.save_model(str(folder / name / "final"))
    sampler = made.get_train_dataloader().pair_sampler
    return {
        "rank": made.accelerator.process_index,
        "steps": made.state.global_step - made._initial_global_step,
        "weights": full_weights(made.model),
        "shift": made.reward_shift.state_dict(),
        "wrapper": [kind.__name__ for kind in type(made.model_wrapped).__mro__],
        "reference": None if made.reference is None else made.reference.weights_hash(),
        "reference_wrapper": [kind.__name__ for kind in type(getattr(made.reference, "model", None)).__mro__],
        "accounts": made.all_pair_counts().to_json(),
        "batches": list(sampler),
        "bound": sum(map(is_bound, made.model.modules())),
        "costs": None if sampler.costs is None else sampler.costs.pair.tolist(),
    }


def _scores(made: MPOTrainer) -> dict[str, Any]:
    metrics = made.evaluate()
    try:
        made.train()
        refused = ""
    except RunError as error:
        refused = str(error)
    return {"rank": made.accelerator.process_index, "metrics": metrics, "refused": refused}


def _stopped(made: MPOTrainer, rank: int, what: str, step: int) -> dict[str, Any]:
    """Train, with numbers that go bad on one rank; return the error, and whether the weights moved in that step."""
    weights = {}
    made.add_callback(AfterSteps(lambda at: weights.update({at: full_weights(made.model)})))
    if made.accelerator.process_index == rank:
        spoil(made, what, step)
    try:
        made.train()
    except VlmpoError as error:
        moved = not torch.equal(full_weights(made.model), weights[max(weights)])
        return {"rank": made.accelerator.process_index, "error": str(error), "met_by": error.met_by, "moved": moved}
    return {"rank": made.accelerator.process_index, "error": "", "met_by": "", "moved": True}


def _cut_back(source: Path, target: Path, step: int) -> None:
    """A copy of a finished run, as if it had been stopped after ``step``."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for folder in target.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


if __name__ == "__main__":
    main()
