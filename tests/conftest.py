"""What every test needs: torchvision importable beside a CPU torch, one thread, a cache that is not the user's; and a
guard that fails a test which trains or starts a process without being marked slow. And CPUs that have bf16 products are
told not to use them, processes that tests start included: where nothing is said of it, tests compare float32 numbers.

The models are tiny: a second thread only waits for the first, and on a busy machine makes the suite many times slower.
"""

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before peft or transformers are imported
torch.set_num_threads(1)
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # it has no bf16; vlmpo.train.precision then chooses float32


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


# ---- `pytest -m "not slow"` stays fast ----

FAST_SECONDS = 10.0  # CPU time of a test that is not marked slow
_running: pytest.Item | None = None  # the test that runs now


def _is_fast(item: pytest.Item | None) -> bool:
    return item is not None and not any(item.iter_markers("slow")) and not any(item.iter_markers("long"))


def _refuse_if_fast(what: str) -> None:
    if _is_fast(_running):
        pytest.fail(f"this test {what}: mark it with @pytest.mark.slow")


def _refuse_processes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _refuse_if_fast("starts a process")
        return function(*args, **kwargs)

    return guarded


subprocess.Popen.__init__ = _refuse_processes(subprocess.Popen.__init__)  # type: ignore[method-assign]
BaseProcess.start = _refuse_processes(BaseProcess.start)  # type: ignore[method-assign]
register_optimizer_step_pre_hook(lambda *_: _refuse_if_fast("trains"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note which test runs, its fixtures included."""
    global _running
    _running = item
    try:
        return (yield)
    finally:
        _running = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that takes long and is not marked so."""
    started = time.process_time()
    yield
    seconds = time.process_time() - started
    if _is_fast(item) and seconds > FAST_SECONDS:
        pytest.fail(f"this test took {seconds:.0f} s of CPU: mark it with @pytest.mark.slow")
