"""A frozen vision tower runs once a step for policy and reference, and no number changes by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.tiny_models import model as tiny_model
from tests.tiny_models import random_pair
from tests.training import flat_weights, logged, pairs, trainer
from tests.zoo import FAMILIES, Family, encoded_pairs
from vlmpo.errors import ModelError
from vlmpo.models.adapters import unwrap_peft
from vlmpo.train import trainer as trainer_module
from vlmpo.train.batching import lay_out
from vlmpo.tree.features import share_features, tower_of
from vlmpo.tree.forward import install

SEEING = [family for family in FAMILIES.values() if family.images]
TEXT_ONLY = r".*language_model.*\.(q|v)_proj"


def freeze_tower(model: Any) -> Any:
    tower = tower_of(model)
    assert tower
    for tensor in tower.values():
        tensor.requires_grad_(False)
    return model


# ---- every family ----


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_log_probs_and_gradients_are_what_they_were_bit_by_bit(family: Family) -> None:
    model = freeze_tower(family.model(0))
    install(model, family.shared)
    reference = copy.deepcopy(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    for kind, encoded in encoded_pairs(family.name).items():
        rows = lay_out([encoded], family.shared).rows

        def policy(rows: Any = rows) -> tuple[torch.Tensor, tuple[Any, ...]]:
            logps = model(packed_rows=rows)
            return logps.detach(), torch.autograd.grad(logps.sum(), trained, allow_unused=True)

        alone, gradients = policy()
        assert share_features(model, reference)
        with torch.no_grad():
            assert torch.equal(reference(packed_rows=rows), alone)
        assert all((row.layout.features is not None) == (kind != "text only") for row in rows)
        taken, same = policy()
        assert torch.equal(taken, alone)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
        assert all(row.layout.features is None for row in rows)
        assert not share_features(model, reference, share=False)


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_features_that_are_handed_over_are_the_ones_that_are_read(family: Family) -> None:
    """Were they ignored, and pixels read after all, another image's would change nothing."""
    model = freeze_tower(family.model(0))
    install(model, family.shared)
    reference = copy.deepcopy(model)
    share_features(model, reference)
    rows = lay_out([encoded_pairs(family.name)["one image"]], family.shared).rows
    with torch.no_grad():
        right = reference(packed_rows=rows)
        for row in rows:
            found = row.layout.features.pooler_output
            for part in [found] if isinstance(found, torch.Tensor) else found:
                part.mul_(-1.0)
        wrong = model(packed_rows=rows)
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("family", SEEING, ids=lambda family: family.name)
def test_a_tower_is_all_that_features_depend_on(family: Family) -> None:
    """Every weight of it, changed, keeps the models from sharing; no weight of the text model does."""
    model = family.model(0)
    tower = tower_of(model)
    assert tower is not None
    ids = {id(tensor) for tensor in tower.values()}
    text = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
    assert not ids & text
    assert {id(parameter) for parameter in model.parameters()} <= ids | text


# ---- whether they share ----


def both() -> tuple[Any, Any]:
    model = freeze_tower(tiny_model())
    install(model, True)
    return model, copy.deepcopy(model)


def test_towers_that_differ_or_train_are_not_shared() -> None:
    policy, reference = both()
    assert share_features(policy, reference)
    with torch.no_grad():
        reference.model.language_model.embed_tokens.weight.add_(1.0)
    assert share_features(policy, reference)  # the text model may be any other
    with torch.no_grad():
        reference.model.multi_modal_projector.linear_1.bias[0] += 1e-6
    assert not share_features(policy, reference)
    policy, reference = both()
    policy.model.multi_modal_projector.linear_1.bias.requires_grad_(True)
    assert not share_features(policy, reference)
    policy, reference = both()
    assert not share_features(policy, reference.to(torch.float64))


def test_families_and_towers_that_are_not_known_are_not_shared() -> None:
    policy, reference = both()
    policy.model.vision_tower.odd = torch.nn.BatchNorm2d(3)  # its statistics move while it trains
    assert not share_features(policy, reference)
    policy, reference = both()
    policy.config.model_type = reference.config.model_type = "unheard_of"
    assert not share_features(policy, reference)
    text = FAMILIES["llama-text"].model(0)
    install(text, True)
    assert not share_features(text, copy.deepcopy(text))


def test_a_tower_that_is_thawed_later_is_the_policys_own_again() -> None:
    policy, reference = both()
    assert share_features(policy, reference)
    (row,) = lay_out([encoded_pairs("internvl-qwen2")["one image"]]).rows
    for parameter in policy.model.vision_tower.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        reference(packed_rows=[row])
    policy(packed_rows=[row]).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.model.vision_tower.parameters())
    assert row.layout.features is None


# ---- in training ----


class Calls:
    """Counts how often the vision towers of a trainer's models run."""

    def __init__(self, run: Any) -> None:
        self.count = 0
        models = [unwrap_peft(run.model)]
        if hasattr(run.reference, "model"):
            models.append(unwrap_peft(run.reference.model))
        for model in models:
            model.model.vision_tower.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1


