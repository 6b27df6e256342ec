"""One rank of a data-parallel run, started by test_ranks.py through torchrun: ``rank_worker.py FOLDER SETTINGS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import tests.conftest  # noqa: F401  torchvision and threads, before anything else
from tests.training import flat_weights, pairs, trainer


def main() -> None:
    """Train, and leave the weights and delta of every rank in the folder."""
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    run = trainer(folder, pairs(settings.pop("pairs")), dtype=torch.float64, **settings)
    run.train()
    rank = run.accelerator.process_index
    state = {
        "weights": flat_weights(run.model),
        "shift": run.reward_shift.state_dict(),
        "wrapped": isinstance(run.model_wrapped, DistributedDataParallel),
        "accounts": run.all_accounts().to_json(),
    }
    torch.save(state, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
