"""What every test needs: torchvision importable beside a CPU torch, one thread, a cache that is not the user's.

The models are tiny: a second thread only waits for the first, and on a busy machine makes the suite many times slower.
"""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before peft or transformers are imported
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    before = os.environ.get("VLMPO_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLMPO_CACHE"] = folder
        yield
    if before is None:
        del os.environ["VLMPO_CACHE"]
    else:
        os.environ["VLMPO_CACHE"] = before
