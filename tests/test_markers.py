"""The guard of tests/conftest.py: a test that trains, starts a process or takes long fails unless it is marked slow."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest
import torch

from tests import conftest

START = [sys.executable, "-c", ""]


def take_a_step() -> None:
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_fast_test_starts_no_process(method: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"starts a process: mark it with @pytest\.mark\.slow"):
        subprocess.run(START, check=True)
    with pytest.raises(pytest.fail.Exception, match="starts a process"):
        multiprocessing.get_context(method).Process(target=print).start()


def test_a_fast_test_does_not_train() -> None:
    with pytest.raises(pytest.fail.Exception, match="trains"):
        take_a_step()


def test_a_fast_test_is_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    call = conftest.pytest_runtest_call(request.node)
    next(call)
    monkeypatch.setattr(conftest, "FAST_SECONDS", -1.0)
    with pytest.raises(pytest.fail.Exception, match="of CPU: mark it"):
        next(call)
    monkeypatch.undo()


@pytest.mark.slow
def test_a_slow_test_may_do_all_of_it() -> None:
    subprocess.run(START, check=True)
    take_a_step()
