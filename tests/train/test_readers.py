"""Processes that read data: how many there are, what they read ahead, and that none of it changes a batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import config, pairs, trainer
from vlmpo.errors import RunError
from vlmpo.train.out_of_memory import explained
from vlmpo.train.readers import choose_readers, cores_of_a_rank
from vlmpo.train.sampler import PairBatchSampler, PairLoader


@pytest.mark.parametrize(
    ("num_pairs", "device", "cores", "expected"),
    [
        (10_000, "cuda", 16, 8),
        (10_000, "cuda", 4, 3),
        (10_000, "cuda", 2, 0),
        (64, "cuda", 16, 8),
        (63, "cuda", 16, 0),
        (10_000, "cpu", 16, 0),
    ],
)
def test_default_by_hand(num_pairs: int, device: str, cores: int, expected: int) -> None:
    assert choose_readers(num_pairs, device, cores) == expected


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)), raising=False)
    for ranks, expected in (("1", 12), ("5", 2), ("20", 1), ("many", 12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert cores_of_a_rank() == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores_of_a_rank() == 12


def test_a_number_that_is_given_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmpo.train.trainer.choose_readers", lambda num_pairs, device, cores: 5)
    assert config(tmp_path).dataloader_num_workers is None
    assert trainer(tmp_path, pairs(2)).args.dataloader_num_workers == 5
    assert trainer(tmp_path, pairs(2), dataloader_num_workers=0).args.dataloader_num_workers == 0


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are out of memory.",
    ],
)
def test_a_reader_that_was_killed_is_one_line(message: str) -> None:
    with (
        pytest.raises(RunError, match=r"reads data was killed: DataLoader worker .*[a-z]\. Mostly .*num_workers"),
        explained(),
    ):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match=r"^shapes$"), explained():
        raise RuntimeError("shapes")


# ---- reading ahead ----


class Numbers:
    """Items that are their own number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


def loader(workers: int, last_epoch: int | None) -> PairLoader:
    sampler = PairBatchSampler(num_pairs=10, per_device=3, seed=0)
    made = PairLoader(Numbers(), batch_sampler=sampler, collate_fn=list, num_workers=workers)
    made.last_epoch = last_epoch
    return made


def epochs(made: PairLoader, which: range, batches: int | None = None) -> Iterator[list[list[int]]]:
    for epoch in which:
        made.set_epoch(epoch)
        yield list(itertools.islice(made, batches))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_readers(workers: int) -> None:
    expected = list(epochs(loader(0, 2), range(3)))
    assert sorted(itertools.chain.from_iterable(expected[1])) == list(range(10))
    assert expected[0] != expected[1] != expected[2]
    made = loader(workers, 2)
    assert list(epochs(made, range(3))) == expected
    assert made._ahead is None  # nothing is read after the last epoch
    assert list(made.pair_sampler) == expected[2]  # for others it is still one epoch


@pytest.mark.slow
def test_the_next_epoch_is_begun_before_this_one_ends() -> None:
    """One worker has two batches under way; an epoch has four: at the end the next one's first are there."""
    made = loader(1, 1)
    asked: list[int] = []
    plain = PairBatchSampler.split
    made.pair_sampler.split = lambda step, balanced=True: (asked.append(len(step)), plain(made.pair_sampler, step))[1]
    ((*_, last),) = epochs(made, range(1))
    assert last == plain(made.pair_sampler, list(made.pair_sampler.steps(0))[3])[0][0]
    assert len(asked) == 4 + 2
    list(epochs(made, range(1, 2)))
    assert len(asked) == 8


@pytest.mark.slow
def test_an_epoch_that_is_left_or_begun_elsewhere_is_read_from_its_start() -> None:
    expected = list(epochs(loader(0, None), range(4)))
    made = loader(1, 3)
    assert list(epochs(made, range(1), batches=2)) == [expected[0][:2]]
    assert list(epochs(made, range(1))) == expected[:1]
    assert list(epochs(made, range(2, 4))) == expected[2:]


# ---- pinned memory ----


def test_every_tensor_of_a_batch_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without CUDA a copy stands for pinned memory."""
    batch = next(iter(trainer(tmp_path, pairs(3)).get_train_dataloader()))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    pinned = batch.pin_memory()

    def tensors(value: Any) -> list[torch.Tensor]:
        rows = [row for part in value.micro_batches for row in part.rows]
        of_rows = [[*vars(row).values(), *row.vision.values(), *row.token_types.values()] for row in rows]
        found = [*itertools.chain(*of_rows), *(one for part in value.micro_batches for one in vars(part).values())]
        return [one for one in found if isinstance(one, torch.Tensor)]

    before, after = tensors(batch), tensors(pinned)
    assert len(before) == len(after) >= 9
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
