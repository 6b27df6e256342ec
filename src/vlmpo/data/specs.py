"""What the user names as data, settled: a ``.jsonl`` file of pairs, or an MMPR ``meta.json`` with the files in it."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmpo.data.fields import json_kind
from vlmpo.errors import DataError

_META_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


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
class FileSpec:
    """One JSONL file with everything settled: what a SourceSpec or an entry of a meta.json comes down to."""

    name: str
    path: str
    image_root: str
    repeat: float
    max_tiles: int | None
    declared_length: Any = None


def file_specs(spec: SourceSpec, notices: list[str]) -> list[FileSpec]:
    """The files a SourceSpec comes down to; remarks on them are added to ``notices``.

    Raises:
        DataError: a file or folder that does not exist (every path tried is named), a malformed meta.json, or a bad
            setting.
    """
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
    return [FileSpec(name, path, root, repeat, max_tiles)]


def _meta_specs(
    spec: SourceSpec, path: str, repeat: float, max_tiles: int | None, notices: list[str]
) -> list[FileSpec]:
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
            FileSpec(
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
