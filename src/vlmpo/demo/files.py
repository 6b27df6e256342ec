"""Writes the demo's pairs and questions as files that a recipe can name: recipes/smoke.yaml trains on them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlmpo.data.records import IMAGE_PLACEHOLDER, PreferencePair
from vlmpo.demo.task import Question, render
from vlmpo.fileio import replace_bytes, replace_json_lines

DATA_FOLDER = "data"


def write_data(
    folder: Path, train: Sequence[PreferencePair], held_out: Sequence[PreferencePair], test: Sequence[Question]
) -> None:
    """Write ``pairs.jsonl``, ``held_out.jsonl`` and ``questions.jsonl``, and their images as PNG into ``images/``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, pairs in (("pairs", train), ("held_out", held_out)):
        replace_json_lines(folder / f"{name}.jsonl", [_pair_record(pair, folder) for pair in pairs])
    asked = [{"image": _write(render(q.scene), folder), "question": q.text, "answer": str(q.truth)} for q in test]
    replace_json_lines(folder / "questions.jsonl", asked)


def _pair_record(pair: PreferencePair, folder: Path) -> dict[str, object]:
    (image,), (turn,) = pair.images, pair.prompt
    question = turn.text.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    name = _write(image, folder)
    return {"image": name, "question": question, "chosen": pair.chosen, "rejected": pair.rejected}


def _write(image: Image.Image, folder: Path) -> str:
    """Write the image, unless it is there, and return its name."""
    name = f"{hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest()}.png"
    if not (folder / "images" / name).exists():
        png = io.BytesIO()
        image.save(png, "PNG")
        replace_bytes(folder / "images" / name, png.getvalue())
    return name
