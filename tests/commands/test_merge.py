"""``vlmpo merge``: the merged folder is the unmerged model, whole, and says so when it cannot be made."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.commands.test_train import call, records, write_data, write_recipe
from tests.tiny_models import SIZE, image_tree, noise_image, processor
from tests.tiny_models import model as tiny_model
from vlmpo.tree.attention import ATTENTION_NAME
from vlmpo.tree.layout import PromptTree


def base_folder(folder: Path, **size: Any) -> Path:
    tiny_model(size=replace(SIZE, **size)).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def adapted(base: Path, folder: Path, **fields: Any) -> PeftModel:
    """The base under an adapter that changes it, saved to ``folder``."""
    torch.manual_seed(4)
    fields = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), LoraConfig(**fields))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


def tree() -> PromptTree:
    return image_tree([noise_image(60, 60, 1)], [6], 1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tree().prompt_ids[None], **tree().vision).logits


KINDS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 4},  # a factor of 2, as of the others: larger logits round more
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "lm_head"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("embeddings", ["untied", "tied"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_merged_is_unmerged(tmp_path: Path, base: Path, tied: Path, kind: str, embeddings: str) -> None:
    """Logits to 1e-5, float32. A tied head stays tied unless the adapter reaches embedding or head."""
    source = tied if embeddings == "tied" else base
    model = adapted(source, tmp_path / "adapter", **KINDS[kind])
    plain = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    result = call("merge", str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert result.exit_code == 0, result.output
    merged, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(model)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(plain)).abs().max() > 1e-2  # the adapter does something
    apart = kind in ("whole modules", "head", "embedding", "head and embedding")
    assert merged.config.tie_word_embeddings == (embeddings == "tied" and not apart)
    assert (merged.lm_head.weight is merged.model.language_model.embed_tokens.weight) == (
        embeddings == "tied" and not apart
    )
    assert ("no longer tied" in result.output) == (embeddings == "tied" and apart)


def test_what_the_merged_folder_holds(tmp_path: Path, base: Path) -> None:
    adapted(base, tmp_path / "adapter")
    assert call("merge", str(tmp_path / "adapter"), str(tmp_path / "merged")).exit_code == 0
    merged = tmp_path / "merged"
    assert type(AutoProcessor.from_pretrained(merged)) is type(processor())
    assert not (merged / "adapter_config.json").exists()
    assert not (tmp_path / "merged.partial").exists()
    for file in merged.glob("*.json"):
        assert ATTENTION_NAME not in file.read_text()
    names = {file.name: load_file(file / "model.safetensors").keys() for file in (merged, base)}
    assert names[merged.name] == names[base.name]  # a key for a key: whatever reads the base reads the merged model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_of_what_is_written(tmp_path: Path, base: Path, dtype: str) -> None:
    """Added up in float32, then rounded once."""
    model = adapted(base, tmp_path / "adapter")
    result = call("merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", dtype)
    assert result.exit_code == 0, result.output
    wanted = getattr(torch, dtype)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {wanted}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    exact = copy.deepcopy(model).merge_and_unload().state_dict()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=wanted).state_dict()
    for name, weight in exact.items():
        assert torch.equal(loaded[name], weight.to(wanted)), name


@pytest.mark.slow
def test_a_run_and_a_checkpoint_merge_too(tmp_path: Path, base: Path) -> None:
    """From the recipe to a whole model that trains on."""
    write_data(tmp_path, records(4))
    model = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    recipe = write_recipe(tmp_path, base, model=model, training=settings)
    assert call("train", recipe).exit_code == 0
    found = {}
    for name, folder in (("run", tmp_path / "run"), ("first", tmp_path / "run" / "checkpoint-1")):
        result = call("merge", str(folder), str(tmp_path / name / "merged"))
        assert result.exit_code == 0, result.output
        unmerged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder)
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / name / "merged")
        found[name] = logits(merged)
        torch.testing.assert_close(found[name], logits(unmerged), atol=1e-5, rtol=1e-5)
    assert (found["run"] - found["first"]).abs().max() > 1e-4
    again = call(
        "train",
        recipe,
        "model.lora=null",
        f"model.path={tmp_path}/run/merged",
        f"training.output_dir={tmp_path}/second",
    )
    assert again.exit_code == 0, again.output


def test_a_base_that_moved_is_named_by_hand(tmp_path: Path, base: Path) -> None:
    model = adapted(base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for gone in ("/no/such/base", None):
        config["base_model_name_or_path"] = gone
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        refused = call("merge", str(tmp_path / "adapter"), str(tmp_path / "merged"))
        assert refused.exit_code == 2
        result = call("merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(base))
        assert result.exit_code == 0, result.output
        assert f"merged into {base}" in result.output
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
        shutil.rmtree(tmp_path / "merged")


def test_what_cannot_be_merged_gets_one_message(tmp_path: Path, base: Path) -> None:
    adapted(base, tmp_path / "adapter")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    other = base_folder(tmp_path / "other", text_hidden=64)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "vlmpo_state.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    cases = [
        ((tmp_path / "adapter", full), "is not empty"),
        ((tmp_path / "empty", tmp_path / "out"), "holds no adapter"),
        ((tmp_path / "run", tmp_path / "out"), "newest checkpoint is"),
        ((base, tmp_path / "out"), "nothing to merge"),
        ((tmp_path / "nowhere", tmp_path / "out"), "there is no adapter folder"),
        ((tmp_path / "adapter", tmp_path / "out", "--base", other), "does not fit"),
        ((tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "empty"), "no model can be loaded"),
        ((tmp_path / "adapter", tmp_path / "out", "--dtype", "int8"), "int8"),
    ]
    for arguments, words in cases:
        result = call("merge", *(str(argument) for argument in arguments))
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.output.replace("\n", " "), (words, result.output)
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()
    assert (full / "file").read_text() == "mine"
