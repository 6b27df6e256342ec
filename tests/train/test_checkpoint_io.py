"""A checkpoint is whole, or not there; whatever happens to its files is found."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmpo.errors import RunError
from vlmpo.loss import RewardShift
from vlmpo.train import checkpoint_io
from vlmpo.train.checkpoint import STATE_FILE, damage, is_verified, read_state, write_state
from vlmpo.train.checkpoint_io import (
    PARTIAL_FOLDER,
    checkpoints_in,
    checksums,
    clear_partial,
    partial_of,
    publish,
    rotate,
    whole_list,
)
from vlmpo.train.counts import PairCounts


def write(folder: Path, step: int = 4, *, verified: bool = True, weight: float = 1.0) -> Path:
    """A checkpoint with the files of a run on one process, its tensors tiny."""
    folder.mkdir(parents=True)
    save_file({"w": torch.full((2, 3), weight)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": torch.tensor([step] * 9)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    state = {"reward_shift": RewardShift(), "reference_hash": "ab", "pair_counts": PairCounts(), "learning_rates": None}
    write_state(folder, **state, files=checksums(folder, 0, True) if verified else None)
    if not verified:  # as vlmpo 0.1 wrote it
        kept = {name: v for name, v in read_state(folder).items() if name not in ("files", "checksum")}
        (folder / STATE_FILE).write_text(json.dumps(kept))
    return folder


FILES = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


# ---- damage ----


def test_a_sound_checkpoint_is_believed(tmp_path: Path) -> None:
    assert damage(write(tmp_path / "checkpoint-4")) == []
    assert is_verified(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("mine")
    assert damage(tmp_path / "checkpoint-4") == []


@pytest.mark.parametrize("name", FILES)
def test_any_change_of_any_file_is_found(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "checkpoint-4")
    file = folder / name
    before = file.read_bytes()
    for at in (0, len(before) // 2, len(before) - 1):
        flip(file, at)
        assert damage(folder) == [f"{name} has changed"]
        file.write_bytes(before)
    file.write_bytes(before[:-3])
    assert damage(folder) == [f"{name} has {len(before) - 3} bytes, not the {len(before)} that were written"]
    file.unlink()
    assert damage(folder) == [f"{name} is missing"]


@pytest.mark.parametrize("name", ["optimizer.bin", "model-00001-of-00002.safetensors", "scaler.pt", "rng_state_1.pth"])
def test_a_file_that_would_be_read_and_was_not_written_is_found(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "checkpoint-4")
    (folder / name).write_bytes(b"x")
    assert damage(folder) == [f"{name} was not written with it"]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda text: text.replace('"sum": 0.0', '"sum": NaN'), "has changed"),
        (lambda text: text.replace('"ab"', '"ac"'), "has changed"),
        (lambda text: text.replace('"checksum"', '"chacksum"').replace('"ab"', '"ac"'), "has changed"),
        (lambda text: '{"reward_shift": {"sum": 1, "count": 1}}', "holds no reference_hash"),
        (lambda text: text[:-9], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: "[1]", "holds no JSON object"),
        (lambda text: '{"reward_shift": {"sum": 1e999, "count": 1}}', "holds no finite delta"),
        (lambda text: '{"reward_shift": {"sum": 1%s, "count": 1}}' % ("0" * 400), "holds no finite delta"),
    ],
)
def test_a_damaged_state_is_found(tmp_path: Path, change, wrong: str) -> None:
    folder = write(tmp_path / "checkpoint-4")
    file = folder / STATE_FILE
    file.write_text(change(file.read_text()))
    (found,) = damage(folder)
    assert wrong in found
    with pytest.raises(RunError, match="is damaged"):
        read_state(folder)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"x"', "null", "[]"])
def test_delta_is_a_number_in_old_checkpoints_too(tmp_path: Path, value: str) -> None:
    folder = write(tmp_path / "checkpoint-4", verified=False)
    file = folder / STATE_FILE
    file.write_text(file.read_text().replace('"sum": 0.0', f'"sum": {value}'))
    assert damage(folder) == [f"{STATE_FILE} holds no finite delta (reward_shift)"]


def test_an_old_checkpoint_is_believed_as_far_as_it_tells(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-4", verified=False)
    assert damage(folder) == []
    assert not is_verified(folder)
    for name, missing in (
        ("model.safetensors", "the weights is missing"),
        ("config.json", "config.json is missing"),
        ("optimizer.pt", "the optimizer, which training.save_only_model leaves out, is missing"),
        ("scheduler.pt", "scheduler.pt is missing"),
        ("trainer_state.json", "trainer_state.json is missing"),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert missing in damage(folder)
        (folder / name).write_bytes(kept[: len(kept) // 2])
        assert damage(folder)[0].startswith(f"{name} is damaged")
        (folder / name).write_bytes(kept)
    flip(folder / "optimizer.pt", zipfile.ZipFile(folder / "optimizer.pt").infolist()[1].header_offset + 150)
    assert damage(folder) != []


def test_the_step_is_the_one_it_is_named_by(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-4", step=5, verified=False)
    assert damage(folder) == ["trainer_state.json tells no step"]


LAYOUTS = {
    "adapter": ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt"],
    "named adapter": ["mine/adapter_model.safetensors", "mine/adapter_config.json", "optimizer.pt", "scheduler.pt"],
    "shards of FSDP": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.pt"],
    "whole under FSDP": ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt"],
    "DeepSpeed": ["latest", "global_step4/mp_rank_00_model_states.pt"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_wrappers_layout_is_known(tmp_path: Path, layout: str) -> None:
    for name in ("trainer_state.json", *LAYOUTS[layout]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert checkpoint_io.missing_files(tmp_path) == []
    (tmp_path / LAYOUTS[layout][0]).unlink()
    assert checkpoint_io.missing_files(tmp_path) != []


def test_ranks_share_the_reading_and_the_writing(tmp_path: Path) -> None:
    names = ["model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "pytorch_model_fsdp_0/__1_0.distcp"]
    names += ["global_step8/zero_pp_rank_1_mp_rank_00_optim_states.pt", "global_step8/mp_rank_00_model_states.pt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    parts = [checksums(tmp_path, 0, True), checksums(tmp_path, 1, False)]
    assert sorted(parts[1]) == sorted([names[4], names[3], names[2]])
    assert sorted([*parts[0], *parts[1]]) == sorted(names)
    recorded = whole_list(tmp_path, parts)
    assert recorded == whole_list(tmp_path, [])
    (tmp_path / names[3]).write_text("damaged, and longer")
    found = [checkpoint_io.damaged_files(tmp_path, recorded, part, 2) for part in (0, 1)]
    assert [*found[0], *found[1]] == [f"{names[3]} has 19 bytes, not the {len(names[3])} that were written"]


# ---- written beside, put in place ----


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_kill_at_any_system_call_leaves_a_sound_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only checkpoint, of the same step, is replaced; a kill comes before each renaming and removing."""
    moments = 0
    for moment in range(20):
        run = tmp_path / str(moment)
        write(run / "checkpoint-4", weight=1.0)
        write(partial_of(run / "checkpoint-4"), weight=2.0)
        calls = iter(range(100))
        with monkeypatch.context() as patched:
            for owner, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (checkpoint_io, "sync_folder")):
                real = getattr(owner, name)

                def call(*arguments, real=real, calls=calls, moment=moment, **keywords):
                    if next(calls) == moment:
                        raise Killed
                    return real(*arguments, **keywords)

                patched.setattr(owner, name, call)
            try:
                publish(partial_of(run / "checkpoint-4"), run / "checkpoint-4")
            except Killed:
                moments += 1
        clear_partial(run)  # what the next start does
        assert damage(run / "checkpoint-4") == []
        assert [path.name for path in run.iterdir()] == ["checkpoint-4"]
    assert moments >= 6


