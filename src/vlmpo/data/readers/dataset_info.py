"""Read LLaMA-Factory's ``dataset_info.json``: which data sets there are, and what their columns are called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vlmpo.data.formats.columns import COLUMNS, TAGS, ColumnMap
from vlmpo.data.records import json_kind
from vlmpo.errors import DataError, shorten

_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_KEYS = (*_PLACES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
_MAX_SAMPLES = 1_000_000_000
_SHOWN_KEYS = 8
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "sharegpt"}


@dataclass(frozen=True)
class InfoEntry:
    """Describes one data set of a ``dataset_info.json``.

    Attributes:
        place: its file or folder beside the ``dataset_info.json``, or its name on the Hub.
        is_hub: whether ``place`` is on the Hub.
        format: ``alpaca`` or ``sharegpt``.
        is_ranking: whether its records hold a chosen and a rejected response.
        columns: what the keys of its records are called.
        subset: configuration of a Hub data set.
        split: part of a Hub data set or folder.
        folder: folder of a Hub data set's files.
        num_samples: how many of its records are used; None for all.
    """

    place: str
    is_hub: bool
    format: str
    is_ranking: bool
    columns: ColumnMap
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    num_samples: int | None = None


def is_dataset_info(entries: Mapping[str, Any]) -> bool:
    """Return whether an object of a JSON file is a ``dataset_info.json``, and not an MMPR ``meta.json``."""
    held = [entry for entry in entries.values() if isinstance(entry, dict)]
    return any(key in entry for entry in held for key in _PLACES) and not any("annotation" in entry for entry in held)


def read_entry(entry: Any, where: str, notices: list[str]) -> InfoEntry:
    """Read one entry; keys that have no effect are told of in ``notices``.

    Raises:
        DataError: it is on another hub than Hugging Face's, or has a value that cannot be used.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object with `file_name` and `columns`, not {json_kind(entry)}")
    notices += unknown_keys(entry, _KEYS, where)
    values = {key: value for key, value in entry.items() if value is not None}
    place = next((key for key in ("hf_hub_url", "file_name") if key in values), None)
    if place is None:
        given = ", ".join(f"`{key}`" for key in _PLACES if key in values) or "no place"
        raise DataError(f"{where}: has {given}; vlmpo reads `file_name` and `hf_hub_url`: fetch it and name the file")
    formatting = values.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _FORMATS:
        raise DataError(f"{where}: formatting {formatting!r:.80} is not known; known are {', '.join(_FORMATS)}")
    ranking = values.get("ranking", False)
    if not isinstance(ranking, bool):
        raise DataError(f"{where}: ranking must be true or false, not {json_kind(ranking)}")
    samples = values.get("num_samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise DataError(f"{where}: num_samples must be a whole number from 1 up, not {samples!r:.80}")
    if samples is not None and samples > _MAX_SAMPLES:
        raise DataError(f"{where}: num_samples must be at most {_MAX_SAMPLES}")
    texts = {key: _text(values, key, where) for key in (place, "subset", "split", "folder") if key in values}
    if place == "hf_hub_url" and _HUB_NAME.fullmatch(texts[place]) is None:
        raise DataError(f"{where}: hf_hub_url must be a name org/name, not {shorten(repr(texts[place]))}")
    return InfoEntry(
        place=texts.pop(place),
        is_hub=place == "hf_hub_url",
        format=_FORMATS[formatting],
        is_ranking=ranking,
        columns=_column_map(values, where, notices),
        num_samples=samples,
        **texts,
    )


def unknown_keys(entry: Mapping[str, Any], known: Collection[str], where: str) -> list[str]:
    """Return a remark on each key of ``entry`` that is not known."""
    remarks = []
    unknown = [key for key in entry if key not in known]
    for key in unknown[:_SHOWN_KEYS]:
        near = difflib.get_close_matches(key, known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        remarks.append(f"{where}: key {shorten(repr(key))} is not known and has no effect{meant}")
    if (more := len(unknown) - _SHOWN_KEYS) > 0:
        remarks.append(f"{where}: {more} more keys are not known and have no effect")
    return remarks


def _column_map(values: Mapping[str, Any], where: str, notices: list[str]) -> ColumnMap:
    named: dict[str, dict[str, str]] = {}
    for part, known in (("columns", COLUMNS), ("tags", TAGS)):
        given = values.get(part, {})
        if not isinstance(given, dict):
            raise DataError(f"{where}: {part} must be an object, not {json_kind(given)}")
        notices += unknown_keys(given, known, f"{where}: {part}")
        used = {key: value for key, value in given.items() if key in known and value is not None}
        named[part] = {key: _text(used, key, f"{where}: {part}") for key in used}
    columns = tuple((COLUMNS[key], column) for key, column in named["columns"].items())
    tags = tuple({**TAGS, **named["tags"]}.items()) if named["tags"] else ()
    return ColumnMap(columns, tags)


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    value = values[key]
    if not isinstance(value, str) or not value:
        what = json_kind(value) if value != "" else "an empty one"
        raise DataError(f"{where}: {key} must be a text, not {what}")
    return value
