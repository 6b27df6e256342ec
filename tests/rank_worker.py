"""One rank of a data-parallel run, started by test_ranks.py through torchrun: ``rank_worker.py FOLDER RUNS``.

RUNS is JSON: a list of runs, one after another in the same process group. Each leaves what its rank knows at the end in
``NAME/rankR.pt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  torchvision and threads, before anything else
import torch

from tests.ranks import full_weights, sharded_on_cpu, skewed_trainer
from tests.training import pairs, trainer


def main() -> None:
    """Do the runs."""
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    sharded_on_cpu()
    for run in runs:
        at = folder / run.pop("name")
        state = one(at, run)
        at.mkdir(parents=True, exist_ok=True)
        torch.save(state, at / f"rank{state['rank']}.pt")


def one(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Train, and say what this rank knows afterwards."""
    skewed = run.pop("skewed", None)
    settings = {"ddp_backend": "gloo", **run}
    if skewed is not None:
        made = skewed_trainer(folder, skewed, **settings)
    else:
        made = trainer(folder, pairs(settings.pop("pairs")), dtype=torch.float64, **settings)
    made.train()
    return {
        "rank": made.accelerator.process_index,
        "weights": full_weights(made.model),
        "shift": made.reward_shift.state_dict(),
        "wrapper": [kind.__name__ for kind in type(made.model_wrapped).__mro__],
        "accounts": made.all_accounts().to_json(),
    }


if __name__ == "__main__":
    main()
