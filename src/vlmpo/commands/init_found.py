"""What ``vlmpo init`` finds: data sets and checkpoints, where they are named or near the current folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vlmpo.data.dataset import SourceInfo, head_of, open_pairs, open_records
from vlmpo.data.index.store import Cache
from vlmpo.data.readers.spec import SourceSpec, file_specs
from vlmpo.errors import DataError, ModelError, first_line, shorten
from vlmpo.models.adapters import is_adapter
from vlmpo.models.checkpoint_files import means_folder, why_unloadable

_DATA = (".jsonl", ".json", ".parquet")
_LEVELS_DOWN, _MOST_ENTRIES, _MOST_FILES = 2, 5000, 60
_NOT_ENTERED = {"runs", "wandb", "node_modules", "site-packages", "venv", "__pycache__"}
_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")
_SHARD = re.compile(r"([-_.]?)\d+(-of-\d+)?(?=\.parquet$)", re.IGNORECASE)
_FOR_EVALUATION = re.compile(r"(^|[-_./])(eval|test|val|valid|validation|dev|held[-_]?out)([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class FoundData:
    """Holds one data set.

    Attributes:
        path: as a recipe takes it, absolute: a file, a glob of Parquet files, a folder; or a Hub name.
        kind: ``pairs`` or ``questions``; ``hub``: not looked at.
        title: what users call its format.
        records: how many it has, good or bad.
    """

    path: str
    kind: Literal["pairs", "questions", "hub"]
    title: str = ""
    records: int = 0

    @property
    def is_for_evaluation(self) -> bool:
        """Whether its name says that it is to evaluate on."""
        return _FOR_EVALUATION.search(os.path.basename(self.path)) is not None


@dataclass
class Found:
    """Holds what there is to write a recipe for.

    Attributes:
        train: pairs or questions; None if none were found.
        eval: pairs to evaluate on, beside ``train``.
        model: the checkpoint, a folder or a Hub name; None if none was found.
        notes: what was chosen, and what was left aside, a line each.
    """

    train: FoundData | None = None
    eval: FoundData | None = None
    model: str | None = None
    notes: list[str] = field(default_factory=list)


# ---- data ----


def find_data(path: str | None, found: Found) -> None:
    """Set the data of ``found``: what is at ``path``, or near the current folder.

    Raises:
        DataError: nothing at ``path`` is a data set.
    """
    if path is not None and not os.path.isdir(os.path.expanduser(path)):
        found.train = look_at(path)
        return
    folder = os.path.abspath(os.path.expanduser(path or "."))
    if any(os.path.isfile(os.path.join(folder, name)) for name in _OF_DATASETS):
        try:
            found.train = look_at(folder)
            return
        except DataError:
            if path is not None:
                raise
    sets, refused = _data_sets_in(folder)
    if not sets and path is not None:
        why = (
            f": of {len(refused)} files the first: {refused[0]}"
            if refused
            else f": no {', '.join(_DATA)} file is in it, or in folders in it"
        )
        raise DataError(f"--data: {folder} holds no pairs and no questions{why}")
    _choose(sets, found)


def look_at(path: str) -> FoundData:
    """Return what is at a path, or behind a Hub name, by its first records. Raises DataError if it is no data set."""
    if means_folder(path) and not os.path.exists(os.path.expanduser(path)) and "*" not in path:
        raise DataError(f"--data: there is no {path}")
    specs = file_specs(SourceSpec(path), [], need_rejected=False)
    if any(spec.kind == "hub" for spec in specs):
        return FoundData(path, "hub")
    absolute = os.path.abspath(os.path.expanduser(path))
    infos: Sequence[SourceInfo] = ()
    try:
        infos = open_pairs([SourceSpec(path)], need_rejected=False).infos
    except DataError:
        head = head_of(open_records(specs[0], Cache())) if len(specs) == 1 else []
        if not (head and "question" in head[0] and "chosen" not in head[0]):
            raise
    if all(info.format == "questions" for info in infos):
        if [spec.kind for spec in specs] != ["lines"]:
            raise DataError(
                f"{path}: holds questions, which are read from one file of JSON Lines; write one object a line into a "
                ".jsonl file"
            )
        return FoundData(absolute, "questions", "questions", len(open_records(specs[0], Cache())))
    titles = ", ".join(dict.fromkeys(info.title for info in infos))
    return FoundData(absolute, "pairs", titles, sum(info.records for info in infos))


def _data_sets_in(folder: str) -> tuple[list[FoundData], list[str]]:
    """Return the data sets in and near below a folder, and for the files that are none a line each."""
    paths = [path for path in _entries(folder) if path.lower().endswith(_DATA) and os.path.isfile(path)]
    shards = {path: _SHARD.sub(r"\1*", path) for path in paths if path.lower().endswith(".parquet")}
    several = {glob for glob in shards.values() if list(shards.values()).count(glob) > 1}
    named = dict.fromkeys(shards[path] if shards.get(path) in several else path for path in paths)
    sets, refused, listed = [], [], set()
    for path in [*named][:_MOST_FILES]:
        try:
            found = look_at(path)
            specs = file_specs(SourceSpec(path), [], need_rejected=False)
            # logs and the like: whoever names them is told more
            if not any(head_of(open_records(spec, Cache())) for spec in specs):
                raise DataError(f"no record can be read in {path}")
        except (DataError, OSError) as error:
            refused.append(shorten(first_line(error), 400))
            continue
        sets.append(found)
        listed |= {spec.path for spec in specs} - {found.path}  # the annotation files of a meta.json
    return [found for found in sets if found.path not in listed], refused


def _choose(sets: Sequence[FoundData], found: Found) -> None:
    """Put the data sets to use into ``found``; say which were left aside."""
    pairs = [one for one in sets if one.kind == "pairs"]
    of_kind = pairs or list(sets)
    training = [one for one in of_kind if not one.is_for_evaluation] or of_kind
    if not training:
        return
    found.train = max(training, key=lambda one: one.records)  # of equal ones the first, the nearest
    for_evaluation = [one for one in pairs if one.is_for_evaluation and one is not found.train]
    if for_evaluation:
        found.eval = max(for_evaluation, key=lambda one: one.records)
        found.notes.append(f"to evaluate on, by its name: {near(found.eval.path)}")
    others = [one for one in sets if one not in (found.train, found.eval)]
    if others:
        listed = ", ".join(f"{near(one.path)} ({one.records} {one.kind})" for one in others)
        found.notes.append(
            f"chosen of {len(sets)} data sets: {near(found.train.path)}; left aside: {shorten(listed, 600)}"
        )


# ---- models ----


def find_model(path: str | None, found: Found) -> None:
    """Set the model of ``found``: ``path``, or a checkpoint near the current folder.

    Raises:
        ModelError: there is no model at ``path``.
    """
    if path is None:
        folders = dict.fromkeys([os.getcwd(), *(path for path in _entries(os.getcwd()) if os.path.isdir(path))])
        models = [folder for folder in folders if _is_model(folder)]
        found.model = models[0] if models else None
        if len(models) > 1:
            others = shorten(", ".join(map(near, models[1:])), 400)
            found.notes.append(f"chosen of {len(models)} checkpoints: {near(models[0])}; left aside: {others}")
        return
    expanded = os.path.expanduser(path)
    is_local = os.path.exists(expanded) or means_folder(path) or "/" not in path
    if not is_local:
        found.model = path
        return
    reason = "there is no such folder" if not os.path.exists(expanded) else None
    if reason is None and not is_adapter(expanded):
        reason = why_unloadable(expanded)
    if reason is not None:
        raise ModelError(f"--model: no model can be loaded from {path}: {reason}")
    found.model = os.path.abspath(expanded)


def _is_model(folder: str) -> bool:
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return True
    return os.path.isfile(os.path.join(folder, "config.json")) and why_unloadable(folder) is None


# ---- near ----


def near(path: str) -> str:
    """Return a path as a message shows it: relative if it is below the current folder."""
    here = os.getcwd()
    return os.path.relpath(path, here) if path.startswith(os.path.join(here, "")) else path


def _entries(top: str) -> Iterator[str]:
    """Yield files and folders below ``top``, nearest first; nothing hidden, and no run's, which are results."""
    level, seen = [top], 0
    for depth in range(1 + _LEVELS_DOWN):
        below: list[str] = []
        for folder in level:
            try:
                with os.scandir(folder) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError:
                continue
            names = {entry.name for entry in entries}
            if depth and ("manifest.json" in names or "pyvenv.cfg" in names):
                continue
            is_model = "config.json" in names
            for entry in entries:
                seen += 1
                if seen > _MOST_ENTRIES:
                    return
                if entry.name.startswith((".", "checkpoint-")) or entry.name in _NOT_ENTERED:
                    continue
                if entry.is_dir():
                    below.append(entry.path)
                elif is_model:
                    continue  # its files are settings, and no data
                yield entry.path
        level = below