def test_a_half_written_checkpoint_is_removed_and_a_whole_one_kept(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2", step=2)
    write(partial_of(tmp_path / "checkpoint-4"))
    (partial_of(tmp_path / "checkpoint-6")).mkdir()
    (partial_of(tmp_path / "checkpoint-6") / "model.safetensors").write_bytes(b"half")
    clear_partial(tmp_path)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
    assert damage(tmp_path / "checkpoint-4") == []
    assert not (tmp_path / PARTIAL_FOLDER).exists()


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, [8, 6, 4, 2]), (2, None, [8, 6]), (1, None, [8]), (1, 4, [8, 4]), (2, 2, [8, 2]), (3, 2, [8, 6, 2])],
)
def test_old_checkpoints_are_removed(tmp_path: Path, limit: int | None, best: int | None, kept: list[int]) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path / f"checkpoint-{step}", step=step)
    rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert [checkpoint_io.step_of(path) for path in checkpoints_in(tmp_path)] == kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.5, {"loss": -float("inf")}]])
def test_a_state_with_numbers_that_are_not_finite_is_sound(tmp_path: Path, value: object) -> None:
    """As the loss of a step that fp16's scaler skips: JSON has null for it, and the checksum is of what is written."""
    counts = PairCounts(empty_steps=2)
    write_state(
        tmp_path,
        reward_shift=RewardShift("previous"),
        reference_hash=None,
        pair_counts=counts,
        learning_rates=None,
        window=value,
    )
    state = read_state(tmp_path)
    assert state["window"] in (None, [1.5, {"loss": None}])
    assert PairCounts.from_json(state["accounts"]) == counts


