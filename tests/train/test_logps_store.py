"""The store of the reference's log-probs: nothing acknowledged is lost, nothing damaged is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.paths import REPO
from vlmpo.errors import RunError
from vlmpo.fileio import replace_json
from vlmpo.hashing import content_key
from vlmpo.train.logps_store import ENTRY, MAGIC, ReferenceStore, Scored, checksums


def keys(count: int, first: int = 0) -> list[bytes]:
    return [content_key(b"%d" % number) for number in range(first, first + count)]


def values(count: int, first: int = 0) -> list[Scored]:
    return [Scored(-number / 3.0, number) for number in range(first, first + count)]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.bin"))


def test_what_is_put_is_got_here_and_elsewhere(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "new" / "folder")
    store.put(keys(5), values(5))
    for reader in (store, ReferenceStore(tmp_path / "new" / "folder")):
        assert [reader.get(key) for key in keys(5)] == values(5)  # float64, bit for bit
        assert reader.get(content_key(b"another")) is None
        assert len(reader) == 5
        assert reader.damaged == 0


def test_opening_writes_nothing(tmp_path: Path) -> None:
    ReferenceStore(tmp_path)
    assert shards(tmp_path) == []


def test_every_writer_has_a_shard_and_refresh_reads_the_others(tmp_path: Path) -> None:
    one, other = ReferenceStore(tmp_path), ReferenceStore(tmp_path)
    one.put(keys(3), values(3))
    other.put(keys(3, first=3), values(3, first=3))
    one.put(keys(2, first=6), values(2, first=6))
    assert len(shards(tmp_path)) == 2
    assert one.get(keys(1, first=4)[0]) is None  # not yet
    one.refresh()
    assert [one.get(key) for key in keys(8)] == values(8)


def test_the_checksum_is_crc32_of_the_entry() -> None:
    random = np.random.default_rng(0)
    entries = np.frombuffer(random.bytes(32 * 50), ENTRY)
    expected = [zlib.crc32(entry.tobytes()[:28]) for entry in entries]
    assert checksums(entries).tolist() == expected
    assert checksums(np.zeros(1, ENTRY))[0] != 0  # a hole that a crash left in a file is no entry


def test_a_file_cut_at_any_byte_keeps_its_whole_entries(tmp_path: Path) -> None:
    ReferenceStore(tmp_path / "whole").put(keys(4), values(4))
    content = shards(tmp_path / "whole")[0].read_bytes()
    assert len(content) == 32 + 4 * 32
    for length in range(len(content) + 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "shard-cut.bin").write_bytes(content[:length])
        store = ReferenceStore(folder)
        kept = max(0, length - 32) // 32
        assert [store.get(key) for key in keys(4)] == values(kept) + [None] * (4 - kept)
        store.put(keys(4), values(4))  # the run goes on: in a shard of its own
        assert [ReferenceStore(folder).get(key) for key in keys(4)] == values(4)


def test_any_flipped_byte_is_detected(tmp_path: Path) -> None:
    ReferenceStore(tmp_path / "whole").put(keys(3), values(3))
    content = shards(tmp_path / "whole")[0].read_bytes()
    file = tmp_path / "shard-flipped.bin"
    for at in range(len(MAGIC), len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        file.write_bytes(damaged)
        store = ReferenceStore(tmp_path)
        hit = (at - len(MAGIC)) // 32
        assert [store.get(key) for key in keys(3)] == [None if n == hit else v for n, v in enumerate(values(3))]
        assert store.damaged == 1
    for at in range(len(MAGIC)):
        damaged = bytearray(content)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(RunError, match="is no shard of this version"):
            ReferenceStore(tmp_path)


@pytest.mark.long
def test_two_hundred_kills_lose_nothing_acknowledged(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "tests" / "store_killer.py"), str(tmp_path), "200", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=REPO)
    kills, entries, lost, wrong, _, kept, damaged = map(int, done.stdout.split())
    assert (kills, lost, wrong) == (200, 0, 0)
    assert entries > 2000  # they did write
    assert kept >= entries
    assert damaged == 0  # a torn tail is shorter than an entry: not damage


def test_a_disk_that_takes_half_an_entry_ends_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore(tmp_path)
    store.put(keys(2), values(2))
    real, calls = os.write, []

    def full(file: int, content: bytes) -> int:
        calls.append(len(content))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(file, content[:40])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunError, match="No space left"):
        store.put(keys(2, first=2), values(2, first=2))
    assert store.get(keys(1, first=2)[0]) is None  # it was not acknowledged
    monkeypatch.undo()
    store.put(keys(2, first=4), values(2, first=4))
    again = ReferenceStore(tmp_path)
    assert [again.get(key) for key in keys(2) + keys(2, first=4)] == values(2) + values(2, first=4)
    assert len(shards(tmp_path)) == 2


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"reference\.cache_dir: .*cannot be made"):
        ReferenceStore(tmp_path / "file" / "store")


def test_keys_tell_where_parts_end() -> None:
    assert content_key(b"ab", b"c") != content_key(b"a", b"bc") != content_key(b"abc")
    assert content_key(b"ab") == content_key(b"ab")
    assert len(content_key()) == 16


def test_keys_that_begin_alike_or_end_in_zeros_are_told_apart(tmp_path: Path) -> None:
    alike = [b"12345678" + bytes([n]) * 8 for n in range(3)]
    alike += [b"12345678".ljust(16 - n, b"x").ljust(16, b"\0") for n in range(8)]
    store = ReferenceStore(tmp_path)
    store.put(alike, values(11))
    for reader in (store, ReferenceStore(tmp_path)):
        assert [reader.get(key) for key in alike] == values(11)
        assert len(reader) == 11
    assert store.get(b"12345678") is None


def test_a_million_entries_are_found(tmp_path: Path) -> None:
    entries = np.zeros(1_000_000, ENTRY)
    entries["key"] = np.frombuffer(np.random.default_rng(0).bytes(16_000_000), "S16")
    entries["logp"] = np.arange(len(entries))
    entries["check"] = checksums(entries)
    (tmp_path / "shard-large.bin").write_bytes(MAGIC + entries.tobytes())
    store = ReferenceStore(tmp_path)
    assert store.damaged == 0
    content = entries["key"].tobytes()
    started = time.perf_counter()
    for n in range(0, 1_000_000, 1000):
        assert store.get(content[16 * n : 16 * n + 16]) == Scored(float(n), 0)
    assert time.perf_counter() - started < 1.0  # a thousand searches: no copy of the keys in any of them
    assert len(store) == 1_000_000


def test_damage_is_counted_once(tmp_path: Path) -> None:
    ReferenceStore(tmp_path).put(keys(3), values(3))
    content = bytearray(shards(tmp_path)[0].read_bytes())
    content[40] ^= 1
    shards(tmp_path)[0].write_bytes(content)
    store = ReferenceStore(tmp_path)
    store.refresh()
    assert store.damaged == 1


def test_a_disk_that_does_not_sync_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore(tmp_path)
    store.put(keys(1), values(1))

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"reference\.cache_dir: .*No space left"):
        store.sync()


def test_two_who_write_one_file_at_once_both_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two runs do that note the same data set as complete."""
    note = tmp_path / "note.json"
    real = os.replace

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", real)
        replace_json(note, {"by": "the other"})
        real(source, target)

    monkeypatch.setattr(os, "replace", late)
    replace_json(note, {"by": "one"})
    assert json.loads(note.read_text()) == {"by": "one"}
    assert list(tmp_path.iterdir()) == [note]


def test_a_disk_that_is_full_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        replace_json(tmp_path / "note.json", {})
    assert list(tmp_path.iterdir()) == []
