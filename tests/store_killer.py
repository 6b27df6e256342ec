"""Kills processes that write into one reference store: ``store_killer.py FOLDER KILLS SEED``; prints what it found.

Run as a process of its own: it forks, which a test process with its threads must not.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from vlmpo.hashing import content_key
from vlmpo.train.logps_store import ReferenceStore, Scored


def key(writer: int, number: int) -> bytes:
    return content_key(b"%d" % writer, b"%d" % number)


def value(writer: int, number: int) -> Scored:
    return Scored(-(writer + number / 7919.0), number % 97)


def write(folder: str, writer: int, acknowledge: int) -> None:
    """Put ever more entries, in batches of 1 to 40; after each batch tell how many are in."""
    store, batches, done = ReferenceStore(folder), random.Random(writer), 0
    while True:
        numbers = range(done, done + batches.randint(1, 40))
        store.put([key(writer, n) for n in numbers], [value(writer, n) for n in numbers])
        done = numbers.stop
        os.write(acknowledge, done.to_bytes(4, "little"))


def main() -> None:
    """Kill the writers at random moments, then look for all that was acknowledged."""
    folder, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    moments = random.Random(seed)
    acknowledged: dict[int, int] = {}
    for writer in range(kills):
        read, acknowledge = os.pipe()
        child = os.fork()
        if child == 0:
            write(folder, writer, acknowledge)
        os.close(acknowledge)
        time.sleep(moments.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read()
        acknowledged[writer] = int.from_bytes(told[-4:], "little")
    store = ReferenceStore(folder)
    lost = wrong = unacknowledged = 0
    for writer, done in acknowledged.items():
        lost += sum(store.get(key(writer, n)) is None for n in range(done))
        beyond = [n for n in range(done, done + 50) if store.get(key(writer, n)) is not None]
        unacknowledged += len(beyond)
        wrong += sum(store.get(key(writer, n)) not in (None, value(writer, n)) for n in [*range(done), *beyond])
    entries = sum(acknowledged.values())
    print(f"{kills} {entries} {lost} {wrong} {unacknowledged} {len(store)} {store.damaged}")


if __name__ == "__main__":
    main()
