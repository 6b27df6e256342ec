"""The share of step time spent waiting for data: measured, logged, told, with the remedy where it is much."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training import logged, pairs, trainer
from vlmpo.train import callbacks
from vlmpo.train.callbacks import StepClock, waiting_line
from vlmpo.train.console import step_line

ARGS = SimpleNamespace(dataloader_num_workers=3)


class Slow:
    """Pairs that take their time."""

    def __init__(self, count: int, seconds: float) -> None:
        self.pairs, self.seconds = pairs(count), seconds

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        return self.pairs[index]


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine this is."""
    monkeypatch.setattr(callbacks, "cores_of_a_rank", lambda: 8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that is set by hand: ``clock.now``."""
    hand = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: hand.now)
    return hand


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notices."""
    lines: list[str] = []
    monkeypatch.setattr(
        callbacks.logger, "info", lambda text: lines.append(text) if "waiting for data" in text else None
    )
    return lines


def take_step(steps: StepClock, hand: Any, fetching: float, computing: float) -> None:
    steps.start()
    hand.now += fetching
    steps.fetched()
    hand.now += computing
    steps.on_step_end(ARGS, None, None)
    hand.now += 100.0  # saving and evaluating is nobody's step


def test_shares_by_hand(clock: Any, told: list[str]) -> None:
    steps = StepClock()
    take_step(steps, clock, fetching=0.5, computing=9.5)
    take_step(steps, clock, fetching=0.5, computing=5.5)
    assert steps.take() == (16.0, 1.0)
    assert steps.take() == (0.0, 0.0)
    take_step(steps, clock, fetching=0.0, computing=4.0)
    assert steps.take() == (4.0, 0.0)
    steps.on_train_end(ARGS, None, None)
    assert told == ["waiting for data: 5.0% of all steps' time"]  # 1 of 20 seconds: at the bound, not above it
    take_step(steps, clock, fetching=4.0, computing=1.0)
    steps.on_train_end(ARGS, None, None)
    assert told[1].startswith(
        "waiting for data: 20.0% of all steps' time; raise training.dataloader_num_workers (now 3"
    )


def test_it_is_told_once_while_training_and_not_at_the_first_log(told: list[str]) -> None:
    steps = StepClock()
    for share in (0.9, 0.05, 0.5, 0.6):
        steps.on_log(ARGS, None, None, logs={"data_wait_share": share})
        steps.on_log(ARGS, None, None, logs={"eval_loss": 1.0})
    assert told == [waiting_line(0.5, "of the last steps' time", 3)]
    assert "training.dataloader_num_workers (now 3" in told[0]


def test_no_step_no_line(told: list[str]) -> None:
    StepClock().on_train_end(ARGS, None, None)
    assert told == []


@pytest.mark.slow
def test_a_slow_data_set_is_waited_for(tmp_path: Path, told: list[str]) -> None:
    """Sixteen pairs of 0.1 seconds: at least 0.4 seconds of each of four steps of four pairs."""
    trainer(tmp_path, Slow(16, 0.1), per_device_train_batch_size=2, gradient_accumulation_steps=2).train()
    lines = logged(tmp_path)
    assert len(lines) == 4
    for line in lines:
        assert line["data_wait_share"] * line["step_seconds"] >= 0.4
        assert 0.2 < line["data_wait_share"] < 1.0
    assert len(told) == 2
    assert ["raise training.dataloader_num_workers (now 0" in line for line in told] == [True, False]  # said once
    assert "waiting " in step_line(1, 4, lines[0], None, 100)


@pytest.mark.slow
def test_what_a_worker_has_ready_is_not_waited_for(tmp_path: Path, told: list[str]) -> None:
    """The same pairs, made ready beforehand by a worker while the model is kept busy."""
    run = trainer(tmp_path, Slow(16, 0.02), per_device_train_batch_size=4, dataloader_num_workers=1)
    plain = run.training_step

    def busy(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.4)
        return plain(*args, **kwargs)

    run.training_step = busy
    run.train()
    later = logged(tmp_path)[1:]
    assert all(line["data_wait_share"] < 0.2 for line in later)
    assert not [line for line in told if "last steps" in line]


def test_more_workers_than_cores_are_no_remedy() -> None:
    assert "raise training.dataloader_num_workers (now 7; 8 cores for this rank)" in waiting_line(0.5, "of it", 7)
    assert "raise" not in waiting_line(0.5, "of it", 8)
    assert "data.max_tiles would help (8 workers on 8 cores)" in waiting_line(0.5, "of it", 8)
