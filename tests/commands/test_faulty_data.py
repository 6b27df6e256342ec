"""Data that go wrong, through the command line: each fault is counted, shown with file and line, and ends no run."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.test_train import call, write_recipe
from tests.data.formats.test_formats import said
from tests.data.formats.test_media import png
from tests.paths import SHARED
from tests.tiny_models import noise_image, processor

PAIR = {"question": "Q?", "chosen": "good", "rejected": "bad"}
CASES = SHARED / "reports" / "cases"


@pytest.fixture(scope="module")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    processor().save_pretrained(folder)
    return folder


def inspected(folder: Path, checkpoint: Path, *sources: Any, **data: Any) -> Any:
    return call("inspect", write_recipe(folder, checkpoint, data={"train": list(sources), **data}))


def write(path: Path, *lines: Any) -> str:
    noise_image(60, 50, 0).save(path.parent / "0.png")
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


FAULTS = [
    ({**PAIR, "imgae": "0.png"}, "unread_media", "`imgae` seems to hold an image"),
    ({**PAIR, "completion": "other"}, "ambiguous_field", "holds `chosen` and `completion`"),
    ('{"question": "Q?", "chosen": "a", "rejected": "b", "chosen": "c"}', "ambiguous_field", "'chosen' is given twice"),
    ({**PAIR, "image": "file://[bad"}, "missing_image", "is not a file address"),
    ({**PAIR, "image": "half \ud83d.png"}, "missing_image", r"half \ud83d.png does not exist"),
    ({**PAIR, "image": "data:image/png;base64,A*"}, "undecodable_image", "is not valid base64"),
    ({**PAIR, "image": [[1, 2], [3, 4]]}, "array_image", "an image in nested lists of numbers"),
    ({**PAIR, "image": "../0.png"}, "outside_image_root", "leads out of"),
    ({**PAIR, "chosen": "x" * 1_000_001}, "too_large", "`chosen` has 1000001 characters, at most 1000000 are read"),
    ({**PAIR, "more": "x" * (17 << 20)}, "too_large", "the line takes 17.8 MB, at most 16 MiB are read"),
    ({**PAIR, "rejected_complete": "no"}, "missing_field", "`rejected_complete` must be true or false"),
    ("{", "bad_json", "an object written over several lines?"),
]


def test_every_fault_is_shown_with_file_and_line(tmp_path: Path, processor_folder: Path) -> None:
    file = write(tmp_path / "p.jsonl", PAIR, *(line for line, _, _ in FAULTS))
    whole = {
        "chosen": [said("user", "Q?"), said("assistant", "a")],
        "rejected": [said("user", "Q?"), said("assistant", "b")],
    }
    contradicting = write(tmp_path / "w.jsonl", whole, {**whole, "prompt": "another"})
    alpaca = write(
        tmp_path / "a.json", json.dumps([{"instruction": "Q?", "chosen": "a", "rejected": "b", "history": 1}])
    )
    result = inspected(tmp_path, processor_folder, file, contradicting, alpaca)
    assert result.exit_code == 0, result.output
    for number, (_, reason, words) in enumerate(FAULTS, start=2):
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"  {reason}: {file}:{number}: ")]
        assert words in line
        assert len(line) < 400
    assert f"  prompts_differ: {contradicting}:2: " in result.output
    assert f"  bad_conversation: {alpaca}:1: `history` must be a list" in result.output


def test_when_none_is_left_the_first_records_are_named(tmp_path: Path, processor_folder: Path) -> None:
    file = write(tmp_path / "p.jsonl", *(line for line, _, _ in FAULTS))
    held_by_eval = write(tmp_path / "good.jsonl", PAIR)
    for name, result in (
        ("train", inspected(tmp_path, processor_folder, file)),
        ("eval", inspected(tmp_path, processor_folder, held_by_eval, eval=[file])),
    ):
        assert result.exit_code == 2, result.output
        purpose = "train" if name == "train" else "evaluate"
        assert f"error: data.{name}: of {len(FAULTS)} pairs none is left to {purpose} on (" in result.output
        for number in (1, 2, 3, 4, 6, 7, 8, 9, 11, 12):  # the first three, and the first of every other reason
            assert f"{file}:{number}: " in result.output
        assert f"{file}:5: " not in result.output
        assert "Traceback" not in result.output


def test_keys_that_nothing_reads_are_listed(tmp_path: Path, processor_folder: Path) -> None:
    made = {"question_id": "q", "kind": "wrong", "settings": {}, "answer": "3", "model": "m", "samples": [0, 1]}
    file = write(
        tmp_path / "p.jsonl",
        {**PAIR, "image": "0.png", "image_path": "x.png", "id": 1},
        {**PAIR, "id": 2, "choices": ["a", "b"], "nothing": None},
        {**PAIR, **made, "id": 3},
    )
    other = write(tmp_path / "o.jsonl", PAIR)
    result = inspected(tmp_path, processor_folder, file, other, eval=[file])
    listed = "keys not read nor shown to the model: id (in all), choices (in 1), image_path (in 1)"
    assert f"  data.train, p: {listed}\n" in result.output
    assert f"  data.eval, p: {listed}\n" in result.output
    assert result.output.count("keys not read") == 2


@pytest.mark.parametrize("count", [50, 51, 3000])
def test_a_flood_of_keys_is_cut_short(tmp_path: Path, processor_folder: Path, count: int) -> None:
    file = write(tmp_path / "p.jsonl", {**PAIR, **{f"key{number:04}": 1 for number in range(count)}})
    (line,) = [line for line in inspected(tmp_path, processor_folder, file).output.splitlines() if "keys not" in line]
    assert line.endswith("key0049 (in all)" if count == 50 else f"key0049 (in all), and {count - 50} more")


def test_the_forms_of_images_are_counted_once(tmp_path: Path, processor_folder: Path) -> None:
    encoded = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    (tmp_path / "set").mkdir()
    file = write(
        tmp_path / "set" / "p.jsonl",
        *({**PAIR, "question": f"{number}?", "image": "0.png"} for number in range(5)),
        *({**PAIR, "image": str(tmp_path / "set" / "0.png")}, {**PAIR, "image": f"file://{tmp_path}/set/0.png"}),
        {**PAIR, "question": "<image><image>", "images": ["0.png", encoded]},
        *({**PAIR, "image": "../0.png"}, {**PAIR, "image": "x/../../0.png"}, PAIR),
    )
    other = write(tmp_path / "o.jsonl", PAIR)
    result = inspected(tmp_path, processor_folder, file, other)
    given = "absolute paths (in 1), embedded (in 1), file:// addresses (in 1), relative paths (in 6)"
    outside = "outside the image root, dropped (in 2)"
    assert f"  data.train, p: images and videos given as {given}, {outside}\n" in result.output
    assert result.output.count("images and videos given as") == 1
    assert f"  outside_image_root: {file}:9: `image` leads out of {tmp_path}/set: ../0.png; name the" in result.output


def test_confined_data_take_nothing_from_outside(tmp_path: Path, processor_folder: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "other.jsonl", PAIR)
    file = write(tmp_path / "set" / "p.jsonl", *({**PAIR, "image": name} for name in ("0.png", "link.png", "a.png")))
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "0.png")
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "set" / "0.png")
    write(tmp_path / "set" / "q.jsonl", {**PAIR, "image": str(tmp_path / "0.png")})
    assert "outside_image_root" not in inspected(tmp_path, processor_folder, file).output
    result = inspected(tmp_path, processor_folder, file, confine=True)
    words = f"{file}:2: `image` leads out of {tmp_path}/set, and data.confine is true: link.png"
    assert (result.exit_code, words in result.output) == (0, True), result.output
    result = inspected(tmp_path, processor_folder, file, confine=True, on_bad_record="fail")
    assert (result.exit_code, words in result.output) == (2, True), result.output
    result = inspected(tmp_path, processor_folder, file, str(tmp_path / "set" / "q.jsonl"), confine=True)
    assert "given as relative paths (in 2), outside the image root, dropped (in 1)\n" in result.output
    assert "data.train, q: images and videos given as outside the image root, dropped (in 1)\n" in result.output


def test_pixels_are_the_same_by_any_name_and_in_base64(tmp_path: Path, processor_folder: Path) -> None:
    write(tmp_path / "p.jsonl", PAIR)
    encoded = base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    shown = set()
    for number, held in enumerate(
        (
            {"image": "0.png"},
            {"img_path": "0.png"},
            {"images": [encoded]},
            {"image": f"data:image/png;base64,{encoded}"},
        )
    ):
        result = inspected(tmp_path, processor_folder, write(tmp_path / f"{number}.jsonl", {**PAIR, **held}))
        shown.add(result.output.split("prompt tokens", 1)[1].split("training pairs")[0])
    assert len(shown) == 1
    assert "0 of them from images" not in shown.pop()


@pytest.mark.skipif(not CASES.is_dir(), reason="the reported cases are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "exit_code", "words"),
    [
        ("unread_media.jsonl", 0, "unread_media     2     2 "),
        ("prompt_contradicts.jsonl", 2, "prompt_contradicts.jsonl:1: `prompt` is not what"),
        ("swift_rejected_key.jsonl", 2, "swift_rejected_key.jsonl:1: `rejected_response` is missing; rename"),
        ("utf16.jsonl", 2, "utf16.jsonl:1: the file is written in UTF-16"),
        ("array_in.jsonl", 2, "array_in.jsonl:1: the line holds a list"),
        ("base64_image.jsonl", 0, "base64_image     1     1 "),
        ("null_image.jsonl", 0, "null_image     1     1 "),
        ("bad_file_url.jsonl", 0, "bad_file_url.jsonl:1: `image` is not a file address"),
        ("history_number.json", 0, "history_number.json:1: `history` must be a list"),
        ("llamafactory/dataset_info.json", 0, "mine         1     1 "),
        ("llamafactory", 0, "mine         1     1 "),
    ],
)
def test_reported_cases(tmp_path: Path, processor_folder: Path, name: str, exit_code: int, words: str) -> None:
    result = inspected(tmp_path, processor_folder, str(CASES / name))
    assert (result.exit_code, words in result.output, "Traceback" in result.output) == (exit_code, True, False), (
        result.output
    )
