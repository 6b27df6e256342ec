"""Files of preference pairs, read where they lie: MMPR meta.json and JSON Lines into a memory-mapped data set.

Of a file only the byte offset and the number of each line are held, as two int64 arrays; a record is parsed when it is
asked for. So three million pairs cost some 70 MB, and nothing in DataLoader workers beyond that.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmpo.data.fields import image_names, json_kind, json_object, place_images, text_field
from vlmpo.data.images import missing_image
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import DataError, RecipeError, RecordError

Indices = NDArray[np.int64]

_META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")
_RECORD_KEYS = frozenset({"image", "video", "question", "chosen", "rejected"})
_CHUNK = 8 << 20
_BOM = b"\xef\xbb\xbf"
_NEWLINE = 10
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# What the user names


@dataclass(frozen=True)
class SourceSpec:
    """One entry of a recipe's ``data.train`` or ``data.eval``.

    Attributes:
        path: an MMPR ``meta.json`` (any ``.json``), or a ``.jsonl`` file of pairs.
        image_root: folder the image names of a ``.jsonl`` file are relative to; default: the file's own.
        repeat: how often its pairs are seen; below 1 a seeded subset. Multiplies a meta.json's ``repeat_time``.
        max_tiles: tiles per pair, in place of a meta.json's ``max_dynamic_patch``. None leaves it to that, or to the
            recipe.
        name: what metrics call it; default: the file's stem. Of a meta.json: put before the name of each set in it.
    """

    path: str
    image_root: str | None = None
    repeat: float = 1.0
    max_tiles: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class _FileSpec:
    """One JSONL file with everything settled: what a SourceSpec or an entry of a meta.json comes down to."""

    name: str
    path: str
    image_root: str
    repeat: float
    max_tiles: int | None
    declared_length: Any = None


def _file_specs(spec: SourceSpec, notices: list[str]) -> list[_FileSpec]:
    path = os.path.abspath(os.path.expanduser(spec.path))
    repeat = _repeat(spec.repeat, f"{spec.path}: repeat")
    max_tiles = _max_tiles(spec.max_tiles, f"{spec.path}: max_tiles")
    extension = os.path.splitext(path)[1].lower()
    if extension not in (".json", ".jsonl"):
        raise DataError(f"{spec.path}: neither a .jsonl file of pairs nor an MMPR meta.json; name one of these")
    if not os.path.isfile(path):
        raise DataError(f"{spec.path}: no such file; looked for {path}")
    if extension == ".json":
        return _meta_specs(spec, path, repeat, max_tiles, notices)
    root = os.path.abspath(os.path.expanduser(spec.image_root or os.path.dirname(path)))
    if not os.path.isdir(root):
        raise DataError(f"{spec.path}: image_root {root} is not a folder")
    name = spec.name or os.path.splitext(os.path.basename(path))[0]
    return [_FileSpec(name, path, root, repeat, max_tiles)]


def _meta_specs(
    spec: SourceSpec, path: str, repeat: float, max_tiles: int | None, notices: list[str]
) -> list[_FileSpec]:
    if spec.image_root is not None:
        raise DataError(f"{spec.path}: a meta.json names each set's `root` itself; image_root is for .jsonl files")
    specs = []
    for name, entry in _read_meta(path).items():
        where = f"{path}: set {name!r}"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: must be an object with `root` and `annotation`, not {json_kind(entry)}")
        _notice_entry(entry, where, notices)
        annotation = _resolve(path, entry.get("annotation"), f"{where}: annotation", os.path.isfile)
        if not annotation.lower().endswith(".jsonl"):
            raise DataError(f"{where}: annotation {annotation} is not a .jsonl file, one JSON object a line")
        root = os.path.dirname(annotation)
        if entry.get("root") is not None:
            root = _resolve(path, entry["root"], f"{where}: root", os.path.isdir)
        own_tiles = _max_tiles(entry.get("max_dynamic_patch"), f"{where}: max_dynamic_patch")
        specs.append(
            _FileSpec(
                name=f"{spec.name}/{name}" if spec.name else name,
                path=annotation,
                image_root=root,
                repeat=repeat * _repeat(entry.get("repeat_time", 1), f"{where}: repeat_time"),
                max_tiles=own_tiles if max_tiles is None else max_tiles,
                declared_length=entry.get("length"),
            )
        )
    return specs


def _read_meta(path: str) -> dict[str, Any]:
    shape = 'must be one JSON object, {"name": {"root": "...", "annotation": "....jsonl", "repeat_time": 1}, ...}'

    def no_name_twice(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, times in Counter(name for name, _ in items).items():
            if times > 1:
                raise DataError(f"{path}: {name!r} stands there {times} times, and JSON keeps only the last; rename it")
        return dict(items)

    try:
        with open(path, encoding="utf-8-sig") as file:
            meta = json.load(file, object_pairs_hook=no_name_twice)
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it {shape}") from error
    if isinstance(meta, list):
        raise DataError(f"{path}: a list; it {shape}. Pairs go into a .jsonl file, one JSON object a line")
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"{path}: {json_kind(meta) if meta else 'empty'}; it {shape}")
    return meta


def _notice_entry(entry: dict[str, Any], where: str, notices: list[str]) -> None:
    if entry.get("data_augment"):
        notices.append(
            f"{where}: data_augment is set, but images are read as they are "
            "(InternVL's trainer would degrade them by JPEG compression)"
        )
    for key in entry:
        if key not in _META_KEYS:
            near = difflib.get_close_matches(key, _META_KEYS, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            notices.append(f"{where}: key {key!r} is not known and has no effect{meant}")


def _resolve(meta_path: str, value: Any, where: str, exists: Callable[[str], bool]) -> str:
    """MMPR writes paths relative to the folder above meta.json's; other people's files, to its own or the cwd."""
    if not isinstance(value, str):
        raise DataError(f"{where}: must be a path, not {json_kind(value)}")
    own = os.path.dirname(meta_path)
    bases = [""] if os.path.isabs(value) else [os.path.dirname(own), own, os.getcwd()]
    tried = [os.path.join(base, value) for base in bases]
    for candidate in tried:
        if exists(candidate):
            return candidate
    kind = "file" if exists is os.path.isfile else "folder"
    raise DataError(f"{where}: no such {kind}; tried {', '.join(dict.fromkeys(tried))}")


def _repeat(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"{where}: must be a number from 0 up, not {value!r}")
    return float(value)


def _max_tiles(value: Any, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise DataError(f"{where}: must be a whole number from 1 up, not {value!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# One file


class _PairFile:
    """One JSONL file: where its records begin, and their bytes through a memory map opened on first use."""

    def __init__(self, spec: _FileSpec, name: str) -> None:
        self.name = name
        self.path = spec.path
        self.image_root = spec.image_root
        self.max_tiles = spec.max_tiles
        try:
            self.starts, self.lines = _index_lines(spec.path)  # int64 [records]: byte offset; line number, from 1
            self._size = os.path.getsize(spec.path)
        except OSError as error:
            raise DataError(f"{spec.path}: cannot be read ({error})") from error
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a map cannot be pickled: the other process opens its own

    def origin(self, record: int) -> str:
        return f"{self.path}:{self.lines[record]}"

    def read(self, record: int) -> bytes:
        """The bytes of one line, without its newline."""
        content = self._map or self._open()
        start = int(self.starts[record])
        end = content.find(b"\n", start)
        return content[start : end if end >= 0 else len(content)]

    def _open(self) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: could be read before, not any more ({error})") from error
        if len(content) != self._size:
            raise DataError(f"{self.path}: {self._size} bytes when opened, {len(content)} now; start again")
        self._map = content
        return content


def _index_lines(path: str) -> tuple[Indices, Indices]:
    """Byte offset and 1-based number of every line that is not blank; a UTF-8 byte order mark is stepped over."""
    starts: list[Indices] = [np.empty(0, np.int64)]
    numbers: list[Indices] = [np.empty(0, np.int64)]
    with open(path, "rb") as file:
        offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(offset)
        line = 1
        while chunk := file.read(_CHUNK):
            chunk += file.readline()  # so that every chunk holds whole lines
            begins, is_record = _chunk_lines(chunk)
            starts.append(begins[is_record] + offset)
            numbers.append(np.flatnonzero(is_record) + line)
            offset += len(chunk)
            line += len(begins)
    return np.concatenate(starts), np.concatenate(numbers)


def _chunk_lines(chunk: bytes) -> tuple[Indices, NDArray[np.bool_]]:
    """Offset of each line in ``chunk`` [lines], and whether it holds more than whitespace [lines]."""
    data = np.frombuffer(chunk, np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    begins = np.concatenate([np.zeros(1, np.int64), newlines + 1])
    if begins[-1] == len(chunk):
        begins = begins[:-1]
    is_record = np.ones(len(begins), np.bool_)
    for index in np.flatnonzero(np.isin(data[begins], _WHITESPACE)):
        end = newlines[index] if index < len(newlines) else len(chunk)
        is_record[index] = bool(chunk[begins[index] : end].strip())
    return begins, is_record


# ---------------------------------------------------------------------------------------------------------------------
# The data set


class PairDataset:
    """Preference pairs of one or several files, by index; a pair is read and checked when it is asked for.

    Made by :func:`open_pairs`. Picklable; each process maps the files for itself.

    Attributes:
        notices: what the user should know about the sources though nothing is wrong with them, e.g. keys of no effect.
        need_rejected: whether pairs are for preference training. If not, ``rejected`` is not looked at and None.
        source_names: names of the sources, in the order they were named.
    """

    def __init__(self, files: Sequence[_PairFile], rows: Indices, need_rejected: bool, notices: list[str]) -> None:
        self._files = list(files)
        self._bounds = np.cumsum([0, *(len(file) for file in files)])  # [files + 1]: records before each file
        self._rows = rows  # [pairs]: record numbers, counted through all files
        self.need_rejected = need_rejected
        self.notices = notices
        self.source_names = [file.name for file in files]

    @property
    def paths(self) -> list[str]:
        """The annotation files behind the pairs, each once."""
        return list(dict.fromkeys(file.path for file in self._files))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PreferencePair:
        """Pair ``index``; its ``images`` are absolute paths, whose existence is not looked at here.

        Raises:
            RecordError: ``bad_json``, ``missing_field``, ``video_unsupported``, ``placeholder_mismatch``,
                ``empty_response`` or ``identical``.
        """
        file, record = self._locate(index)
        return _parse(file.read(record), file, file.origin(record), self.need_rejected)

    def origin(self, index: int) -> str:
        """``file:line`` of pair ``index``, without reading it."""
        file, record = self._locate(index)
        return file.origin(record)

    def source(self, index: int) -> str:
        """Name of the source of pair ``index``, without reading it."""
        return self._locate(index)[0].name

    def select(self, indices: NDArray[Any] | Sequence[int]) -> PairDataset:
        """A view that holds the pairs at ``indices``, in that order."""
        return self._view(self._rows[np.asarray(indices, np.int64)], self.need_rejected)

    def _view(self, rows: Indices, need_rejected: bool) -> PairDataset:
        return PairDataset(self._files, rows, need_rejected, self.notices)

    def _locate(self, index: int) -> tuple[_PairFile, int]:
        row = int(self._rows[index])  # IndexError past the end, as sequences have it
        position = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._files[position], row - int(self._bounds[position])

    def _common_root(self) -> str:
        """The deepest folder above all image roots."""
        return os.path.commonpath([os.path.normpath(file.image_root) for file in self._files])


def open_pairs(specs: Sequence[SourceSpec], *, seed: int = 0, need_rejected: bool = True) -> PairDataset:
    """Opens the files named by ``specs``. Reads each once for its line offsets; parses no record.

    Args:
        specs: the sources, in order; a repeated source's pairs follow each other, repeat after repeat.
        seed: decides which pairs make up the fraction of a ``repeat`` that is not whole; the draw of one source does
            not depend on the others.
        need_rejected: False for supervised fine-tuning, where ``rejected`` may be absent or anything.

    Raises:
        DataError: a file or folder that does not exist (every path tried is named), a malformed meta.json, a bad
            setting, or no pair at all.
    """
    notices: list[str] = []
    files: list[_PairFile] = []
    rows: list[Indices] = [np.empty(0, np.int64)]
    records_before = 0
    for spec in itertools.chain.from_iterable(_file_specs(named, notices) for named in specs):
        file = _PairFile(spec, _free_name(spec.name, {file.name for file in files}))
        if spec.declared_length is not None and spec.declared_length != len(file):
            notices.append(f"{file.name}: meta.json says length {spec.declared_length}, {file.path} has {len(file)}")
        drawn = _repeated(len(file), spec.repeat, f"{seed}:{file.name}")
        if not len(drawn):
            notices.append(f"{file.name}: adds no pair ({len(file)} records in {file.path}, repeat {spec.repeat:g})")
        files.append(file)
        rows.append(drawn + records_before)
        records_before += len(file)
    dataset = PairDataset(files, np.concatenate(rows), need_rejected, notices)
    if not len(dataset):
        raise DataError(f"no pair in {', '.join(named.path for named in specs) or 'the data: no source is named'}")
    return dataset


def _free_name(name: str, taken: set[str]) -> str:
    """``name``, or ``name-2``, ``name-3``, ...: counts and metrics of two sources must not run together."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _repeated(records: int, repeat: float, seed: str) -> Indices:
    """Record numbers for ``repeat`` passes: whole ones, then a seeded subset, in file order, for the fraction."""
    total = round(records * repeat)
    whole, rest = divmod(total, records) if records else (0, 0)
    generator = np.random.default_rng(_digest(seed))
    subset = np.sort(generator.choice(records, rest, replace=False)) if rest else np.empty(0, np.int64)
    return np.concatenate([np.tile(np.arange(records, dtype=np.int64), whole), subset])


