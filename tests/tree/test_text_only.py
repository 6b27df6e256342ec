"""Causal language models without images: token ids by hand, and every command on files as a user has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.tiny_models import noise_image, random_pair
from tests.training import logged
from tests.zoo import FAMILIES
from tests.zoo.words import tokenizer
from vlmpo.cli import app
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import ModelError, RecordError
from vlmpo.generate.base import GenerationRequest, Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.models.loading import load_model, load_processor

FAMILY = FAMILIES["llama-text"]
TEXT_ONLY = [family for family in FAMILIES.values() if not family.images]
PAIR = PreferencePair((Message("user", "colour?"),), (), "blue!", "red", origin="pairs.jsonl:7")


# ---- token ids ----


def test_ids_by_hand() -> None:
    """Turn by turn, each part tokenised on its own: special tokens cut the text there anyway."""
    own = FAMILY.processor()
    start, end = own.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text: str) -> list[int]:
        return own(text, add_special_tokens=False)["input_ids"]

    encoded = PairEncoder(own).encode(PAIR)
    assert encoded.prompt_ids.tolist() == [start, *ids("user\ncolour?"), end, *ids("\n"), start, *ids("assistant\n")]
    assert encoded.chosen_ids.tolist() == [*ids("blue!"), end]
    assert encoded.rejected_ids is not None
    assert encoded.rejected_ids.tolist() == [*ids("red"), end]
    assert (encoded.vision, encoded.token_types, encoded.tiles, encoded.image_tokens) == ({}, {}, 0, 0)
    assert PairEncoder(own).notices == []


@pytest.mark.parametrize("template_writes_it", [False, True])
def test_the_start_token_is_the_templates_affair(template_writes_it: bool) -> None:
    """A tokenizer that adds one to plain text adds none to a conversation: transformers' own convention."""
    own = tokenizer(["<|im_start|>"], bos="<s>", eos="<|im_end|>", pad="<pad>")
    assert own("red")["input_ids"][0] == own.bos_token_id
    own.chat_template = ("{{ bos_token }}" if template_writes_it else "") + FAMILY.processor().chat_template
    encoded = PairEncoder(own).encode(PAIR)
    asked = own.apply_chat_template([{"role": "user", "content": "colour?"}], add_generation_prompt=True, tokenize=True)
    assert encoded.prompt_ids.tolist() == asked["input_ids"]
    assert encoded.prompt_ids.tolist().count(own.bos_token_id) == template_writes_it
    assert own.bos_token_id not in encoded.chosen_ids


def test_a_pair_with_an_image_is_refused_by_name() -> None:
    shown = PreferencePair((Message("user", "<image>\nwhat?"),), (noise_image(8, 8, 0),), "red", "blue", origin="p:1")
    with pytest.raises(RecordError, match=r"p:1: the record has images, and .* reads none; take it out") as caught:
        PairEncoder(FAMILY.processor()).encode(shown)
    assert caught.value.reason == "images_unsupported"


# ---- generation ----


@pytest.mark.parametrize("family", TEXT_ONLY, ids=lambda family: family.name)
def test_prompts_of_a_batch_do_not_feel_each_other(family: Any) -> None:
    """Prompts of other lengths, padded, several samples each: as each alone."""
    asked = [
        GenerationRequest((Message("user", "what colour is it, " * times + "?"),), (), n=n, seed=times)
        for times, n in ((1, 2), (4, 2), (2, 2))
    ]
    together, alone = (
        LocalEngine(family.model(0), family.processor(), Sampling(temperature=1.0, max_new_tokens=8), size)
        for size in (3, 1)
    )
    assert (together.batch_size, alone.batch_size) == (3, 1)
    texts = [[answer.text for answer in answers] for answers in together.generate(asked)]
    assert texts == [[answer.text for answer in answers] for answers in alone.generate(asked)]
    assert len({text for answers in texts for text in answers}) > 3


