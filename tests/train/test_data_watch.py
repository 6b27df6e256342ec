"""Nothing, or too little, to train on ends a run whenever it is found; a step without a pair moves nothing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.commands.test_train import call, checkpoint, manifest, records, write_data, write_recipe  # noqa: F401
from tests.tiny_models import random_pair
from tests.training import AfterSteps, flat_weights, logged, pairs, trainer
from vlmpo.data.dataset import open_pairs
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.errors import DataError, FileChangedError, RecordError
from vlmpo.train.counts import PairCounts, nothing_left
from vlmpo.train.data_watch import IN_A_ROW, DataWatch

# ---- the watch alone ----


def fault_after(steps: list[tuple[int, int, int]], per_epoch: int, share: float = 0.05) -> tuple[int | None, str]:
    """The step (from 1) at which a run of steps ``(records, usable, failed)`` ends, and why; None at the end of it."""
    watch = DataWatch(share)
    for at, (read, usable, failed) in enumerate(steps):
        fault = watch.see(records=read, usable=usable, failed=failed, epoch=at / per_epoch)
        if fault:
            return at + 1, fault
    return None, watch.finish(len(steps) / per_epoch) or ""


GOOD, DROPPED, FAILED = (4, 4, 0), (4, 0, 0), (4, 0, 4)
MIXED = (4, 3, 1)


@pytest.mark.parametrize(
    ("steps", "per_epoch", "step", "told"),
    [
        ([GOOD] * 30, 10, None, ""),
        # a share of failures: one in four, counted from 1,000 records on
        ([MIXED] * 249, 249, None, ""),
        ([MIXED] * 250, 250, 250, "250 of 1000 records cannot be read any more: 25.0%, and data.max_bad_share allows"),
        ([GOOD] * 240 + [MIXED] * 60, 300, None, ""),  # 60 of 1200: as many as are allowed
        ([GOOD] * 239 + [MIXED] * 61, 300, 299, "60 of 1196 records"),
        # what length or templates drop does not count
        ([(4, 1, 0)] * 500, 500, None, ""),
        # the files are gone: no need to wait for a thousand
        ([GOOD] * 5 + [FAILED] * 30, 35, 18, "52 records one after the other"),
        ([GOOD] * 5 + [FAILED] * 12 + [GOOD] * 5, 22, None, ""),
        # gone near the end of the run
        ([GOOD] * 2 + [FAILED] * 4, 6, None, "16 records before the end"),
        ([GOOD] * 8 + [FAILED] * 2, 10, None, ""),
        ([GOOD] * 2 + [DROPPED] * 4, 6, None, ""),
        # an epoch without a pair, whatever the reason
        ([DROPPED] * 10, 10, None, "none of the 40 records of an epoch can be used"),
        ([GOOD] + [DROPPED] * 9, 10, None, ""),
        ([GOOD] * 10 + [DROPPED] * 12, 10, 21, "none of the 40 records of an epoch can be used"),
        ([GOOD] * 10 + [DROPPED] * 5, 10, None, ""),  # the rest of that epoch may be good
        ([DROPPED] * 5, 10, None, "none of the 20 records"),  # but no step had any
    ],
)
def test_when_a_run_has_too_little(
    steps: list[tuple[int, int, int]], per_epoch: int, step: int | None, told: str
) -> None:
    found, fault = fault_after(steps, per_epoch)
    assert found == step
    assert told in fault
    assert bool(fault) == bool(told)


def test_any_share_may_be_allowed_and_none() -> None:
    assert fault_after([GOOD] + [FAILED] * 399, 400, share=1.0) == (None, "")
    assert fault_after([FAILED] * 400, 400, share=1.0)[1].startswith("nothing to train on")
    assert fault_after([GOOD] * 249 + [(4, 3, 1)], 400, share=0.0)[0] == 250
    assert fault_after([GOOD] * 400, 400, share=0.0) == (None, "")


def test_a_resumed_run_does_not_judge_the_rest_of_an_epoch() -> None:
    watch = DataWatch(0.05)
    assert watch.see(records=4, usable=0, failed=0, epoch=0.9) is None
    assert watch.finish(1.0) is None
    assert watch.see(records=4, usable=0, failed=0, epoch=1.0) is None
    assert watch.finish(2.0) is not None


def test_the_error_shows_the_first_records_of_the_most_frequent_reason_first() -> None:
    counts = PairCounts()
    for line, reason in enumerate(["over_long", "missing_image", "missing_image", "missing_image", "missing_image"]):
        counts.drop("a", RecordError(reason, f"a.jsonl:{line + 1}", "no good"))
    assert str(nothing_left("nothing", counts, "mend it")).splitlines() == [
        "nothing (4 missing_image, 1 over_long); mend it; the first: a.jsonl:2: no good [missing_image]",
        "  a.jsonl:3: no good [missing_image]",
        "  a.jsonl:4: no good [missing_image]",
        "  a.jsonl:1: no good [over_long]",
    ]
    assert str(nothing_left("nothing", PairCounts(), "mend it")) == "nothing; mend it"


def test_counts_of_what_went_wrong_later_are_kept() -> None:
    counts = PairCounts(empty_steps=2)
    counts.used["a"] = 3
    counts.dropped_later["a", "undecodable_image"] = 4
    again = PairCounts.from_json(json.loads(json.dumps(counts.to_json())))
    assert again == counts
    merged = PairCounts.merged([counts, PairCounts(), again])
    assert merged.mishaps() == {"empty_steps": 4, "dropped_later": {"a": {"undecodable_image": 8}}}
    plain = PairCounts()
    assert plain.mishaps() == {}
    assert set(plain.to_json()) == {"used", "dropped", "examples"}  # as before
    assert PairCounts.from_json(plain.to_json()) == plain


# ---- runs ----

UNFIT: dict[str, Any] = {
    "over_long": lambda pair: replace(pair, chosen="red " * 400),
    "identical": lambda pair: replace(pair, rejected=pair.chosen),
    "missing_image": lambda pair: replace(pair, images=("no/such/image.png",) * len(pair.images)),
    "empty_response": lambda pair: replace(pair, rejected=" "),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_run_of_which_no_pair_can_be_used_does_not_start(tmp_path: Path, reason: str) -> None:
    data = [UNFIT[reason](random_pair(seed)) for seed in range(5)]
    run = trainer(tmp_path, data, max_length=300)
    with pytest.raises(DataError) as raised:
        run.train()
    text = str(raised.value)
    assert f"nothing to train on: none of the 5 pairs can be used (5 {reason})" in text
    assert [f"memory:{seed}: " in text for seed in range(5)] == [True, True, True, False, False]
    assert run.state.global_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "momentum", "clipped", "accumulated", "averaged"])
def test_a_step_without_a_usable_pair_moves_nothing_and_is_counted(tmp_path: Path, name: str) -> None:
    """Neither weight decay nor momentum, nor the moments, nor the average of the weights."""
    settings: dict[str, Any] = {"weight_decay": 0.1, "learning_rate": 1e-2}
    settings |= {
        "adamw": {},
        "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
        "clipped": {"max_grad_norm": 0.1},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "averaged": {"ema_decay": 0.5},
    }[name]
    good = pairs(4)
    data = [*good[:2], *map(UNFIT["identical"], pairs(4, first=10)), *good[2:]]
    states = []

    def keep(step: int) -> None:
        moments = [t.clone() for s in run.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        average = [] if run.average is None else [a.clone() for a in run.average.averages.values()]
        states.append([flat_weights(run.model), *moments, *average])

    run = trainer(tmp_path, data, train_sampling_strategy="sequential", callbacks=[AfterSteps(keep)], **settings)
    run.train()
    first, second, third, last = states
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first, third, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(third[0], last[0])
    counts = run.all_pair_counts()
    assert counts.empty_steps == 2
    assert counts.reasons() == {"identical": 4}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("empty_steps") for line in lines[:4]] == [None, 1.0, 1.0, None]
    assert ["loss" in line for line in lines[:4]] == [True, False, False, True]  # it is not 0: there is none


@pytest.mark.slow
def test_an_empty_step_does_not_dilute_the_means_of_a_log(tmp_path: Path) -> None:
    data = [*pairs(2), *map(UNFIT["identical"], pairs(2, first=10))]
    settings = {"train_sampling_strategy": "sequential", "logging_first_step": False}
    trainer(tmp_path / "both", data, logging_steps=2, **settings).train()
    trainer(tmp_path / "one", data[:2], logging_steps=1, **settings).train()
    (both,), (one,) = logged(tmp_path / "both"), logged(tmp_path / "one")
    for name in ("loss", "loss/sigmoid", "loss/nll", "logps/chosen"):
        assert both[name] == pytest.approx(one[name], rel=1e-6)
    assert both["empty_steps"] == 1.0


def image_pairs(folder: Path, count: int) -> list[Any]:
    """Pairs with one image each, in files."""
    made = []
    for seed in range(count):
        pair = random_pair(seed)
        pair.images[0].save(folder / f"{seed}.png")
        made.append(replace(pair, images=(str(folder / f"{seed}.png"),)))
    return made


def break_images(folder: Path, how: str) -> None:
    for file in folder.glob("*.png"):
        if how == "removed":
            file.unlink()
        elif how == "emptied":
            file.write_bytes(b"")
        else:
            file.write_bytes(file.read_bytes()[:60])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["removed", *(pytest.param(how, marks=pytest.mark.long) for how in ("emptied", "cut"))])
def test_images_that_go_bad_in_the_middle_end_the_run(tmp_path: Path, how: str) -> None:
    """Whether the rest of the epoch is short, or long enough not to be read to its end."""
    for count, step in ((70, 5 + IN_A_ROW // 2), (24, 12)):
        folder = tmp_path / str(count)
        folder.mkdir()
        at = AfterSteps(lambda step, folder=folder: break_images(folder, how) if step == 5 else None)
        run = trainer(folder / "run", image_pairs(folder, count), callbacks=[at])
        with pytest.raises(DataError, match="cannot be read any more") as raised:
            run.train()
        assert run.state.global_step == step - (count == 70)
        reason = "missing_image" if how == "removed" else "undecodable_image"
        assert reason in str(raised.value)
        assert str(raised.value).count("memory:") == 3
        assert "data.max_bad_share" in str(raised.value)


@pytest.mark.slow
def test_an_image_that_goes_bad_in_a_later_epoch_is_counted(tmp_path: Path) -> None:
    data = image_pairs(tmp_path, 6)
    at = AfterSteps(lambda step: Image.new("RGB", (9, 9)).save(tmp_path / "x.png") or (tmp_path / "2.png").unlink()
                    if step == 3 else None)  # fmt: skip
    run = trainer(tmp_path / "run", data, callbacks=[at], num_train_epochs=3)
    run.train()
    counts = run.all_pair_counts()
    assert counts.used.total() == 6
    assert counts.mishaps() == {"dropped_later": {"data": {"missing_image": 2}}}  # in two epochs
    assert "memory:2" in counts.examples["missing_image"][0]


# ---- a data file that changes ----


def rewrite(file: Path, how: str) -> None:
    text = file.read_text()
    if how == "cut":
        os.truncate(file, len(text) // 2)
    elif how == "longer":
        with file.open("a") as out:
            out.write(text)
    else:
        file.write_bytes(b"x" * file.stat().st_size)


@pytest.mark.parametrize("how", ["cut", "longer", "same length"])
def test_a_data_file_written_to_while_it_is_read(tmp_path: Path, how: str) -> None:
    write_data(tmp_path, records(4))
    file = tmp_path / "set" / "pairs.jsonl"
    opened = open_pairs([SourceSpec(path=str(file), image_root=str(tmp_path / "set" / "images"))])
    opened[0]
    status = os.stat(file)
    rewrite(file, how)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    told = "written to since it was opened" if how == "same length" else r"\d+ bytes when opened, \d+ now"
    with pytest.raises(FileChangedError, match=rf"pairs\.jsonl: {told}; start again"):
        opened[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["cut", "longer", "same length"])
def test_records_of_a_changed_file_are_counted_and_end_the_run(tmp_path: Path, how: str, workers: int) -> None:
    write_data(tmp_path, records(24))
    file = tmp_path / "set" / "pairs.jsonl"
    opened = open_pairs([SourceSpec(path=str(file), image_root=str(tmp_path / "set" / "images"))])
    at = AfterSteps(lambda step: rewrite(file, how) if step == 3 else None)
    run = trainer(tmp_path / "run", opened, callbacks=[at], dataloader_num_workers=workers, num_train_epochs=2)
    with pytest.raises(DataError, match="cannot be read any more") as raised:
        run.train()
    assert "[file_changed]" in str(raised.value)
    assert "pairs.jsonl:" in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert run.all_pair_counts().used.total() >= 6


# ---- through the command line ----


@pytest.mark.slow
def test_the_command_says_what_it_lost(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(8))
    recipe = write_recipe(tmp_path, checkpoint, data={"max_length": 20})
    result = call("train", recipe)
    assert result.exit_code == 2
    assert "none of the 8 pairs can be used (8 over_long)" in result.output
    assert "pairs.jsonl:1: prompt and response take" in result.output
    cached = call("cache", write_recipe(tmp_path, checkpoint, data={"max_length": 20}, reference={"kind": "cache"}))
    assert cached.exit_code == 2, cached.output
    assert "nothing to train on" in cached.output


@pytest.mark.slow
def test_the_manifest_counts_steps_without_a_pair(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    lines = records(8)
    for line in lines[2:4]:
        line["chosen"] = "red " * 500
    write_data(tmp_path, lines)
    training = {"train_sampling_strategy": "sequential", "num_train_epochs": 2}
    result = call("train", write_recipe(tmp_path, checkpoint, data={"max_length": 400}, training=training))
    assert result.exit_code == 0, result.output
    data = manifest(tmp_path)["data"]
    assert data["empty_steps"] == 2
    assert data["dropped_later"] == {"noise": {"over_long": 2}}
    assert data["sets"]["noise"] == {
        "read": 8,
        "used": 6,
        "held_out": 0,
        "dropped": {"over_long": 2},
        "not_reached": 0,
    }
    refused = call("train", write_recipe(tmp_path, checkpoint, data={"max_bad_share": 2}))
    assert refused.exit_code == 2
    assert "data.max_bad_share" in refused.output
