"""Lines, texts and media above their bounds are dropped as ``too_large`` before a parser or a tokenizer reads them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from vlmpo.data.dataset import open_pairs
from vlmpo.data.formats import FORMATS, RecordContext
from vlmpo.data.index.filter import screen
from vlmpo.data.readers import arrow as arrow_module
from vlmpo.data.readers import json as json_module
from vlmpo.data.readers.json import JsonRecords
from vlmpo.data.readers.questions import read_questions
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.data.records import MAX_ENCODED_BYTES, MAX_LINE_BYTES, MAX_TEXT
from vlmpo.errors import RecordError

PAIR = {"question": "Q?", "chosen": "good", "rejected": "bad"}


def dropped(path: Path) -> list[tuple[str, str]]:
    pairs = open_pairs([SourceSpec(str(path))])
    return [(drop.origin.rpartition("/")[2], drop.reason) for drop in screen(pairs).dropped]


def test_the_bounds_are_those_of_the_manual() -> None:
    assert (MAX_LINE_BYTES, MAX_TEXT, MAX_ENCODED_BYTES) == (16 << 20, 1_000_000, 64 << 20)


@pytest.mark.parametrize(
    "content",
    [
        '"meta": "' + "x" * (17 << 20) + '"',
        '"meta": [' + "[]," * (6 << 20) + "0]",
        '"chosen": "' + "ab " * (6 << 20) + '"',
    ],
)
def test_a_long_line_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join([json.dumps(PAIR) + "\n", f"{json.dumps(PAIR)[:-1]}, {content}}}\n", json.dumps(PAIR)]))
    decoded: list[int] = []
    plain = json_module.decode_json
    monkeypatch.setattr(json_module, "decode_json", lambda text: decoded.append(len(text)) or plain(text))
    assert dropped(path) == [("p.jsonl:2", "too_large")]
    assert max(decoded) < 100


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of at most 100 kB, beside media of at most 1 MB."""
    monkeypatch.setattr(json_module, "MAX_LINE_BYTES", 100_000)
    monkeypatch.setattr(json_module, "_MAX_WHOLE_LINE", 1_100_000)
    monkeypatch.setattr(json_module, "_BLOCK", 1 << 10)


BIG = "iVBORw0KGgo" + "Ab+/" * 100_000


@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize(
    ("record", "is_read"),
    [
        ({"image": BIG}, True),
        ({"images": [BIG, BIG]}, True),
        ({"image": f"data:image/jpeg;base64,{BIG}"}, True),
        ({"image": {"bytes": BIG}}, True),
        ({"image": "/9j/" + BIG}, True),
        ({"image": BIG, "meta": "m" * 90_000}, True),
        ({"image": BIG, "meta": "m" * 110_000}, False),
        ({"image": [BIG, BIG, BIG]}, False),
        ({"meta": BIG[11:]}, False),
        ({"meta": f"iVBORw0KGgo{' Ab+/' * 100_000}"}, False),
        ({"meta": list(BIG[:50_000])}, False),
        ({"meta": "\\" * 200_000}, False),
    ],
)
def test_embedded_media_do_not_count_in_a_line(tmp_path: Path, record: dict[str, Any], is_read: bool) -> None:
    for number, text in enumerate((json.dumps(record), json.dumps(record).replace("/", "\\/"))):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        records = JsonRecords(str(path))
        if is_read:
            assert records.record(0) == record
        else:
            with pytest.raises(RecordError, match=r"the line takes \d\.\d MB, at most .*\[too_large\]"):
                records.record(0)


@pytest.mark.usefixtures("short_lines")
def test_an_element_of_an_array_is_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([PAIR, {**PAIR, "meta": "m " * 60_000}, {**PAIR, "image": BIG}]))
    assert dropped(path) == [("p.json:1", "too_large")]


@pytest.mark.parametrize("length", [99, 100, 101, 250, 1000])
@pytest.mark.parametrize("character", [b"x", b" "])
@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"a": 1}', b"\n\n \n"])
def test_lines_without_end_are_found_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, character: bytes, end: bytes
) -> None:
    monkeypatch.setattr(json_module, "_CHUNK", 16)
    monkeypatch.setattr(json_module, "MAX_LINE_BYTES", 80)
    monkeypatch.setattr(json_module, "_MAX_WHOLE_LINE", 100)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"b": 2}\n' + character * length + b"z" + end)
    records = JsonRecords(str(path))
    lines = [int(records.origin(index).rpartition(":")[2]) for index in range(len(records))]
    assert lines == ([1, 2, 3] if b"a" in end else [1, 2])
    assert records.record(0) == {"b": 2}
    with pytest.raises(RecordError, match="too_large"):
        records.record(1)
    if b"a" in end:
        assert records.record(2) == {"a": 1}