# ---------------------------------------------------------------------------------------------------------------------
# One record


def _parse(raw: bytes, file: _PairFile, origin: str, need_rejected: bool) -> PreferencePair:
    record = json_object(raw, origin)
    if record.get("video"):
        raise RecordError("video_unsupported", origin, "`video` is not supported yet; take the record out")
    names = image_names(record, origin)
    question = text_field(record, "question", origin)
    if not names and not question.strip():
        raise RecordError("missing_field", origin, "`question` is empty and there is no image: nothing to answer")
    chosen = text_field(record, "chosen", origin)
    rejected = text_field(record, "rejected", origin) if need_rejected else None
    pair = PreferencePair(
        prompt=(Message("user", place_images(question, len(names), origin)),),
        images=tuple(os.path.join(file.image_root, name) for name in names),
        chosen=chosen,
        rejected=rejected,
        source=file.name,
        origin=origin,
        max_tiles=file.max_tiles,
        metadata={key: value for key, value in record.items() if key not in _RECORD_KEYS},
    )
    _check_responses(pair, need_rejected)
    return pair


def _check_responses(pair: PreferencePair, need_rejected: bool) -> None:
    if not pair.chosen.strip():
        raise RecordError("empty_response", pair.origin, "`chosen` is empty: there is nothing to score")
    if not need_rejected:
        return
    if not (pair.rejected or "").strip():
        raise RecordError("empty_response", pair.origin, "`rejected` is empty: there is nothing to score")
    if pair.chosen == pair.rejected:
        raise RecordError("identical", pair.origin, "`chosen` and `rejected` are the same: no preference to learn")


