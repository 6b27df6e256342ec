"""Resolve what the user names as data: files, folders, Hub names, and the sets of an MMPR ``meta.json``."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vlmpo.data.formats.base import PathRules
from vlmpo.data.formats.columns import ColumnMap
from vlmpo.data.formats.paths import is_really_below
from vlmpo.data.readers.arrow import SAVED_SPLITS, download_folders
from vlmpo.data.readers.dataset_info import is_dataset_info, read_entry, unknown_keys
from vlmpo.data.readers.json import refuse_other_encodings
from vlmpo.data.readers.near_root import no_folder
from vlmpo.data.records import BOM, MAX_LINE_BYTES, json_kind
from vlmpo.errors import DataError, shorten, shorten_path

# JSON Lines, an array of records, an MMPR meta.json, Parquet files, a folder that save_to_disk wrote, any other folder,
# a data set of the Hub.
Kind = Literal["lines", "array", "meta", "parquet", "saved", "folder", "hub"]

_EXTENSIONS = (".jsonl", ".json", ".parquet")
_DATA_FILES = (*_EXTENSIONS, ".arrow", ".csv", ".tsv", ".txt", ".yaml", ".md", ".tar", ".zip")
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_REPEAT = 1_000_000
_MAX_TILES = 1000
_META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")
_KINDS = {"file": "regular file", "folder": "folder"}
_META_SHAPE = 'must be one JSON object, {"name": {"root": "...", "annotation": "....jsonl", "repeat_time": 1}, ...}'


@dataclass(frozen=True)
class SourceSpec:
    """One entry of a recipe's ``data.train`` or ``data.eval``.

    Attributes:
        path: a ``.jsonl`` file, a ``.json`` file (an array of records, an MMPR ``meta.json`` or LLaMA-Factory's
            ``dataset_info.json``), a ``.parquet`` file or a glob of them, a folder (saved by ``datasets``, laid out as
            on the Hub, or with a ``dataset_info.json``), or a Hub name ``org/name``.
        image_root: folder that image names are relative to; default: the file's own. Not for a ``meta.json``.
        repeat: how often its pairs are seen; below 1 a seeded subset. Multiplies a meta.json's ``repeat_time``.
        max_tiles: tiles per pair, in place of a meta.json's ``max_dynamic_patch``. None leaves it to that, or to the
            recipe.
        name: what metrics call it; default: the file's stem. For a meta.json: put before the name of each set in it.
        format: the format of its records; ``auto`` detects it from the first few.
        split: part of a folder's or Hub data set; may be left out if there is only one. Of a file, the records that
            say so under ``split``.
        subset: configuration of a Hub data set, or of a folder laid out as one; one entry of a ``dataset_info.json``.
        confine: refuse images and videos outside ``image_root``, and files outside the folder above the ``meta.json``
            or ``dataset_info.json`` that names them, links followed.
    """

    path: str
    image_root: str | None = None
    repeat: float = 1.0
    max_tiles: int | None = None
    name: str | None = None
    format: str = "auto"
    split: str | None = None
    subset: str | None = None
    confine: bool = False


@dataclass(frozen=True)
class FileSpec(SourceSpec):
    """One container of records with every setting resolved, from a SourceSpec or an entry of a meta.json.

    Attributes:
        path: absolute, but for a Hub name.
        kind: what the path is.
        files: the Parquet files, which may be several.
        declared_length: number of records a meta.json says there are.
        columns: what a dataset_info.json says of the keys of the records.
        num_samples: how many records it says are used, before ``repeat``; None for all.
        folder: folder of a Hub data set's files.
        paths: which paths of images and videos may leave the image root.
    """

    image_root: str = ""
    name: str = ""
    kind: Kind = "lines"
    files: tuple[str, ...] = ()
    declared_length: Any = None
    columns: ColumnMap | None = None
    num_samples: int | None = None
    folder: str | None = None
    paths: PathRules = field(default_factory=PathRules)


def file_specs(spec: SourceSpec, notices: list[str], need_rejected: bool = True) -> list[FileSpec]:
    """Resolve a SourceSpec into containers of records; remarks on them are added to ``notices``.

    Of a ``dataset_info.json``, entries that are not for ranking are left out if ``need_rejected``.

    Raises:
        DataError: a file or folder that does not exist (every path tried is named), a malformed meta.json, a bad
            setting, or one without effect.
    """
    path = os.path.abspath(os.path.expanduser(spec.path))
    repeat = _checked_repeat(spec.repeat, f"{spec.path}: repeat")
    max_tiles = _checked_tiles(spec.max_tiles, f"{spec.path}: max_tiles")
    path = _info_in_folder(path) or path
    kind, files = _find_kind(spec.path, path)
    entries = _read_meta(path) if kind == "meta" else {}
    is_info = is_dataset_info(entries)
    if kind == "meta" and not is_info and spec.image_root is not None:
        raise DataError(f"{spec.path}: a meta.json names each set's `root` itself; image_root is for other sources")
    if kind == "meta" and spec.split is not None:
        raise DataError(
            f"{spec.path}: split: has no effect on a file that lists others; it is for files of records, datasets "
            "folders and Hub names"
        )
    if kind not in ("folder", "hub") and not is_info and spec.subset is not None:
        raise DataError(f"{spec.path}: subset: has no effect here; it is for Hub names and folders laid out as there")
    if is_info:
        settings = replace(spec, repeat=repeat, max_tiles=max_tiles)
        return _info_specs(settings, path, entries, notices, need_rejected)
    if kind == "meta":
        return _meta_specs(spec, path, entries, repeat, max_tiles, notices)
    if kind == "hub":
        path, beside = spec.path, os.getcwd()
    else:
        beside = path if kind in ("saved", "folder") else os.path.dirname(files[0] if files else path)
    root = _image_root(spec, beside)
    return [
        FileSpec(
            name=spec.name or _default_name(path, kind, spec.split),
            path=path,
            image_root=root,
            repeat=repeat,
            max_tiles=max_tiles,
            format=spec.format,
            split=spec.split,
            subset=spec.subset,
            kind=kind,
            files=files,
            paths=_path_rules(spec, kind == "hub"),
        )
    ]


def _path_rules(spec: SourceSpec, is_hub: bool, info_folder: str | None = None) -> PathRules:
    """Return which paths may leave the image root of a data set.

    A data set of the Hub names no other files of this machine than what ``datasets`` has downloaded. Relative paths of
    the files that LLaMA-Factory's ``dataset_info.json`` lists may reach into the folder above its own, as those of an
    MMPR ``meta.json`` do, unless an image root is given.
    """
    if spec.confine:
        return PathRules(confine=True)
    above = None if info_folder is None or spec.image_root is not None else os.path.dirname(info_folder)
    return PathRules(within=above, absolute_in=download_folders() if is_hub else None)


def _image_root(spec: SourceSpec, default: str) -> str:
    root = os.path.abspath(os.path.expanduser(spec.image_root or default))
    if not os.path.isdir(root):
        raise DataError(f"{spec.path}: {no_folder(root)}")
    return root


def _find_kind(written: str, path: str, patterns: bool = True) -> tuple[Kind, tuple[str, ...]]:
    """Return what is at ``path``, which may be a pattern of file names, and the files if it is Parquet."""
    if os.path.isdir(path):
        _refuse_special_files(path)
        is_saved = any(os.path.isfile(os.path.join(path, name)) for name in (SAVED_SPLITS, "state.json"))
        return ("saved" if is_saved else "folder"), ()
    extension = os.path.splitext(path)[1].lower()
    if patterns and not os.path.exists(path) and glob.has_magic(written):
        files = tuple(sorted(glob.glob(path, recursive=True)))
        if not files:
            raise DataError(f"{written}: no file matches {path}")
        for file in files:
            if not file.lower().endswith(".parquet"):
                raise DataError(f"{written}: matches {file}; several files in one source must all be .parquet")
            _require_regular(file, written)
        return "parquet", files
    if not os.path.exists(path) and _HUB_NAME.fullmatch(written) and extension not in _EXTENSIONS:
        return "hub", ()
    if extension not in _EXTENSIONS:
        packed = "it is packed: unpack it; " if extension in _PACKED and os.path.isfile(path) else ""
        raise DataError(
            f"{written}: no {', '.join(_EXTENSIONS)} file and no folder; {packed}name one of these, or a Hub data set "
            "org/name"
        )
    _require_regular(path, written)
    if extension == ".parquet":
        return "parquet", (path,)
    if extension == ".jsonl":
        return "lines", ()
    with open(path, "rb") as content:
        start = content.read(1 << 16)
    refuse_other_encodings(path, start)
    start = start.removeprefix(BOM).lstrip()
    return ("array" if start.startswith(b"[") else "meta"), ()


def _require_regular(path: str, written: str) -> None:
    """Raise DataError unless ``path`` is a file: reading a pipe or a device would wait, or never end."""
    if not os.path.exists(path):
        raise DataError(f"{written}: no such file; looked for {shorten_path(path)}")
    if not os.path.isfile(path):
        what = "it" if written == path else path
        raise DataError(f"{written}: {what} is not a regular file but a pipe, a device or the like; name one")


def _refuse_special_files(folder: str) -> None:
    """Raise DataError if a folder of data holds something that ``datasets`` may open and never finish to read."""
    for place, _, names in os.walk(folder):
        for entry in (os.path.join(place, name) for name in names if name.lower().endswith(_DATA_FILES)):
            if os.path.exists(entry):
                _require_regular(entry, folder)


def _default_name(path: str, kind: Kind, split: str | None) -> str:
    base = os.path.basename(path)
    if kind in ("saved", "folder", "hub"):
        return f"{base}/{split}" if split else base
    stem = os.path.splitext(base)[0]
    if glob.has_magic(stem):
        stem = re.split(r"[*?\[]", stem)[0].rstrip("-_.") or os.path.basename(os.path.dirname(path))
    return f"{stem}/{split}" if split else stem


def _meta_specs(
    spec: SourceSpec,
    path: str,
    entries: dict[str, Any],
    repeat: float,
    max_tiles: int | None,
    notices: list[str],
) -> list[FileSpec]:
    specs = []
    for name, entry in entries.items():
        where = f"{path}: set {shorten(repr(name))}"
        if not isinstance(entry, dict):
            remedy = "records belong in an array, or one a line in a file named .jsonl"
            raise DataError(
                f"{where}: must be an object with `root` and `annotation`, not {json_kind(entry)}; {remedy}"
            )
        if entry.get("data_augment"):
            notices.append(
                f"{where}: data_augment is set, but images are read as they are "
                "(InternVL's trainer would degrade them by JPEG compression)"
            )
        notices += unknown_keys(entry, _META_KEYS, where)
        annotation = _resolve(path, entry.get("annotation"), f"{where}: annotation", "file", spec.confine)
        if not annotation.lower().endswith(".jsonl"):
            raise DataError(f"{where}: annotation {annotation} is not a .jsonl file, one JSON object a line")
        root = os.path.dirname(annotation)
        if entry.get("root") is not None:
            root = _resolve(path, entry["root"], f"{where}: root", "folder", spec.confine)
        set_tiles = _checked_tiles(entry.get("max_dynamic_patch"), f"{where}: max_dynamic_patch")
        specs.append(
            FileSpec(
                name=f"{spec.name}/{name}" if spec.name else name,
                path=annotation,
                image_root=root,
                repeat=repeat * _checked_repeat(entry.get("repeat_time", 1), f"{where}: repeat_time"),
                max_tiles=set_tiles if max_tiles is None else max_tiles,
                format=spec.format,
                declared_length=entry.get("length"),
                paths=_path_rules(spec, is_hub=False),
            )
        )
    return specs


def _info_in_folder(path: str) -> str | None:
    """Return the ``dataset_info.json`` of LLaMA-Factory in a folder; None if it has none, or that of ``datasets``."""
    info = os.path.join(path, "dataset_info.json")
    if not os.path.isfile(info) or os.path.isfile(os.path.join(path, "state.json")):
        return None
    try:
        entries = json.loads(_short_text(info))
    except (OSError, ValueError, RecursionError):
        return None
    return info if isinstance(entries, dict) and is_dataset_info(entries) else None


def _info_specs(
    spec: SourceSpec, path: str, entries: dict[str, Any], notices: list[str], need_rejected: bool
) -> list[FileSpec]:
    """Return the data sets of a ``dataset_info.json``, or the one that ``subset`` names."""
    if spec.format != "auto":
        raise DataError(f"{path}: format: dataset_info.json says it of each entry; leave out {spec.format!r}")
    if spec.subset is not None:
        if spec.subset not in entries:
            known = shorten(", ".join(entries), 500)
            raise DataError(f"{path}: subset: there is no entry {spec.subset!r}; its entries are {known}")
        entries = {spec.subset: entries[spec.subset]}
    specs = []
    for name, value in entries.items():
        where = f"{path}: entry {shorten(repr(name))}"
        entry = read_entry(value, where, notices)
        if need_rejected and not entry.is_ranking:
            notices.append(f"{where}: has no `ranking`, so no rejected responses, and is left out")
            continue
        place = entry.place
        kind: Kind = "hub"
        files: tuple[str, ...] = ()
        if not entry.is_hub:
            place = os.path.join(os.path.dirname(path), entry.place)
            _confine(place, os.path.dirname(path), where, spec.confine)
            if is_really_below(path, place):
                raise DataError(f"{where}: {place} holds the dataset_info.json itself; name a file or folder in it")
            try:
                kind, files = _find_kind(shorten_path(place), place, patterns=False)  # one could walk all disks
            except DataError as error:
                raise DataError(f"{where}: {error}; to read other entries, name each under `subset`") from error
            if kind == "meta":
                raise DataError(
                    f"{where}: {place} is no array of records; one object a line is JSON Lines: name it .jsonl"
                )
        specs.append(
            FileSpec(
                name=f"{spec.name}/{name}" if spec.name else name,
                path=place,
                image_root=_image_root(spec, os.path.dirname(path)),
                repeat=spec.repeat,
                max_tiles=spec.max_tiles,
                format=entry.format,
                split=entry.split or ("train" if entry.is_hub else None),
                subset=entry.subset,
                kind=kind,
                files=files,
                columns=entry.columns,
                num_samples=entry.num_samples,
                folder=entry.folder,
                paths=_path_rules(spec, entry.is_hub, os.path.dirname(path)),
            )
        )
    if not specs:
        raise DataError(
            f"{path}: no entry has `ranking`: true; only fine-tuning (loss.weights: {{nll: 1}}) needs no pairs"
        )
    return specs


def _short_text(path: str) -> str:
    """Return the text of a file that lists data sets. Raises ValueError if it is too large to be one."""
    if (size := os.path.getsize(path)) > MAX_LINE_BYTES:
        raise ValueError(f"it has {size / 1e6:.0f} MB, at most {MAX_LINE_BYTES >> 20} MiB are read")
    with open(path, encoding="utf-8-sig") as file:
        return file.read()


def _read_meta(path: str) -> dict[str, Any]:
    def no_name_twice(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, times in Counter(name for name, _ in items).items():
            if times > 1:
                raise DataError(
                    f"{path}: {shorten(repr(name))} is given {times} times, and JSON keeps only the last; rename it"
                )
        return dict(items)

    try:
        meta = json.loads(_short_text(path), object_pairs_hook=no_name_twice)
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        remedy = ". One JSON object a line is JSON Lines: name it .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path}: cannot be read ({error}); it {_META_SHAPE}{remedy}") from error
    if not isinstance(meta, dict) or not meta:
        raise DataError(f"{path}: {json_kind(meta) if meta else 'empty'}; it {_META_SHAPE}")
    return meta


def _resolve(meta_path: str, value: Any, where: str, kind: Literal["file", "folder"], confine: bool) -> str:
    """Find a path of a meta.json. MMPR's are relative to the folder above it; others' to its own folder or the cwd."""
    if not isinstance(value, str):
        raise DataError(f"{where}: must be a path, not {json_kind(value)}")
    folder = os.path.dirname(meta_path)
    bases = [""] if os.path.isabs(value) else [os.path.dirname(folder), folder, os.getcwd()]
    candidates = [os.path.join(base, value) for base in bases]
    for candidate in candidates:
        if os.path.isfile(candidate) if kind == "file" else os.path.isdir(candidate):
            _confine(candidate, folder, where, confine)
            return candidate
    tried = ", ".join(shorten_path(candidate) for candidate in dict.fromkeys(candidates))
    there = next((candidate for candidate in candidates if os.path.exists(candidate)), None)
    what = f"no such {kind}" if there is None else f"{shorten_path(there)} is not a {_KINDS[kind]}"
    raise DataError(f"{where}: {what}; tried {tried}")


def _confine(path: str, folder: str, where: str, confine: bool) -> None:
    """Raise DataError if ``confine`` is true and ``path`` leads out of the folder above ``folder``."""
    above = os.path.dirname(folder)
    if confine and not is_really_below(path, above):
        raise DataError(f"{where}: {shorten_path(path)} leads out of {above}, and data.confine is true")


def _checked_repeat(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not value >= 0:  # NaN is not
        raise DataError(f"{where}: must be a number from 0 up, not {value!r:.80}")
    if value > _MAX_REPEAT:
        raise DataError(f"{where}: must be at most {_MAX_REPEAT}")
    return float(value)


def _checked_tiles(value: Any, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise DataError(f"{where}: must be a whole number from 1 up, not {value!r:.80}")
    if value is not None and value > _MAX_TILES:
        raise DataError(f"{where}: must be at most {_MAX_TILES}")
    return value