TEXTS: dict[str, tuple[str, Any]] = {
    "question": ("mmpr", lambda text: {**PAIR, "question": text}),
    "chosen": ("mmpr", lambda text: {**PAIR, "chosen": text}),
    "rejected": ("mmpr", lambda text: {**PAIR, "rejected": text}),
    "inner": ("rlhf_v", lambda text: {"text": json.dumps({**PAIR, "chosen": text})}),
    "turn": ("trl", lambda text: {**PAIR, "prompt": [{"role": "user", "content": text}]}),
    "items": (
        "trl",
        lambda text: {**PAIR, "prompt": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    ),
    "history": ("alpaca", lambda text: {**PAIR, "instruction": "x", "history": [["a", text]]}),
    "together": (
        "trl",
        lambda text: {**PAIR, "prompt": [{"role": "user", "content": part} for part in (text[:400], text[400:])]},
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_long_text_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("vlmpo.data.records.MAX_TEXT", 1000)
    format_, record = TEXTS[name]
    parse = FORMATS[format_].parse
    context = RecordContext("f:1")
    parse(record("x" * 900), context)
    with pytest.raises(RecordError, match=r"has 1\d\d\d characters, at most 1000 are read; shorten it") as caught:
        parse(record("x" * 1001), context)
    assert caught.value.reason == "too_large"


def test_a_text_of_a_million_characters_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [{**PAIR, "chosen": "ab " * (MAX_TEXT // 3 + extra)} for extra in (0, 1)]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert dropped(path) == [("p.jsonl:2", "too_large")]
    assert len(open_pairs([SourceSpec(str(path))])[0].chosen) == 999_999


@pytest.mark.parametrize("key", ["question", "answer", "id"])
def test_a_question_is_bounded_too(tmp_path: Path, key: str) -> None:
    path = tmp_path / "q.jsonl"
    record = {"question": "Q?", "answer": "a"}
    path.write_text("\n".join(json.dumps({**record, **more}) for more in ({}, {key: "x" * 1_000_001})))
    questions = read_questions(path)
    assert (len(questions.questions), questions.counts()) == (1, {"too_large": 1})


@pytest.mark.parametrize("form", ["bytes", "mapping", "base64", "base64 in a mapping", "data URL", "escapes"])
def test_an_embedded_image_is_bounded(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr("vlmpo.data.formats.media.MAX_ENCODED_BYTES", 10_000)

    def written(size: int) -> Any:
        content = b"\x89PNG\r\n\x1a\n" + b"0" * (size - 8)
        text = base64.b64encode(content).decode()
        return {
            "bytes": content,
            "mapping": {"bytes": content, "path": None},
            "base64": text,
            "base64 in a mapping": {"bytes": text},
            "data URL": f"data:image/png;base64,{text}",
            "escapes": "data:image/svg+xml," + "a" * size,
        }[form]

    parse = FORMATS["mmpr"].parse
    assert len(parse({**PAIR, "image": written(9_999)}, RecordContext("f:1")).images[0]) == 9_999
    with pytest.raises(
        RecordError, match="`image` embeds about 0 MB, at most 0 MiB are read; save it as a file"
    ) as caught:
        parse({**PAIR, "image": written(10_002)}, RecordContext("f:1"))
    assert caught.value.reason == "too_large"


def test_rows_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.parquet"
    image = {"bytes": b"0" * (MAX_ENCODED_BYTES + 1), "path": None}
    columns: dict[str, list[Any]] = {
        "question": ["Q?"] * 4,
        "chosen": ["a"] * 4,
        "rejected": ["b", "b", "c" * 1_000_001, "b"],
    }
    columns["image"] = [None, image, None, {"bytes": b"0" * 999, "path": None}]
    parquet.write_table(pa.table(columns), path)
    assert dropped(path) == [("p.parquet:row 1", "too_large"), ("p.parquet:row 2", "too_large")]
    monkeypatch.setattr(arrow_module, "MAX_ROW_BYTES", 1000)
    assert [where for where, _ in dropped(path)] == ["p.parquet:row 1", "p.parquet:row 2", "p.parquet:row 3"]