# ---- a final model ----


@pytest.mark.parametrize("killed_at", range(4))
def test_a_model_is_replaced_by_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    """A kill while it is written leaves the old model; one while it is put in place leaves no file cut short."""
    old = {"config.json": "old", "model.safetensors": "old weights", "notes.txt": "mine", "training_args.bin": "pickle"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    new = {"config.json": "new", "model.safetensors": "new weights", "sub/adapter.json": "{}"}

    def replace(source: Path, place: Path) -> None:
        nonlocal killed_at
        if killed_at == 1:
            raise InterruptedError
        killed_at -= 1
        real(source, place)

    def write() -> None:
        with checkpoint_io.model_beside(tmp_path, writes=True) as partial:
            for name, text in {**new, "training_args.bin": "pickle"}.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_text(text)
            if killed_at == 0:
                raise InterruptedError

    real = os.replace
    (tmp_path / checkpoint_io.PARTIAL_MODEL).mkdir()
    (tmp_path / checkpoint_io.PARTIAL_MODEL / "model-00001-of-00002.safetensors").write_text("of an earlier kill")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(InterruptedError):
            write()
    for name, text in old.items():
        assert (tmp_path / name).read_text() in {text, new.get(name)}
    killed_at = -1
    write()
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {**new, "notes.txt": "mine"}


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (SHARDS, ("model.safetensors",)),
        (("model.safetensors",), SHARDS),
        (SHARDS, ("model-00001-of-00001.safetensors", "model.safetensors.index.json")),
        (("adapter_model.safetensors",), ("adapter_model-00001-of-00001.safetensors",)),
    ],
)
def test_weights_in_files_of_other_names_do_not_stay(
    before: tuple[str, ...], now: tuple[str, ...], tmp_path: Path
) -> None:
    others = ("notes.txt", "model-card.txt", "other_model.safetensors")
    for name in (*before, *others):
        (tmp_path / name).write_text("old")
    with checkpoint_io.model_beside(tmp_path, writes=True) as partial:
        partial.mkdir()
        for name in now:
            (partial / name).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        **dict.fromkeys(others, "old"),
        **dict.fromkeys(now, "new"),
    }


def test_a_rank_that_does_not_write_moves_nothing(tmp_path: Path) -> None:
    with checkpoint_io.model_beside(tmp_path, writes=False) as partial:
        partial.mkdir()
        (partial / "config.json").write_text("the first rank's")
    assert (partial / "config.json").exists()
