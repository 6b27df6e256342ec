"""Torture vlmpo: ``python -m tests.torture [--kills 60] [--damages 60] [--full 12] [--builds 12] [--only CASE]``.

Kills runs, damages checkpoints and fills disks, two cases at a time, and compares how each ends with an uninterrupted
run of the same recipe. Exit code 1 if a case has a fault. What is drawn depends on the seed and the case's name alone;
the moment at which a kill lands also depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.figures import fill, machine
from tests.torture.builds import BUILDS, build_case
from tests.torture.damage import TURNS as DAMAGED
from tests.torture.damage import damage_case
from tests.torture.full_disk import PLACES, full_case
from tests.torture.kills import KILLS_A_CASE, TURNS, kill_case, training
from tests.torture.outcome import Outcome
from tests.torture.report import show_fault, table, write
from tests.torture.scene import Scene
from tests.torture.starts import fork, load_libraries, run

AT_ONCE = 2
Case = Callable[[Scene, str, int, random.Random], Outcome]
KINDS: dict[str, Case] = {"kill": kill_case, "damage": damage_case, "full": full_case, "build": build_case}


def main() -> int:
    """Run the cases that the options name."""
    options = _options()
    started = time.monotonic()
    counts = {
        "kill": -(-options.kills // KILLS_A_CASE),
        "damage": options.damages,
        "full": options.full,
        "build": options.builds,
    }
    names = [f"{kind}-{number:02d}" for kind, count in counts.items() for number in range(count)]
    names = options.only.split(",") if options.only else names
    load_libraries()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="vlmpo-torture-"))
    scene = Scene(folder.resolve())
    print(f"seed {options.seed}, {len(names)} cases in {scene.folder}", flush=True)
    _prepare(scene, names)
    outcomes = _run_all(scene, names, options.seed, options.keep)
    print(f"\n{table(outcomes)}\n{time.monotonic() - started:.0f} s")
    if options.json:
        write(Path(options.json), outcomes, options.seed, time.monotonic() - started)
    if options.figures:
        minutes = (time.monotonic() - started) / 60
        head = f"Seed {options.seed}, {minutes:.0f} minutes; {machine()}."
        fill(Path(options.figures), "figures of make torture", f"{head}\n\n{table(outcomes)}")
    if not options.keep and not options.folder:
        shutil.rmtree(scene.folder, ignore_errors=True)
    return int(any(outcome.faults for outcome in outcomes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Kill, damage, fill the disk.")
    parser.add_argument("--kills", type=int, default=60, help=f"kills of training, {KILLS_A_CASE} to a run")
    parser.add_argument("--damages", type=int, default=60)
    parser.add_argument("--full", type=int, default=len(PLACES), help="places at which the disk is full")
    parser.add_argument("--builds", type=int, default=12, help="runs of cache, sample and pair that are killed twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of cases, separated by commas")
    parser.add_argument("--json", help="file for all outcomes")
    parser.add_argument("--figures", help="page whose block of figures is written anew")
    parser.add_argument("--folder", help="folder for everything; by default one that is removed afterwards")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all cases, not of faulty ones only")
    return parser.parse_args()


def _prepare(scene: Scene, names: list[str]) -> None:
    """Build the scene, and do what the cases need once without interruption: real processes, two at a time."""
    scene.folder.mkdir(parents=True, exist_ok=True)
    _in_parallel([("scene", scene.build)])
    wanted = dict.fromkeys(_needed(*name.rsplit("-", 1)) for name in names)
    _in_parallel([(what, lambda what=what: _run_whole(scene, what)) for what in wanted if what])


def _needed(kind: str, number: str) -> str:
    """The recipe or building command that a case compares itself with."""
    at = int(number)
    return {
        "kill": lambda: TURNS[at % len(TURNS)][0],
        "damage": lambda: DAMAGED[at % len(DAMAGED)],
        "full": lambda: PLACES[at % len(PLACES)].recipe,
        "build": lambda: list(BUILDS)[at % len(BUILDS)],
    }[kind]()


def _run_whole(scene: Scene, what: str) -> None:
    folder = scene.folder / "whole" / f"{what} folder"
    if what in BUILDS:
        BUILDS[what].prepare(scene, folder)
        start = BUILDS[what].start(scene, folder)
    else:
        start = training(scene, what, folder, {"ranks": "torchrun", "sharded": "ranks"}.get(what, "process"))
    ended = run(start)
    assert ended.code == 0, f"{start.shown()}\n{ended.output[-3000:]}"
    (folder / "run").rename(scene.whole(what))
    (scene.folder / "whole" / f"{what}.seconds").write_text(str(ended.seconds))


def _run_all(scene: Scene, names: list[str], seed: int, keep: bool) -> list[Outcome]:
    outcomes: list[Outcome] = []

    def one(name: str) -> None:
        started = time.monotonic()
        kind, number = name.rsplit("-", 1)
        rng = random.Random(f"{seed}:{name}")
        shutil.rmtree(scene.case(name), ignore_errors=True)
        found = KINDS[kind](scene, name, int(number), rng)
        found.seconds = round(time.monotonic() - started, 1)
        (scene.folder / f"{name}.json").write_text(json.dumps(found.to_json()))
        if not found.faults and not keep:
            shutil.rmtree(scene.case(name), ignore_errors=True)

    def done(name: str) -> None:
        file = scene.folder / f"{name}.json"
        kind = name.rsplit("-", 1)[0]
        broken = Outcome(name, kind, result="harness", faults=["the harness itself failed: see above"])
        outcome = Outcome(**json.loads(file.read_text())) if file.exists() else broken
        outcomes.append(outcome)
        print(f"{name}: {outcome.result} ({outcome.what}), {outcome.seconds:.0f} s", flush=True)
        if outcome.faults:
            show_fault(outcome, seed)

    _in_parallel([(name, lambda name=name: one(name)) for name in names], done, must_succeed=False)
    return outcomes


def _in_parallel(
    tasks: list[tuple[str, Callable[[], None]]], done: Callable[[str], None] | None = None, must_succeed: bool = True
) -> None:
    """Run each task in a process forked from this one, AT_ONCE at a time."""
    waiting, running = list(reversed(tasks)), dict[int, str]()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name, task = waiting.pop()
            running[fork(task)] = name
        pid, status = os.wait()
        name = running.pop(pid)
        if status and must_succeed:
            raise SystemExit(f"{name} failed: see above")
        if done is not None:
            done(name)


if __name__ == "__main__":
    sys.exit(main())
