"""From questions to pairs to a model, twice: the second round samples from the first one's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.commands.test_train import call, checkpoint  # noqa: F401  checkpoint is a fixture
from tests.tiny_models import noise_image
from tests.training import logged


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_rounds_by_the_command_line(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    """A random model knows no answer, so the truth of each question is declared to be what it once said."""
    lines = []
    for i in range(6):
        noise_image(60, 60, i).save(tmp_path / f"{i}.png")
        lines.append({"id": str(i), "image": f"{i}.png", "question": f"what is in picture {i}?", "answer": "red"})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "model": {"path": str(checkpoint)},
        "data": {"train": [str(tmp_path / "round1" / "pairs_correctness.jsonl")], "max_tiles": 2},
        "build": {
            "questions": str(questions),
            "output_dir": str(tmp_path / "round1"),
            "samples": 8,
            "max_new_tokens": 2,
            "prompt": "direct",
            "verifier": "exact",
            "max_pairs": 3,
        },
        "training": {
            "output_dir": str(tmp_path / "model1"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    result = call("sample", str(file))
    assert result.exit_code == 0, result.output
    said: dict[str, str] = {}
    for response in read_lines(tmp_path / "round1" / "responses.jsonl"):
        text = response["text"]
        if text.strip().isalnum() and response["finish_reason"] == "length":
            said.setdefault(response["question_id"], text.strip())
    # Cut at the limit, no response may be chosen; so these are declared to have ended.
    responses = read_lines(tmp_path / "round1" / "responses.jsonl")
    text = "".join(json.dumps({**response, "finish_reason": "stop"}) + "\n" for response in responses)
    (tmp_path / "round1" / "responses.jsonl").write_text(text)
    assert said
    for line in lines:
        line["answer"] = said.get(line["id"], "red")
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))

    paired = call("pair", "correctness", str(file))
    assert paired.exit_code == 0, paired.output
    pairs = read_lines(tmp_path / "round1" / "pairs_correctness.jsonl")
    assert pairs
    for pair in pairs:
        assert pair["chosen"].strip().lower() == pair["answer"].lower()
    trained = call("train", str(file))
    assert trained.exit_code == 0, trained.output

    round2 = [f"model.path={tmp_path / 'model1'}", f"build.output_dir={tmp_path / 'round2'}"]
    again = call("sample", str(file), *round2)
    assert again.exit_code == 0, again.output
    second = read_lines(tmp_path / "round2" / "responses.jsonl")
    assert len(second) == 48
    assert {response["model"] for response in second} != {response["model"] for response in responses}
    # Trained from round 1's model, round 2 starts where policy and reference are the same again.
    more = call(
        "train",
        str(file),
        f"model.path={tmp_path / 'model1'}",
        f"training.output_dir={tmp_path / 'model2'}",
    )
    assert more.exit_code == 0, more.output
    assert logged(tmp_path / "model2")[0]["rewards/chosen"] == 0.0
    first_hash, second_hash = (
        json.loads((tmp_path / name / "manifest.json").read_text())["reference_hash"] for name in ("model1", "model2")
    )
    assert first_hash != second_hash
