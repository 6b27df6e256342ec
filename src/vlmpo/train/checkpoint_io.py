"""The files of a checkpoint: written beside and put in place whole, found again, and found damaged.

A checkpoint is written into ``_checkpoint.partial/checkpoint-N`` of the run folder, which no reader looks at. Its state
file comes last and holds size and CRC-32 of all others; only then is the folder renamed to ``checkpoint-N``, and only
then is an older one removed. A kill at any moment leaves the checkpoints that were there before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import sort_checkpoints

from vlmpo.errors import first_line
from vlmpo.fileio import sync_folder

STATE_FILE = "vlmpo_state.json"  # written last: a checkpoint that has it is complete
TRAINER_FILE = "trainer_state.json"  # of transformers
PARTIAL_FOLDER = "_checkpoint.partial"  # the underscore keeps it out of what Trainer uploads
PARTIAL_MODEL = "_model.partial"  # likewise, of a final model
_PIECE = 16 << 20  # bytes that are read at once

# Files that a rank writes by itself: random states, shards of FSDP, shards of DeepSpeed's optimizer. The number is the
# rank's.
_WEIGHTS = re.compile(r"((?:adapter_)?model)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")
_OF_ONE_RANK = re.compile(r"(?:^|/)(?:rng_state_|__|(?:bf16_)?zero_pp_rank_|[\w.]*_rank)(\d+)")
# Files that resuming would read if they were there: none may appear that was not written with the checkpoint.
_READ_WHEN_FOUND = re.compile(
    r"(model|pytorch_model|adapter_|optimizer|scheduler|scaler|rng_state|ema)[^/]*\.(safetensors|bin|pt|pth|json)"
)

Checksums = dict[str, list[int]]  # file, relative to the checkpoint: [size, CRC-32]


# ---- which checkpoints there are ----


def step_of(checkpoint: str | os.PathLike[str]) -> int | None:
    """Return N of a folder named ``checkpoint-N``; None for another name."""
    number = Path(checkpoint).name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and Path(checkpoint).name != number else None


def checkpoints_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the folders named ``checkpoint-N`` in a run folder, the newest first, complete or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def files_in(checkpoint: Path) -> list[str]:
    """Return all files of a checkpoint but its state file, relative to it, in alphabetical order."""
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in files if name != STATE_FILE)


# ---- writing ----


def partial_of(checkpoint: Path) -> Path:
    """Return the folder in which ``checkpoint`` is written before it is put in its place."""
    return checkpoint.parent / PARTIAL_FOLDER / checkpoint.name


def checksums(checkpoint: Path, rank: int, first: bool) -> Checksums:
    """Return size and CRC-32 of this rank's files, which are on the disk then.

    Args:
        checkpoint: the folder.
        rank: this rank's number; files that are named by it are its own.
        first: whether all files that no rank's number names are this rank's too.
    """
    own = (name for name in files_in(checkpoint) if (number := _rank_of(name)) == rank or (first and number is None))
    return {name: _checksum(checkpoint / name, sync=True) for name in own}


def whole_list(checkpoint: Path, of_ranks: Iterable[Checksums]) -> Checksums:
    """Return the checksums of all files that are in the folder; those that no rank computed are computed here."""
    known = {name: value for part in of_ranks for name, value in part.items()}
    return {name: known.get(name) or _checksum(checkpoint / name, sync=True) for name in files_in(checkpoint)}


def publish(partial: Path, checkpoint: Path) -> None:
    """Put a complete checkpoint in its place. One that is there already is unmarked first, then replaced."""
    for folder in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
        sync_folder(folder)
    if checkpoint.exists():
        (checkpoint / STATE_FILE).unlink(missing_ok=True)
        replaced = partial.with_name("replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(checkpoint, replaced)
    os.rename(partial, checkpoint)
    sync_folder(checkpoint.parent)
    shutil.rmtree(partial.parent, ignore_errors=True)


def clear_partial(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed run left half written in a run folder; put in place what it had written whole."""
    left = Path(folder) / PARTIAL_FOLDER
    for partial in checkpoints_in(left):
        checkpoint = Path(folder) / partial.name
        if (partial / STATE_FILE).is_file() and not (checkpoint / STATE_FILE).is_file():
            publish(partial, checkpoint)
    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def model_beside(folder: Path, writes: bool) -> Iterator[Path]:
    """Yield the folder into which the body is to write a model; put its files in ``folder`` then, each of them whole.

    Args:
        folder: the place of the model.
        writes: whether this rank writes it.
    """
    partial = folder / PARTIAL_MODEL
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if not writes:
        return
    (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which no reader of a model needs
    written = set(files_in(partial))
    for name in sorted(written):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial, ignore_errors=True)
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # of vlmpo 0.1
    _remove_old_weights(folder, written)
    sync_folder(folder)