# ---------------------------------------------------------------------------------------------------------------------
# All records once


@dataclass(frozen=True, slots=True)
class Dropped:
    """A pair that cannot be used: its index in the data set, ``file:line``, and why."""

    index: int
    origin: str
    reason: str
    detail: str


@dataclass
class SourceCounts:
    """Pairs of one source: ``read == kept + sum(dropped.values())``; a pair repeated counts each time."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Screening:
    """What one pass over a data set found.

    Attributes:
        kept: int64 [kept], indices of the pairs that can be used, ascending.
        dropped: the others, in order.
        sources: counts by source name, every source of the data set among them.
    """

    kept: Indices
    dropped: list[Dropped]
    sources: dict[str, SourceCounts]

    def counts(self) -> dict[str, int]:
        """Dropped pairs by reason, the most frequent first."""
        return dict(Counter(drop.reason for drop in self.dropped).most_common())


def screen(
    dataset: PairDataset, *, need_rejected: bool | None = None, progress: Callable[[int, int], None] | None = None
) -> Screening:
    """Reads every record once and looks whether its images are there; opens no image.

    Args:
        dataset: what to read.
        need_rejected: in place of the data set's own setting; None keeps that.
        progress: called now and then, and at the end, with (records read, records in all).
    """
    if need_rejected is not None:
        dataset = dataset._view(dataset._rows, need_rejected)
    is_file = lru_cache(maxsize=1 << 16)(os.path.isfile)  # pairs of one image mostly stand near each other
    is_kept = np.zeros(len(dataset), np.bool_)
    dropped: list[Dropped] = []
    sources = {name: SourceCounts() for name in dataset.source_names}
    for index in range(len(dataset)):
        counts = sources[dataset.source(index)]
        counts.read += 1
        try:
            pair = dataset[index]
            for path in pair.images:
                if not is_file(path):
                    raise missing_image(path, pair.origin)
            is_kept[index] = True
            counts.kept += 1
        except RecordError as error:
            dropped.append(Dropped(index, error.origin, error.reason, error.detail))
            counts.dropped[error.reason] = counts.dropped.get(error.reason, 0) + 1
        if progress and ((index + 1) % 1000 == 0 or index + 1 == len(dataset)):
            progress(index + 1, len(dataset))
    return Screening(np.flatnonzero(is_kept), dropped, sources)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out pairs


def split_hold_out(
    dataset: PairDataset, indices: NDArray[Any] | Sequence[int], fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Splits pairs so that no image, and no text-only prompt, stands on both sides.

    Whole groups (pairs that share an image, directly or through other pairs; text-only pairs of one prompt) are held
    out, in an order drawn by ``seed``, until they hold at least ``fraction`` of the pairs. The draw hashes image paths
    below the sources' common folder, so it depends neither on the order of records nor on where the data lie.

    Args:
        dataset: where the pairs are.
        indices: [n], the pairs to split; all must be readable, e.g. ``Screening.kept``.
        fraction: from 0 (nothing held out) to below 1.
        seed: another seed, another draw.

    Returns:
        (train, held out): two parts of ``indices``, each in the order given.

    Raises:
        RecipeError: a fraction out of range, or so few groups that nothing would be left to train on.
        RecordError: one of the pairs cannot be read.
    """
    if not 0 <= fraction < 1:
        raise RecipeError(f"hold_out must be from 0 to below 1, not {fraction!r}")
    indices = np.asarray(indices, np.int64)
    if fraction == 0 or not len(indices):
        return indices, indices[:0]
    groups, group_of, sizes = np.unique(_groups(dataset, indices), return_inverse=True, return_counts=True)
    order = np.argsort(np.array([_digest(f"{seed}:{group}") for group in groups], np.uint64))
    needed = int(np.searchsorted(np.cumsum(sizes[order]), fraction * len(indices))) + 1  # groups to reach the fraction
    if needed >= len(groups):
        raise RecipeError(
            f"hold_out {fraction}: the {len(indices)} pairs form {len(groups)} groups that share no image, too few to "
            "hold some out and train on others; use less, or name a separate file under data.eval"
        )
    held = np.zeros(len(groups), np.bool_)
    held[order[:needed]] = True
    return indices[~held[group_of]], indices[held[group_of]]


def _groups(dataset: PairDataset, indices: Indices) -> NDArray[np.uint64]:
    """uint64 [n]: equal for two pairs if and only if they are linked by images (64-bit hashes, not the paths)."""
    root = dataset._common_root()
    keys = np.empty(len(indices), np.uint64)
    parents: dict[int, int] = {}  # only what pairs of several images link; the smallest key stands for its group
    for position, index in enumerate(indices):
        pair = dataset[int(index)]
        names = [f"image:{os.path.normpath(path).removeprefix(root)}" for path in pair.images]
        first, *others = [_digest(name) for name in names or [f"text:{pair.prompt[0].text}"]]
        keys[position] = first
        for other in others:
            low, high = sorted((_root(parents, first), _root(parents, other)))
            if low != high:
                parents[high] = low
    if parents:
        keys = np.array([_root(parents, int(key)) for key in keys], np.uint64)
    return keys


def _root(parents: dict[int, int], key: int) -> int:
    """The key that stands for ``key``'s group; shortens the way for the next call."""
    while key in parents:
        parents[key] = parents.get(parents[key], parents[key])
        key = parents[key]
    return key


def _digest(text: str) -> int:
    """64 bits that depend on the text alone: Python's own hash() differs from one process to the next."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