# ---- the commands ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    FAMILY.model(0).save_pretrained(folder)
    FAMILY.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, checkpoint: Path) -> str:
    """Nine pairs, one of them with an image, and four questions, one of them with an image."""
    noise_image(20, 20, 0).save(tmp_path / "0.png")
    pairs: list[dict[str, Any]] = []
    for seed in range(9):
        pair = random_pair(seed, images=0)
        pairs.append({"question": pair.prompt[0].text, "chosen": pair.chosen, "rejected": pair.rejected})
    pairs[4]["image"] = "0.png"
    questions: list[dict[str, Any]] = [{"id": f"q{n}", "question": f"is it {n}?", "answer": str(n)} for n in range(4)]
    questions[1]["image"] = "0.png"
    for name, lines in (("pairs", pairs), ("q", questions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "model": {"path": str(checkpoint)},
        "data": {"train": ["pairs.jsonl"], "eval": ["pairs.jsonl"]},
        "build": {
            "questions": "q.jsonl",
            "output_dir": str(tmp_path / "build"),
            "samples": 2,
            "max_new_tokens": 4,
        },
        "evaluate": {"questions": "q.jsonl", "max_new_tokens": 4},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_inspecting(recipe: str) -> None:
    text = call("inspect", recipe)
    assert "prompt tokens, 0 of them from images in 0 tiles" in text
    assert "<|im_start|>user" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("  pairs "))
    header = next(line.split() for line in text.splitlines() if "images_unsupported" in line)
    assert header[-1] == "images_unsupported"
    assert row[1:] == ["9", "8", "0", "1"]
    assert "prompts shared" in text


@pytest.mark.slow
def test_a_run_from_recipe_to_reloaded_model(recipe: str, tmp_path: Path) -> None:
    call("train", recipe)
    run = tmp_path / "run"
    first, *_ = logged(run)
    assert first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(0.8317766 + first["loss/nll"], rel=1e-6)
    written = json.loads((run / "manifest.json").read_text())
    (counts,) = written["data"]["sets"].values()
    assert counts == {"read": 9, "used": 8, "held_out": 0, "dropped": {"images_unsupported": 1}, "not_reached": 0}
    assert written["model"]["shared_rows"] is True
    assert written["model"]["kernels"] == ""
    assert written["evaluation"]["eval"]["eval_pairs"] == 8
    tuned, own = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    before = load_model(yaml.safe_load(Path(recipe).read_text())["model"]["path"])
    asked = own.apply_chat_template([{"role": "user", "content": "is it 3?"}], return_tensors="pt", return_dict=True)
    moved = (tuned(**asked).logits - before(**asked).logits).abs().max()
    assert 1e-4 < moved < 10


@pytest.mark.slow
def test_sampling_and_evaluating(recipe: str, tmp_path: Path) -> None:
    call("train", recipe)
    call("sample", recipe)
    lines = [json.loads(line) for line in (tmp_path / "build" / "responses.jsonl").read_text().splitlines()]
    assert sorted((line["question_id"], line["sample_index"]) for line in lines) == [
        (name, index) for name in ("q0", "q2", "q3") for index in (0, 1)
    ]
    manifest = json.loads((tmp_path / "build" / "sample_manifest.json").read_text())
    assert "images_unsupported" in json.dumps(manifest)
    call("evaluate", recipe)
    found = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert found["pairs"]["eval"]["eval_pairs"] == 8
    (figures,) = found["questions"]["models"].values()
    assert (figures["items"], figures["not_asked"]) == (3, 1)


# ---- loading ----


def test_what_is_at_a_path_is_what_is_loaded(checkpoint: Path) -> None:
    assert type(load_model(str(checkpoint))).__name__ == "LlamaForCausalLM"
    own = load_processor(str(checkpoint))
    assert own.convert_tokens_to_ids("<|im_end|>") == FAMILY.processor().convert_tokens_to_ids("<|im_end|>")
    assert torch.equal(
        PairEncoder(own).encode(PAIR).prompt_ids, PairEncoder(FAMILY.processor()).encode(PAIR).prompt_ids
    )


def test_half_a_processor_is_refused(tmp_path: Path) -> None:
    """transformers gives back whatever part it finds; a model that sees needs both."""
    seeing = FAMILIES["llava-1.5"]
    for part in ("tokenizer", "image_processor"):
        folder = tmp_path / part
        seeing.model(0).config.save_pretrained(folder)
        getattr(seeing.processor(), part).save_pretrained(folder)
        with pytest.raises(ModelError, match=r"model\.path: no processor can be loaded from"):
            load_processor(str(folder))
    seeing.processor().image_processor.save_pretrained(tmp_path / "alone")
    with pytest.raises(ModelError, match="has a CLIPImageProcessor but no whole processor"):
        load_processor(str(tmp_path / "alone"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's processor needs num2words."""
    from transformers.models.smolvlm import processing_smolvlm

    FAMILIES["smolvlm"].processor().save_pretrained(tmp_path)
    load_processor(str(tmp_path))
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ModelError, match=r"model\.path: no processor can be loaded from .*pip install num2words"):
        load_processor(str(tmp_path))
