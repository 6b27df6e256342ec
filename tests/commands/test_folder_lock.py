"""One process at a time in a folder."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmpo.commands.folder_lock import STALE, locked
from vlmpo.errors import RunError

KEY = "training.output_dir"


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "train", KEY):
        words = (
            rf"is in use by another vlmpo train \(host {re.escape(socket.gethostname())}, pid {os.getpid()}, since 2"
        )
        with pytest.raises(RunError, match=words), locked(tmp_path / "run", "train", KEY):
            pass
        with locked(tmp_path / "run", "evaluate", KEY):  # another lock
            pass
    with locked(tmp_path / "run", "train", KEY):
        pass
    assert not (tmp_path / "run").exists()  # nothing came into it


def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"training.output_dir: the folder .*/file/run cannot be made: Not a directory"),
        locked(tmp_path / "file" / "run", "train", KEY),
    ):
        pass


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "_train.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "since": "ever"}))
    with locked(tmp_path, "train", KEY):
        assert json.loads((tmp_path / "_train.lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("age", "refused"), [(0, True), (STALE - 5, True), (STALE + 5, False), (9999, False)])
def test_on_another_host_signs_of_life_decide(tmp_path: Path, age: float, refused: bool) -> None:
    lock = tmp_path / "_train.lock"
    lock.write_text(json.dumps({"host": "node-7", "pid": 12, "since": "2026-01-01 10:00:00 UTC"}))
    os.utime(lock, (time.time() - age, time.time() - age))
    if not refused:
        with locked(tmp_path, "train", KEY):
            pass
        return
    with pytest.raises(RunError, match=r"\(host node-7, pid 12, since 2026-01-01"), locked(tmp_path, "train", KEY):
        pass
    assert lock.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff", '{"pid": "x"}'])
def test_a_damaged_lock_file_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / "_train.lock").write_text(content)
    with locked(tmp_path, "train", KEY):
        pass


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    with locked(tmp_path, "train", KEY):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        with locked(tmp_path, "train", KEY):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vlmpo.commands.folder_lock import locked\n"
        "with locked(Path(sys.argv[1]), 'train', 'k'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(RunError, match=f"pid {holder.pid}"), locked(tmp_path, "train", KEY):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, "train", KEY):
        pass