def with_images(count: int) -> list[Any]:
    return [random_pair(seed, images=1 + seed % 2) for seed in range(count)]


def frozen() -> Any:
    return freeze_tower(tiny_model())


def lora(targets: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=targets)


def projector_trains() -> Any:
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    return model


# Settings by name, and how often the towers run in a step of one row.
RUNS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "copy": (lambda: {"model": frozen()}, 1),
    "LoRA on the text": (lambda: {"peft_config": lora(TEXT_ONLY)}, 1),
    "LoRA on the text, reference a copy": (lambda: {"peft_config": lora(TEXT_ONLY), "reference_kind": "copy"}, 1),
    "a reference model of the same tower": (lambda: {"model": frozen(), "ref_model": frozen()}, 1),
    "checkpointing": (lambda: {"model": frozen(), "gradient_checkpointing": True}, 1),
    "bfloat16": (lambda: {"model": frozen(), "bf16": True}, 1),
    "delta of the running step": (lambda: {"model": frozen(), "reward_shift": "running"}, 1),
    "trains": (lambda: {"model": tiny_model()}, 2),
    "projector trains": (lambda: {"model": projector_trains()}, 2),
    "LoRA on the tower": (lambda: {"peft_config": lora(r".*\.(q|v)_proj")}, 2),
    "a reference model of another tower": (lambda: {"model": frozen(), "ref_model": tiny_model(seed=1)}, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_step_runs_the_tower_once_where_it_may(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And losses, evaluation and final weights are those of a run that does not share."""
    settings, calls_a_step = RUNS[name]

    def run(folder: str, calls_a_step: int = calls_a_step) -> tuple[Any, dict[str, float], int]:
        torch.manual_seed(0)
        data = with_images(6)
        built = trainer(tmp_path / folder, data, eval_dataset=data[:2], num_train_epochs=1, **settings())
        monkeypatch.setattr(built, "_check_rows", lambda: None)  # reads a pair several times
        calls = Calls(built)
        built.train()
        trained = calls.count
        metrics = built.evaluate()
        assert calls.count - trained == calls_a_step
        return built, metrics, trained

    mine, metrics, calls = run("mine")
    assert calls == 3 * calls_a_step  # three steps of two pairs in one row
    monkeypatch.setattr(trainer_module, "share_features", lambda *_, **__: False)
    theirs, expected, plain = run("theirs", 2) if calls_a_step == 1 else (mine, metrics, calls)
    assert plain == 6
    assert torch.equal(flat_weights(mine.model), flat_weights(theirs.model))
    assert {k: v for k, v in metrics.items() if k != "epoch"} == {k: v for k, v in expected.items() if k != "epoch"}
    if calls_a_step == 1:
        for one, other in zip(*(logged(tmp_path / folder) for folder in ("mine", "theirs")), strict=True):
            for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
                assert one[key] == other[key]


def test_the_start_up_check_goes_the_same_way(tmp_path: Path) -> None:
    """Features handed over wrongly would be caught by it: the model's own log-probs are from pixels."""
    run = trainer(tmp_path, with_images(2), model=frozen())
    base = run.model.model
    plain = base.get_image_features
    run._check_rows()

    def halved(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        if "return_dict" in kwargs and "vision_feature_layer" not in kwargs:  # how features are asked for here
            found.pooler_output = found.pooler_output * 0.5
        return found

    base.get_image_features = halved
    with pytest.raises(ModelError, match="differ from"):
        run._check_rows()


@pytest.mark.slow
def test_separate_rows_share_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, with_images(4), model=frozen(), attention="separate")
    monkeypatch.setattr(run, "_check_rows", lambda: None)
    calls = Calls(run)
    run.train()
    assert calls.count == 8  # four pairs of two responses, each in a row of its own


@pytest.mark.slow
def test_nothing_is_kept_between_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, pairs(6), model=frozen(), gradient_accumulation_steps=3)
    kept: list[Any] = []
    plain = run.get_batch_samples

    def listening(*args: Any) -> Any:
        found = plain(*args)
        kept.extend(row.layout for batch in found[0] for part in batch.micro_batches for row in part.rows)
        return found

    run.get_batch_samples = listening
    run.train()
    assert len(kept) == 3
    assert all(layout.features is None for layout in kept)


@pytest.mark.slow
def test_a_checkpoint_of_another_tower_is_noticed(tmp_path: Path) -> None:
    """First the tower trains, then a run with a frozen one loads it: its reference is still the initial model."""
    data = with_images(4)
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    trainer(tmp_path, data, model=tiny_model(), **settings).train()
    run = trainer(tmp_path, data, model=frozen(), **settings)
    assert run.model._vlmpo.frozen_tower is not None
    run._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert run.model._vlmpo.frozen_tower is None
    calls = Calls(run)
    run.evaluate(data[:2])
    assert calls.count == 2
