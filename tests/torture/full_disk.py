"""The disk is full: one line, exit 2; with room again the same command ends as if there had always been room.

A disk is a RAM disk of few bytes over the run folder, if one may be mounted here; else, and at the smallest files, no
file may grow beyond a limit.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests.torture.builds import BUILDS
from tests.torture.kills import training
from tests.torture.moments import files_below
from tests.torture.outcome import Outcome, differences
from tests.torture.scene import RESUME, Scene
from tests.torture.starts import Ended, Start, can_mount, run
from vlmpo.report.write import PICTURE_FILE, REPORT_FILE


class Place(NamedTuple):
    """Where the disk is full.

    Attributes:
        what: what cannot be written.
        recipe: recipe, or building command.
        limit: bytes a file may have; 0: the disk is as large as ``share`` of what an uninterrupted run leaves.
        share: see ``limit``.
        more: overrides.
    """

    what: str
    recipe: str
    limit: int = 0
    share: float = 0.0
    more: tuple[str, ...] = ()


PLACES = (
    Place("the run's first file", "plain", limit=100),
    Place("metrics.jsonl", "plain", limit=3000, more=("training.save_steps=6",)),
    Place("a checkpoint's weights", "plain", limit=100_000),
    Place("a checkpoint's optimizer", "limited", limit=500_000),
    Place("a later checkpoint", "plain", share=0.4),
    Place("the final model", "plain", share=0.93),
    Place("a second checkpoint beside the only one", "limited", share=1.05),
    Place("a checkpoint with an average", "ema", share=0.55),
    Place("log-probs of the reference", "cache", limit=500),
    Place("responses", "sample", limit=1500),
    Place("pairs", "pair correctness", limit=600),
    Place("continuations", "pair dropout-ntp", limit=1000),
)
FALLBACK = 100_000  # bytes a file may have if no RAM disk can be mounted


def full_case(scene: Scene, name: str, number: int, rng: random.Random) -> Outcome:
    """Run into the full disk, make room, and run again."""
    place = PLACES[number % len(PLACES)]
    found = Outcome(name, "full", what=f"{place.recipe}: {place.what}")
    folder = scene.case(name)
    compare: Callable[[Path, Path], list[str]]
    if place.recipe in BUILDS:
        build = BUILDS[place.recipe]
        build.prepare(scene, folder)
        start, here, compare = build.start(scene, folder), folder / "run", build.differences
    else:
        start, here = training(scene, place.recipe, folder, "forked", *place.more, RESUME), folder / "run"
        compare = differences if not place.more else _weights_differ
    ended = _run_full(start, here, place, scene.whole(place.recipe))
    found.faults += ended.faults()
    if ended.code == 0:
        found.faults.append("exit 0 on a full disk")
    elif ended.code == 2 and str(folder) not in " ".join(ended.messages()):
        found.faults.append(f"the message names no folder: {ended.last_line()}")
    found.result = f"exit {ended.code}"
    found.output = f"$ {start.shown()}\n{ended.output[-3000:]}" if found.faults else ""
    again = run(start)
    if again.code:
        found.faults.append(f"with room again: exit {again.code}: {again.last_line()}")
    else:
        found.faults += [f"with room again: {line}" for line in compare(here, scene.whole(place.recipe))]
    return found


def _run_full(start: Start, here: Path, place: Place, whole: Path) -> Ended:
    if place.limit or not can_mount():
        return run(replace(start, largest_file=place.limit or FALLBACK))
    # A report that cannot be written ends no run, and it is larger than all the rest.
    needed = [size for path, size, _ in files_below(whole) if Path(path).name not in (REPORT_FILE, PICTURE_FILE)]
    size = int(sum(needed) * place.share)
    ended = run(replace(start, way="process", tmpfs=(here, size)))
    stash = here.with_name(f"{here.name}.stash")
    shutil.copytree(stash, here, dirs_exist_ok=True)
    shutil.rmtree(stash)
    return ended


def _weights_differ(here: Path, whole: Path) -> list[str]:
    """The weights alone: other settings were given that change what is logged."""
    return [line for line in differences(here, whole) if "weights" in line]
