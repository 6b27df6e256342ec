"""One record of which nobody foresaw what it holds is counted as ``unreadable_record``, and ends nothing."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.paths import REPO
from tests.tiny_models import noise_image, processor
from vlmpo.data.dataset import open_pairs
from vlmpo.data.encode.encoder import EncodedPair, EncodedPairs, PairEncoder, Unusable
from vlmpo.data.formats import FORMATS, as_pairs
from vlmpo.data.formats.base import Format
from vlmpo.data.index.filter import screen
from vlmpo.data.index.scan import _read_records
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import Message, PreferencePair, one_record
from vlmpo.errors import DataError, RecordError

PAIR = {"question": "Q?", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IndexError("list index out of range"), "IndexError (list index out of range)"),
        (KeyError("a"), "KeyError ('a')"),
        (UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), "UnicodeEncodeError ('utf-8' codec"),
        (RecursionError("x" * 999), "RecursionError (xxx"),
        (ZeroDivisionError(), "ZeroDivisionError ()"),
    ],
)
def test_the_reason_names_the_exception(error: Exception, said: str) -> None:
    with pytest.raises(RecordError) as caught, one_record("f:3"):
        raise error
    assert (caught.value.reason, caught.value.origin) == ("unreadable_record", "f:3")
    assert caught.value.detail.startswith(f"reading it raised {said}")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "error", [RecordError("identical", "f:1", "x"), DataError("x"), MemoryError(), KeyboardInterrupt()]
)
def test_what_is_no_fault_of_the_record_is_left_alone(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, one_record("f:3"):
        raise error
    assert caught.value is error


def nested(depth: int, kind: str) -> str:
    inner = "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth
    return json.dumps(PAIR)[:-1] + f', "more": {inner}}}'


@pytest.mark.parametrize("kind", ["list", "object"])
@pytest.mark.parametrize("depth", [50, 100, 900, 5000, 100_000])
def test_what_is_nested_deep_is_read_or_counted(tmp_path: Path, kind: str, depth: int) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([json.dumps(PAIR), nested(depth, kind), json.dumps(PAIR)]))
    pairs = open_pairs([SourceSpec(str(path))])
    drops = screen(pairs).dropped
    assert [drop.reason for drop in drops] in ([], ["bad_json"], ["unreadable_record"])
    assert bool(drops) == (depth > 900)
    assert {drop.origin for drop in drops} <= {f"{path}:2"}
    path.write_text(
        "\n".join([json.dumps(PAIR | {"answer": "a"})] * 2 + [nested(depth, kind)[:-1] + ', "answer": "a"}'])
    )
    questions = read_questions(path)
    assert len(questions.questions) + len(questions.dropped) == 3


def test_a_parser_that_fails_fails_for_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FORMATS["mmpr"]

    def parse(record: Any, context: Any) -> PreferencePair:
        return [plain.parse(record, context)][record.get("at", 0)]

    monkeypatch.setitem(FORMATS, "mmpr", Format(plain.name, plain.title, plain.keys, parse))
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({**PAIR, "at": at}) for at in (0, 1, 0, "x")))
    pairs = open_pairs([SourceSpec(str(path))])
    drops = [
        (drop.origin.rpartition(":")[2], drop.reason, drop.detail.split(" (")[0]) for drop in screen(pairs).dropped
    ]
    assert drops == [
        ("2", "unreadable_record", "reading it raised IndexError"),
        ("4", "unreadable_record", "reading it raised TypeError"),
    ]
    with pytest.raises(RecordError, match=rf"{path}:2: reading it raised IndexError .*\[unreadable_record\]"):
        pairs[1]
    in_memory = as_pairs([PAIR, {**PAIR, "at": 1}])
    assert in_memory[0].chosen == "good"
    with pytest.raises(RecordError, match=r"train_dataset\[1\]: reading it raised IndexError"):
        in_memory[1]


def test_what_a_scan_makes_of_a_pair_is_guarded_too() -> None:
    class Source:
        stamp, settings, can_fork = None, (), False

        def __len__(self) -> int:
            return 2

        def pair(self, index: int) -> PreferencePair:
            return PreferencePair((Message("user", "Q?"),), (object(),) * index, "a", "b")

    assert _read_records(Source(), np.array([0, 1]))["fault"].is_valid().to_pylist() == [False, True]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"ab\xc3", b"\x80abc"])
def test_a_row_with_broken_text_is_counted(tmp_path: Path, content: bytes) -> None:
    offsets = np.array([0, 2, 2 + len(content), 4 + len(content)], np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"Q?" + content + b"Q?")]
    texts = pa.Array.from_buffers(pa.string(), 3, buffers)
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"question": texts, "chosen": ["a"] * 3, "rejected": ["b"] * 3}), path)
    pairs = open_pairs([SourceSpec(str(path))])
    assert [(drop.index, drop.reason) for drop in screen(pairs).dropped] == [(1, "unreadable_record")]
    assert pairs[2].chosen == "a"


# ---- the encoder ----


class Pairs(list[PreferencePair]):
    """A data set of pairs in memory."""


def shown(*images: Any, chosen: str = "red") -> PreferencePair:
    text = "<image>\n" * len(images) + "Q?"
    return PreferencePair((Message("user", text),), images, chosen, "blue", source="s", origin="f:1")


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel"), AttributeError("x"), OverflowError("too large"), OSError("x")]
)
def test_an_encoder_that_fails_fails_for_one_pair(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    encoder = PairEncoder(processor())
    plain = encoder._encode_prompt

    def encode(prompt: str, pair: PreferencePair) -> Any:
        if pair.chosen == "green":
            raise error
        return plain(prompt, pair)

    monkeypatch.setattr(encoder, "_encode_prompt", encode)
    data = EncodedPairs(Pairs([shown(), shown(chosen="green"), shown()]), encoder)
    assert isinstance(data[0], EncodedPair)
    assert isinstance(data[2], EncodedPair)
    bad = data[1]
    assert isinstance(bad, Unusable)
    assert bad.error.reason == "unreadable_record"
    assert bad.error.detail.startswith(f"encoding it raised {type(error).__name__} (")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "undecodable_image"),
        (lambda path: path.write_bytes(b"no image"), "undecodable_image"),
        (lambda path: path.write_bytes(b""), "undecodable_image"),
        (lambda path: path.unlink(), "missing_image"),
        (lambda path: (path.unlink(), path.mkdir()), "missing_image"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "missing_image"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "missing_image"),
    ],
    ids=["cut", "other", "empty", "gone", "folder", "pipe", "device"],
)
def test_an_image_that_goes_bad_in_a_run_is_counted(tmp_path: Path, change: Any, reason: str) -> None:
    path = tmp_path / "0.png"
    noise_image(60, 50, 0).save(path)
    data = EncodedPairs(Pairs([shown(str(path)), shown()]), PairEncoder(processor()))
    assert isinstance(data[0], EncodedPair)
    change(path)
    bad = data[0]
    assert isinstance(bad, Unusable)
    assert (bad.error.reason, bad.source) == (reason, "s")
    assert str(path) in str(bad.error)
    assert isinstance(data[1], EncodedPair)


@pytest.mark.parametrize("name", ["half \ud83d.png", "\0.png", "x" * 5000])
def test_a_name_that_no_file_can_have_is_a_missing_image(name: str) -> None:
    bad = EncodedPairs(Pairs([shown(name)]), PairEncoder(processor()))[0]
    assert isinstance(bad, Unusable)
    assert bad.error.reason == "missing_image"


def test_a_program_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.eps"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n")
    bad = EncodedPairs(Pairs([shown(str(path))]), PairEncoder(processor()))[0]
    assert isinstance(bad, Unusable)
    assert (bad.error.reason, "a program, which is not run" in bad.error.detail) == ("undecodable_image", True)


# ---- memory ----

_SCRIPT = """
import resource, sys
import vlmpo.commands.inspect
from vlmpo.data.dataset import open_pairs
from vlmpo.data.index.filter import screen
from vlmpo.data.readers.spec import SourceSpec
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print([drop.reason for drop in screen(open_pairs([SourceSpec(sys.argv[1])])).dropped])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
HUGE = {
    "text": lambda: f'"chosen": "{"ab " * 17_000_000}"',
    "one word": lambda: f'"chosen": "{"a" * 50_000_000}"',
    "lists": lambda: f'"more": [{"[]," * 6_000_000}[]]',
    "objects": lambda: f'"more": [{"{}," * 17_000_000}0]',
    "escapes": lambda: f'"chosen": "{chr(92) + "u0041" * 8_000_000}"',
    "image": lambda: f'"image": "iVBORw0KGgo{"A" * 92_000_000}"',
    "spaces": lambda: " " * 200_000_000 + '"chosen": "a"',
}


@pytest.mark.slow
def test_huge_lines_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        for content in HUGE.values():
            file.write(f"{json.dumps(PAIR)}\n{json.dumps(PAIR)[:-1]}, {content()}}}\n")
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO / "src"), "VLMPO_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )
    reasons, megabytes = result.stdout.splitlines()
    assert reasons == str(["too_large"] * len(HUGE))
    assert int(megabytes) < 700  # the longest text takes 105 MB, and its parser several times that
