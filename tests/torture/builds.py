"""Kill ``vlmpo cache``, ``sample`` and ``pair``: started again they end with the files of an uninterrupted one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.torture.kills import note
from tests.torture.moments import after, bytes_in, files_below
from tests.torture.outcome import Outcome
from tests.torture.scene import Scene
from tests.torture.starts import Start, run
from vlmpo.train.logps_store import ENTRY, ReferenceStore

KILLS_A_CASE = 2


@dataclass(frozen=True)
class Build:
    """A command that makes files.

    Attributes:
        command: its name.
        compared: files that must be the same; none: the log-probs in a store.
        needs_responses: whether it pairs responses that lie there.
    """

    command: str
    compared: tuple[str, ...] = ()
    needs_responses: bool = False

    def prepare(self, scene: Scene, folder: Path) -> None:
        (folder / "run").mkdir(parents=True, exist_ok=True)
        if self.needs_responses:
            shutil.copyfile(scene.folder / "responses.jsonl", folder / "run" / "responses.jsonl")

    def start(self, scene: Scene, folder: Path, way: str = "forked") -> Start:
        if self.command == "cache":
            settings = [str(scene.recipe("cached")), f"reference.cache_dir={folder / 'run'}"]
            settings.append(f"training.output_dir={folder / 'unused'}")
        else:
            settings = [str(scene.recipe("build")), f"build.output_dir={folder / 'run'}"]
        return Start([*self.command.split(), *settings], folder, way)

    def differences(self, here: Path, whole: Path) -> list[str]:
        if not self.compared:
            return _stores_differ(here, whole)
        found = []
        for name in self.compared:
            if not (here / name).is_file():
                found.append(f"{name} is missing")
            elif (here / name).read_bytes() != (whole / name).read_bytes():
                found.append(f"{name} differs")
        return found


BUILDS = {
    build.command: build
    for build in (
        Build("cache"),
        Build("sample", ("responses.jsonl",)),
        Build(
            "pair correctness",
            ("pairs_correctness.jsonl", "easy.jsonl", "hard.jsonl", "pair_report.json"),
            needs_responses=True,
        ),
        Build(
            "pair dropout-ntp",
            ("pairs_dropout_ntp.jsonl", "continuations.jsonl", "dropout_ntp_report.json"),
            needs_responses=True,
        ),
    )
}


def build_case(scene: Scene, name: str, number: int, rng: random.Random) -> Outcome:
    """Kill a command twice, then let it end."""
    build = list(BUILDS.values())[number % len(BUILDS)]
    found = Outcome(name, "build")
    folder, way = scene.case(name), "process" if number % 5 == 4 else "forked"
    build.prepare(scene, folder)
    start = build.start(scene, folder, way)
    whole = scene.whole(build.command)
    grown = sum(size for _, size, _ in files_below(whole))
    seconds = float((whole.parent / f"{whole.name}.seconds").read_text())
    moments = []
    for _ in range(KILLS_A_CASE):
        moment: Callable[[], bool]
        if rng.random() < 0.5:
            moments.append(f"after {(delay := rng.uniform(0.3, 1.0) * seconds):.2f} s")
            moment = after(delay)
        else:
            begun = sum(size for _, size, _ in files_below(folder / "run"))
            moments.append(f"at {(count := rng.randint(begun, max(begun, grown - 1)) + 1)} bytes")
            moment = bytes_in(folder / "run", count)
        ended = run(start, moment)
        note(found, ended, start)
        found.kills += ended.killed
        if not ended.killed:
            break
    found.what = f"{build.command}, {way}: {'; '.join(moments)}"
    if not found.faults:
        note(found, run(start), start)
    if not found.faults:
        found.faults += build.differences(folder / "run", whole)
        found.result = "ends otherwise" if found.faults else found.result
    return found


def _stores_differ(here: Path, whole: Path) -> list[str]:
    """Whether two stores hold the same log-probs, in whatever files."""
    mine, theirs = ReferenceStore(here), ReferenceStore(whole)
    keys = {key for shard in whole.glob("shard-*.bin") for key in _keys(shard)}
    wrong = [key for key in keys if mine.get(key) != theirs.get(key)]
    found = [f"{len(wrong)} of {len(keys)} log-probs are missing or differ"] if wrong else []
    return found + ([f"{len(mine)} log-probs, not {len(theirs)}"] if len(mine) != len(theirs) else [])


def _keys(shard: Path) -> list[bytes]:
    content = shard.read_bytes()
    size = ENTRY.itemsize
    return [content[at : at + 16] for at in range(size, len(content) - size + 1, size)]
