"""SIGKILL a run of ``vlmpo train`` again and again: it must end as one that nobody killed."""

from __future__ import annotations

import random
from pathlib import Path

from tests.torture.moments import checkpoint_files, draw
from tests.torture.outcome import Outcome, differences
from tests.torture.scene import LIMITED, RESUME, Scene, checkpoints
from tests.torture.starts import Ended, Start, run

KILLS_A_CASE = 3  # one of them while a checkpoint is written
# Recipes and ways to start them, in turn: half of the runs keep one checkpoint only.
TURNS = (
    *(("limited", "forked"), ("plain", "process"), ("lora", "forked"), ("cached", "forked"), ("ranks", "torchrun")),
    *(("limited", "process"), ("ema", "forked"), ("best", "forked"), ("sharded", "ranks"), ("workers", "forked")),
    *(("limited", "forked"), ("lora", "process"), ("plain", "forked"), ("ranks", "ranks"), ("best", "process")),
    *(("limited", "forked"), ("cached", "process"), ("ema", "forked"), ("sharded", "ranks"), ("lora", "forked")),
)


def training(scene: Scene, recipe: str, folder: Path, way: str, *more: str) -> Start:
    """The command that trains a recipe in ``folder/run``, started this way."""
    arguments = ["train", str(scene.recipe(recipe)), f"training.output_dir={folder / 'run'}"]
    if recipe == "cached":
        arguments.append(f"reference.cache_dir={folder / 'reference'}")
    return Start([*arguments, *more], folder, way, sharded=recipe == "sharded")


def kill_case(scene: Scene, name: str, number: int, rng: random.Random) -> Outcome:
    """Start a run until it finishes, and kill it three times."""
    recipe, way = TURNS[number % len(TURNS)]
    found = Outcome(name, "kill")
    folder = scene.case(name)
    start = training(scene, recipe, folder, way, RESUME)
    here = folder / "run"
    files = len(list(checkpoints(scene.whole(recipe))[-1].rglob("*")))
    moments = []
    for kill in range(KILLS_A_CASE):
        described, moment = draw(
            rng,
            here,
            left=KILLS_A_CASE - 1 - kill,
            files=files if kill == number % KILLS_A_CASE else 0,
            limited=recipe in LIMITED,
        )
        victims = [rng.randrange(2)] if way in ("ranks", "torchrun") and rng.random() < 0.5 else None
        if way == "ranks" and described.startswith("after"):
            victims = None  # during the start a rank waits for one that never comes: to end it is a launcher's part
        moments.append(described + (f", rank {victims[0]} only" if victims else ""))
        ended = run(start, moment, victims)
        note(found, ended, start)
        if not ended.killed:
            moments[-1] += " (which never came)"
            break
        found.kills += 1
        found.while_writing += _is_half_written(here)
    found.what = f"{recipe}, {way}: {'; '.join(moments)}"
    if not found.faults:
        finish(found, start, here, scene.whole(recipe))
    return found


def note(found: Outcome, ended: Ended, start: Start) -> None:
    """Keep what is wrong with the end of one start; one that was not killed must have finished."""
    faults = ended.faults()
    if not ended.killed and ended.code == 2:
        faults.append(f"refused: {ended.last_line()}")
    if faults and not found.faults:
        found.result = "did not end well"
        found.output = f"$ {start.shown()}\n{ended.output[-3000:]}"
    found.faults += faults


def finish(found: Outcome, start: Start, here: Path, whole: Path) -> None:
    """Let the run end, compare it; then start it once more, which must change nothing."""
    ended = run(start)
    note(found, ended, start)
    if not found.faults:
        found.faults += differences(here, whole)
    if found.faults:
        found.result = found.result if found.output else "ends otherwise"
        return
    again = run(start)
    note(found, again, start)
    changed = [] if found.faults else differences(here, whole)
    found.faults += [f"once finished, started again: {difference}" for difference in changed]
    if changed:
        found.result = "a finished run changes"


def _is_half_written(here: Path) -> bool:
    """Whether a checkpoint is there in parts only, or beside its place."""
    whole = {path.name for path in checkpoints(here)}
    return any(name.split("/")[0] not in whole for name, _, _ in checkpoint_files(here))
