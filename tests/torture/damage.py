"""Damage one file of a checkpoint and resume: the damage is found, or does no harm; it is never believed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from tests.torture.kills import training
from tests.torture.outcome import Outcome, differences, first_step
from tests.torture.scene import LIMITED, RESUME, SAVE_STEPS, TWO_RANKS, Scene, checkpoints
from tests.torture.starts import Start, run
from vlmpo.train.checkpoint import STATE_FILE

DAMAGES = ("flip a bit of", "truncate", "delete", "empty", "take another checkpoint's")
NAN = "NaN in delta of"
TURNS = ("plain", "lora", "plain", "ema", "plain", "sharded", "plain", "best", "limited", "ranks", "plain", "cached")
STOP = 2 * SAVE_STEPS  # the checkpoint that is damaged


def damage_case(scene: Scene, name: str, number: int, rng: random.Random) -> Outcome:
    """Stop a run behind its second checkpoint, damage a file of it, resume."""
    recipe = TURNS[number % len(TURNS)]
    found = Outcome(name, "damage", result="harmless")
    folder = scene.case(name)
    way = "ranks" if recipe in TWO_RANKS else "process" if number % 10 == 7 else "forked"
    here = folder / "run"
    begin = training(scene, recipe, folder, "ranks" if recipe in TWO_RANKS else "forked")
    stopped = run(begin, lambda: _is_stopped_at(here, recipe in LIMITED and recipe != "best"))
    newest = here / f"checkpoint-{STOP}"
    if not stopped.killed:
        found.faults.append(f"could not be stopped at {newest.name}: {stopped.last_line()}")
        return found
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    turn = sum(TURNS[before % len(TURNS)] == recipe for before in range(number))  # earlier cases of this recipe
    vital, other = ([path for path in files if _is_vital(path) == wanted] for wanted in (True, False))
    file = other[turn // 3 % len(other)] if turn % 3 == 2 else vital[(turn - turn // 3) % len(vital)]
    kind = rng.choice(DAMAGES)
    if number % 20 == 3:
        file, kind = newest / STATE_FILE, NAN
    _damage(file, kind, rng, scene.whole(recipe))
    found.what = f"{recipe}, {way}: {kind} {file.relative_to(newest)}"
    _judge(found, training(scene, recipe, folder, way, RESUME), here, scene.whole(recipe))
    return found


def _is_stopped_at(here: Path, limited: bool) -> bool:
    """The second checkpoint is whole, and is the only one if just one is kept."""
    names = [path.name for path in checkpoints(here)]
    return f"checkpoint-{STOP}" in names and (not limited or len(names) == 1)


def _is_vital(file: Path) -> bool:
    """Whether a file holds weights or a state of the training: two thirds of the damage is done to these."""
    return file.suffix in (".safetensors", ".pt", ".pth", ".distcp") or file.name in (STATE_FILE, "trainer_state.json")


def _damage(file: Path, kind: str, rng: random.Random, whole: Path) -> None:
    content = file.read_bytes()
    if kind == "delete":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[: rng.randrange(len(content)) if content else 0])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == NAN:
        state = json.loads(content)
        shift = state["reward_shift"]
        state["reward_shift"] = {key: float("nan") if isinstance(shift[key], float) else shift[key] for key in shift}
        file.write_text(json.dumps(state))
    elif kind.startswith("flip") and content:
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
    elif kind.startswith("take"):
        checkpoint = next(parent for parent in file.parents if parent.name.startswith("checkpoint-"))
        name = file.relative_to(checkpoint)
        beside = [path for path in checkpoints(checkpoint.parent) if path != checkpoint and (path / name).is_file()]
        shutil.copyfile((beside or checkpoints(whole)[-1:])[0] / name, file)


def _judge(found: Outcome, start: Start, here: Path, whole: Path) -> None:
    """Resume; name the result."""
    older = [path.name for path in checkpoints(here) if path.name != f"checkpoint-{STOP}"]
    ended = run(start)
    found.output = f"$ {start.shown()}\n{ended.output[-3000:]}"
    found.faults += ended.faults()
    if ended.code == 2:
        found.result = "refused"
        if f"checkpoint-{STOP}" not in " ".join(ended.messages()):
            found.faults.append(f"the message does not name the checkpoint: {ended.last_line()}")
    elif ended.code == 0:
        begun = first_step(ended.output)
        fell_back = begun is not None and begun <= STOP
        changed = differences(here, whole)
        if changed:
            found.result = "BELIEVED"
            found.faults += changed
        elif fell_back:
            found.result = "fell back"
            line = [line for line in ended.output.splitlines() if f"checkpoint-{STOP}" in line]
            if not line:
                found.faults.append(f"fell back to {' or '.join(older) or 'the start'} without a word")
    else:
        found.result = f"exit {ended.code}"
    if not found.faults:
        found.output = ""
