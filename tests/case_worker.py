"""One rank of a run on two, started through torchrun: ``case_worker.py CASE FOLDER``, leaves its weights in the folder.

What the cases are is said beside the tests that hold two processes against one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  torchvision and threads, before anything else
from tests.paths import REPO
from tests.training import flat_weights


def two_processes(case: str, folder: Path) -> torch.Tensor:
    """Run ``case`` on two processes; the weights both end with. Called by the test, not by the worker."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.case_worker", case, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(weights[0], weights[1])
    return weights[0]


def main() -> None:
    """Train, and leave the weights of this rank in the folder."""
    from tests.train import test_adapters
    from tests.tree import test_router_loss

    cases: dict[str, Callable[..., Any]] = {"router": test_router_loss.on_ranks, "adapter": test_adapters.on_ranks}
    folder = Path(sys.argv[2])
    run = cases[sys.argv[1]](folder, per_device_train_batch_size=2, ddp_backend="gloo")
    run.train()
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save(flat_weights(run.model), folder / f"rank{run.accelerator.process_index}.pt")
    run.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that is torn down in order


if __name__ == "__main__":
    main()