def _remove_old_weights(folder: Path, written: set[str]) -> None:
    """Remove the weights of a model that was in ``folder`` before, in files of other names: more or fewer shards."""
    kinds = {found[1] for name in written if (found := _WEIGHTS.fullmatch(name))}
    for name in {path.name for path in folder.iterdir()} - written:
        if (found := _WEIGHTS.fullmatch(name)) and found[1] in kinds:
            (folder / name).unlink(missing_ok=True)


def rotate(folder: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, never the newest nor the ``best``; none without a limit."""
    if not limit or limit < 0:
        return
    every = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    kept = {every[-1], *([Path(best)] if best else [])} if every else set()
    excess = len(every) - max(limit, len(kept))
    for checkpoint in [path for path in every if path not in kept][: max(0, excess)]:
        (checkpoint / STATE_FILE).unlink(missing_ok=True)  # a kill in the removal leaves nothing to be believed
        shutil.rmtree(checkpoint, ignore_errors=True)


def _rank_of(name: str) -> int | None:
    found = _OF_ONE_RANK.search(name)
    return int(found[1]) if found else None


def _checksum(file: Path, sync: bool = False) -> list[int]:
    size = crc = 0
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
        if sync:
            os.fsync(content.fileno())
    return [size, crc]


# ---- damage ----


def damaged_files(checkpoint: Path, recorded: Mapping[str, list[int]], part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with the files of a checkpoint, one message a file; [] if nothing is.

    Args:
        checkpoint: the folder.
        recorded: their checksums as written.
        part, parts: contents of only this part of the files are read, so that ranks can share the work.
    """
    here = files_in(checkpoint)
    found = [f"{name} is missing" for name in recorded if name not in here]
    found += [
        f"{name} was not written with it" for name in here if name not in recorded and _READ_WHEN_FOUND.fullmatch(name)
    ]
    for name in sorted(set(recorded) & set(here))[part::parts]:
        size = (checkpoint / name).stat().st_size
        if size != recorded[name][0]:
            found.append(f"{name} has {size} bytes, not the {recorded[name][0]} that were written")
        elif _checksum(checkpoint / name) != recorded[name]:
            found.append(f"{name} has changed")
    return found


def unreadable_files(checkpoint: Path) -> list[str]:
    """Return what can be seen to be wrong with the files of a checkpoint without checksums, which 0.1 wrote."""
    return [f"{name} is damaged ({why})" for name in files_in(checkpoint) if (why := _unreadable(checkpoint / name))]


def missing_files(checkpoint: Path, *, to_resume: bool = True) -> list[str]:
    """Return a message for each kind of file that a checkpoint lacks, whatever wrapper wrote it: [] if it has all.

    Args:
        checkpoint: the folder.
        to_resume: whether training goes on from it; else its weights are enough.
    """
    names = files_in(checkpoint)

    def some(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    deepspeed = "latest" in names and some(r"global_step\d+/.+")
    adapter = some(r"([^/]+/)?adapter_model\.(safetensors|bin)")
    whole = some(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")
    sharded = "pytorch_model_fsdp.bin" in names or "pytorch_model_fsdp_0/.metadata" in names
    lacking = [name for name in _shards(checkpoint) if name not in names]
    if not (deepspeed or adapter or whole or sharded):
        lacking.append("the weights")
    if whole and "config.json" not in names:
        lacking.append("config.json")
    if adapter and not some(r"([^/]+/)?adapter_config\.json"):
        lacking.append("adapter_config.json")
    if to_resume:
        optimizer = {"optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"} & set(names)
        lacking += ["the optimizer, which training.save_only_model leaves out,"] * (not deepspeed and not optimizer)
        lacking += ["scheduler.pt"] * (not deepspeed and "scheduler.pt" not in names)
        lacking += [TRAINER_FILE] * (TRAINER_FILE not in names)
    return [f"{name} is missing" for name in lacking]


def _shards(checkpoint: Path) -> set[str]:
    """Return the files that an index of weights names."""
    try:
        index = json.loads((checkpoint / "model.safetensors.index.json").read_bytes())
        return {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()  # there is none, or it is damaged, which the other checks find


def _unreadable(file: Path) -> str | None:
    """Return why a file cannot be what its name says, as far as the file itself tells."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix == ".safetensors":
            return _torn_tensors(file)
        elif file.suffix in (".pt", ".pth") or file.name in ("optimizer.bin", "pytorch_model_fsdp.bin"):
            with zipfile.ZipFile(file) as archive:  # torch's own format, which has a CRC-32 a member
                torn = archive.testzip()
            return torn and f"its part {torn} has changed"
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return first_line(error)
    return None


def _torn_tensors(file: Path) -> str | None:
    """Return what is wrong with the size of a safetensors file: header length (8 bytes), header, tensors."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > size - 8:
            return "it is cut short"
        header = json.loads(content.read(length))
    try:
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return "its header names no tensors"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"it has {size} bytes, its header says {expected}"
