"""One rank of a mixture-of-experts run, started by test_router.py through torchrun: ``router_worker.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import tests.conftest  # noqa: F401  torchvision and threads, before anything else
from tests.test_router import SETTINGS, in_float64, text_pairs
from tests.training import flat_weights, trainer


def main() -> None:
    """Train, and leave the weights of every rank in the folder."""
    folder = Path(sys.argv[1])
    settings = {**SETTINGS, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    run = trainer(folder, text_pairs(5), model=in_float64(), **settings)
    run.train()
    torch.save(flat_weights(run.model), folder / f"rank{run.accelerator.process_index}.pt")


if __name__ == "__main__":
    main()
