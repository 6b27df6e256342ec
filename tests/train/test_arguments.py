"""Arguments of MPOTrainer and MPOConfig that are of the wrong kind, or would train another model than they say."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from tests.tiny_models import model as tiny_model
from tests.tiny_models import processor
from tests.training import config, flat_weights, pairs, trainer
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.errors import ModelError, RecipeError
from vlmpo.models.loading import load_processor
from vlmpo.train.arguments import check_surroundings

LORA = LoraConfig(r=2, target_modules=["q_proj"])


def refused(folder: Path, kind: type[Exception] = RecipeError, **arguments: Any) -> str:
    given = {"model": tiny_model(), "args": config(folder), "processing_class": processor(), **arguments}
    with pytest.raises(kind) as caught:
        MPOTrainer(**given)
    said = str(caught.value)
    assert "\n" not in said
    return said


# ---- a reference that would move ----


def the_same(model: Any) -> tuple[Any, Any]:
    return model, model


def under_an_adapter(model: Any) -> tuple[Any, Any]:
    """PEFT puts its layers into the model itself, so the base has them too."""
    return get_peft_model(model, LORA), model


def adapter_on_the_reference(model: Any) -> tuple[Any, Any]:
    return model, get_peft_model(model, LORA)


def two_wrappers(model: Any) -> tuple[Any, Any]:
    wrapped = get_peft_model(model, LORA)
    return wrapped, copy.copy(wrapped)


def shared_tower(model: Any) -> tuple[Any, Any]:
    other = tiny_model(seed=1)
    other.model.vision_tower = model.model.vision_tower
    return model, other


def shared_memory(model: Any) -> tuple[Any, Any]:
    other = tiny_model(seed=1)
    other.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())
    return model, other


@pytest.mark.parametrize(
    "make", [the_same, under_an_adapter, adapter_on_the_reference, two_wrappers, shared_tower, shared_memory]
)
def test_a_reference_that_would_change_with_the_model(tmp_path: Path, make: Any) -> None:
    model, ref_model = make(tiny_model())
    said = refused(tmp_path, model=model, ref_model=ref_model)
    assert "ref_model is the model itself, or shares weights with it that train" in said
    assert "leave ref_model out" in said


def test_it_is_refused_before_an_adapter_is_put_on(tmp_path: Path) -> None:
    model = tiny_model().requires_grad_(False)
    assert "ref_model is the model itself" in refused(tmp_path, model=model, ref_model=model, peft_config=LORA)


def test_a_frozen_tower_may_belong_to_both(tmp_path: Path) -> None:
    model, ref_model = shared_tower(tiny_model())
    model.model.vision_tower.requires_grad_(False)
    run = trainer(tmp_path, pairs(2), model=model, ref_model=ref_model)
    assert run.reference.model is ref_model


def test_equal_weights_are_no_fault(tmp_path: Path) -> None:
    run = trainer(tmp_path, pairs(2), model=tiny_model(), ref_model=tiny_model())
    assert torch.equal(flat_weights(run.model), flat_weights(run.reference.model))


# ---- settings ----


def test_plain_training_arguments(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-5, use_cpu=True, hub_token="secret")
    said = refused(tmp_path, args=plain)
    assert "args is of type TrainingArguments, without MPO's own settings; pass an MPOConfig" in said
    assert "MPOConfig(**{**args.to_dict(), 'hub_token': args.hub_token})" in said
    converted = eval(
        "MPOConfig(**{**args.to_dict(), 'hub_token': args.hub_token})", {"MPOConfig": MPOConfig, "args": plain}
    )
    run = MPOTrainer(tiny_model(), args=converted, processing_class=processor())
    assert (run.args.learning_rate, run.args.hub_token, run.args.beta) == (3e-5, "secret", 0.1)


def test_another_trainers_settings_and_none_at_all(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    settings = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert "args is of type DPOConfig" in refused(tmp_path, args=settings)
    assert "MPOConfig(**args)" in refused(tmp_path, args={"output_dir": str(tmp_path)})
    assert "args is of type str" in refused(tmp_path, args=str(tmp_path))


@pytest.mark.parametrize("given", [0, -1, 2.0, True, "12"])
def test_max_tiles(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ValueError, match="max_tiles must be a whole number above 0, or None"):
        config(tmp_path, max_tiles=given)


@pytest.mark.parametrize("given", [{"r": 4}, "lora", 16])
def test_an_adapters_settings(tmp_path: Path, given: Any) -> None:
    assert "pass a configuration of PEFT" in refused(tmp_path, peft_config=given)


# ---- models ----


@pytest.mark.parametrize("name", ["model", "ref_model"])
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (processor(), "of type InternVLProcessor"),
        (torch.nn.Linear(2, 2), "of type Linear"),
        (tiny_model, "of type function"),
        (type(tiny_model()), "the class InternVLForConditionalGeneration"),
        ({"path": "x"}, "of type dict"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, given: Any, kind: str) -> None:
    said = refused(tmp_path, **{name: given})
    assert f"MPOTrainer: {name} is {kind}; pass a model of transformers or PEFT" in said


def test_no_model(tmp_path: Path) -> None:
    assert "MPOTrainer: model is missing" in refused(tmp_path, model=None)


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_name_or_path_is_loaded(tmp_path: Path, as_path: type) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_model(seed=1).save_pretrained(tmp_path / "reference")
    processor().save_pretrained(tmp_path / "model")
    run = MPOTrainer(
        as_path(tmp_path / "model"),
        ref_model=as_path(tmp_path / "reference"),
        args=config(tmp_path),
        train_dataset=pairs(2),
    )
    assert torch.equal(flat_weights(run.model), flat_weights(tiny_model()))
    assert torch.equal(flat_weights(run.reference.model), flat_weights(tiny_model(seed=1)))
    assert type(run.processing_class) is type(processor())


def test_a_name_of_nothing(tmp_path: Path) -> None:
    assert "there is no such folder" in refused(tmp_path, ModelError, model=str(tmp_path / "nowhere"))
    assert "there is no such folder" in refused(tmp_path, ModelError, ref_model=str(tmp_path / "nowhere"))


def test_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    chat = type("InternVLChatModel", (type(tiny_model()),), {})
    model = tiny_model()
    model.__class__ = chat
    assert "original layout (InternVLChatModel)" in refused(tmp_path, ModelError, model=model)
    assert "ref_model cannot be used" in refused(tmp_path, ModelError, ref_model=model)


# ---- processors ----


def test_a_missing_processor(tmp_path: Path) -> None:
    assert "processing_class is missing; pass the model's processor" in refused(tmp_path, processing_class=None)


@pytest.mark.parametrize(
    ("given", "kind"), [("InternVL3-8B-HF", "str"), (processor().image_processor, "GotOcr2ImageProcessor"), (3, "int")]
)
def test_what_is_no_processor(tmp_path: Path, given: Any, kind: str) -> None:
    said = refused(tmp_path, ModelError, processing_class=given)
    assert f"{kind} is no processor of text and images and no tokenizer; pass what AutoProcessor" in said


def test_a_class_in_place_of_a_processor(tmp_path: Path) -> None:
    assert "no processor" in refused(tmp_path, ModelError, processing_class=type(processor()))


# ---- the processor that is saved ----


def test_the_processor_that_is_saved(tmp_path: Path) -> None:
    """It takes the number of the whole run; what is encoded is the same either way."""
    given = processor()
    as_it_came = trainer(tmp_path / "none", pairs(2))
    assert as_it_came.processing_class is given
    assert (as_it_came.encoder.max_tiles, as_it_came.args.max_tiles) == (2, None)
    bounded = trainer(tmp_path / "five", pairs(2), max_tiles=5)
    bounded.save_model(str(tmp_path / "five" / "final"))
    assert load_processor(str(tmp_path / "five" / "final")).image_processor.max_patches == 5
    assert given.image_processor.max_patches == 2
    assert bounded.encoder.processor is given


def test_the_number_in_use_is_on_the_model_card(tmp_path: Path) -> None:
    rows = dict(trainer(tmp_path / "none", pairs(2)).run_summary().settings)
    assert rows["tiles"] == "at most 2 a pair, the processor's own bound"
    assert dict(trainer(tmp_path / "one", pairs(2), max_tiles=1).run_summary().settings)["tiles"] == "at most 1 a pair"


# ---- settings of transformers ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "abc"}, "learning_rate must be a number, not 'abc'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, not nan"),
        ({"weight_decay": -1}, "weight_decay must be at least 0, not -1"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be below 1, not 1.0"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0, not 0"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, not 2.5"),
        ({"max_steps": True}, "max_steps must be a number, not True"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"save_steps": 0}, "save_steps must be above 0, not 0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, not 0"),
        ({"load_best_model_at_end": "maybe"}, "load_best_model_at_end must be true or false, not 'maybe'"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, not -1"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha adds noise to the policy alone"),
    ],
)
def test_numbers_that_transformers_would_take(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **given)


def test_a_number_written_as_text_is_one(tmp_path: Path) -> None:
    """YAML reads 1e-6 as text."""
    args = config(tmp_path, learning_rate="1e-6", max_steps="3", load_best_model_at_end="false")
    assert (args.learning_rate, args.max_steps, args.load_best_model_at_end) == (1e-6, 3, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim": "galore_adamw"}, "training.optim: galore_adamw cannot be used: You need to install `galore_torch`"),
        ({"optim": "adamw_torch", "optim_args": "zz"}, "training.optim: adamw_torch cannot be used: not enough values"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "training.lr_scheduler_type: cosine_with_min_lr cannot be used: One of min_lr",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"x": 1}},
            "training.lr_scheduler_type: polynomial cannot be used: ",
        ),
        ({"report_to": "nowhere"}, "training.report_to: nowhere is not supported, only "),
        ({"report_to": "codecarbon"}, "training.report_to: CodeCarbonCallback requires"),
        ({"fsdp": True}, "training.fsdp: it shards a model over processes, and there is one; start with torchrun"),
    ],
)
def test_surroundings_are_tried_before_the_model_is_loaded(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as told:
        check_surroundings(config(tmp_path, **given))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("given", [{}, {"optim": "adafactor"}, {"lr_scheduler_type": "cosine"}])
def test_sound_surroundings(given: dict[str, Any], tmp_path: Path) -> None:
    check_surroundings(config(tmp_path, **given))
