"""Learning rates by part: who belongs where, in every family; each part moves by its own rate, and only by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.commands.test_train import call, checkpoint, records, write_data, write_recipe  # noqa: F401  a fixture
from tests.tiny_models import model as tiny_model
from tests.training import Gradients, config, logged, pairs, trainer
from tests.zoo import FAMILIES as ZOO
from tests.zoo import sample_pairs
from vlmpo import MPOTrainer
from vlmpo.errors import RecipeError, RunError
from vlmpo.models.families import part_of
from vlmpo.train.config import MPOConfig
from vlmpo.train.param_groups import PARTS, check_parts, count_by_part

RATES = {"vision": 1e-3, "projector": 1e-2, "text": 1e-4}


def by_part(model: nn.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {part: set() for part in PARTS}
    for name, _ in model.named_parameters():
        found[part_of(name)].add(name)
    return found


def below(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


# Where vision tower and projector sit, family by family; the rest is text. The models have no weights (meta device).
FAMILIES = {
    "internvl": (("model.vision_tower.",), ("model.multi_modal_projector.",)),
    "qwen2_vl": (("model.visual.patch_embed.", "model.visual.blocks."), ("model.visual.merger.",)),
    "qwen2_5_vl": (("model.visual.patch_embed.", "model.visual.blocks."), ("model.visual.merger.",)),
    "qwen3_vl": (
        ("model.visual.patch_embed.", "model.visual.pos_embed.", "model.visual.blocks."),
        ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    ),
    "llava": (("model.vision_tower.",), ("model.multi_modal_projector.",)),
    "llava_next": (("model.vision_tower.",), ("model.multi_modal_projector.", "model.image_newline")),
    "llava_onevision": (("model.vision_tower.",), ("model.multi_modal_projector.", "model.image_newline")),
    "idefics3": (("model.vision_model.",), ("model.connector.",)),
    "smolvlm": (("model.vision_model.",), ("model.connector.",)),
    "gemma3": (("model.vision_tower.",), ("model.multi_modal_projector.",)),
    "mistral3": (("model.vision_tower.",), ("model.multi_modal_projector.",)),
    "paligemma": (("model.vision_tower.",), ("model.multi_modal_projector.",)),
    "blip-2": (("vision_model.",), ("qformer.", "query_tokens", "language_projection.")),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_parts_of_a_family(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))
    found, (vision, projector) = by_part(model), FAMILIES[family]
    assert found["vision"] == below(model, *vision) != set()
    assert found["projector"] == below(model, *projector) != set()
    assert sum(len(names) for names in found.values()) == len(list(model.parameters()))  # a partition
    assert any("embed_tokens" in name for name in found["text"])
    assert not any("vis" in name or "image" in name for name in found["text"])
    assert sum(count_by_part(model).values()) == sum(p.numel() for p in model.parameters())


def test_a_text_model_is_all_text() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", num_hidden_layers=1))
    assert list(count_by_part(model)) == ["text"]
    with pytest.raises(RecipeError, match=r"vision: that part is not in this model; what trains: text \([\d,]+\)$"):
        check_parts(model, {"vision": 1e-3})


def test_names_from_elsewhere() -> None:
    """InternVL's own code has other names than transformers'; an adapter's parameters sit deeper."""
    assert part_of("vision_model.encoder.layers.0.attn.qkv.weight") == "vision"
    assert part_of("mlp1.1.weight") == "projector"
    assert part_of("language_model.model.layers.0.mlp.up_proj.weight") == "text"
    assert part_of("base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight") == "vision"
    assert part_of("base_model.model.model.visual.merger.mlp.0.lora_B.default.weight") == "projector"
    assert part_of("base_model.model.lm_head.modules_to_save.default.weight") == "text"
    assert part_of("module.model.vision_tower.encoder.weight") == "vision"


class Moves(Gradients):
    """Gradients and weights by name, around one optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.before = {name: parameter.detach().clone() for name, parameter in named}
        # LLaVA reads the vision layer before the last: what comes after it has no gradient.
        self.gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in named}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("rates", [RATES, {"projector": 1e-2}], ids=["all", "one"])
def test_each_part_moves_by_its_rate(tmp_path: Path, rates: dict[str, float]) -> None:
    """One step of SGD without decay: what a parameter moves is its rate times its gradient."""
    moves = Moves()
    settings = {"optim": "sgd", "learning_rate": 5e-3, "per_device_train_batch_size": 4, "callbacks": [moves]}
    run = trainer(tmp_path, pairs(4), learning_rates=rates, dtype=torch.float64, **settings)
    run.train()
    assert run.state.global_step == 1
    for name, before in moves.before.items():
        expected = before - rates.get(part_of(name), 5e-3) * moves.gradients[name]
        torch.testing.assert_close(moves.after[name], expected, rtol=0, atol=1e-14, msg=name)
    for names in by_part(run.model).values():
        assert max(float((moves.after[name] - moves.before[name]).abs().max()) for name in names) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-next", "idefics3"])
def test_other_families_move_by_their_rates(tmp_path: Path, name: str) -> None:
    moves, family = Moves(), ZOO[name]
    args = config(tmp_path, optim="sgd", learning_rate=5e-3, learning_rates={"vision": 1e-3, "projector": 1e-2})
    run = MPOTrainer(
        model=family.model(0),
        args=args,
        train_dataset=[sample_pairs(family)["one image"]],
        processing_class=family.processor(),
        callbacks=[moves],
    )
    run.train()
    rates = {"vision": 1e-3, "projector": 1e-2, "text": 5e-3}
    for weight, before in moves.before.items():
        expected = before - rates[part_of(weight)] * moves.gradients[weight]
        torch.testing.assert_close(moves.after[weight], expected, rtol=1e-6, atol=1e-7, msg=weight)
    for names in by_part(run.model).values():
        assert max(float((moves.after[n] - moves.before[n]).abs().max()) for n in names if n in moves.before) > 1e-6


@pytest.mark.slow
def test_no_rates_no_difference(tmp_path: Path) -> None:
    """A rate for each part that is the base rate is the run without; weight decay stays where it was."""
    from tests.training import flat_weights

    settings = {"learning_rate": 1e-3, "weight_decay": 0.5, "lr_scheduler_type": "cosine"}
    plain = trainer(tmp_path / "plain", pairs(8), **settings)
    plain.train()
    parted = trainer(tmp_path / "parted", pairs(8), learning_rates=dict.fromkeys(PARTS, 1e-3), **settings)
    parted.train()
    assert torch.equal(flat_weights(plain.model), flat_weights(parted.model))
    assert len(plain.optimizer.param_groups) == 2
    assert len(parted.optimizer.param_groups) == 6


def test_weight_decay_keeps_its_groups(tmp_path: Path) -> None:
    run = trainer(tmp_path, pairs(2), learning_rates=RATES, weight_decay=0.3)
    optimizer = run.create_optimizer()
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    decayed = set(run.get_decay_parameter_names(run.model))
    seen: list[str] = []
    for group in optimizer.param_groups:
        own = [names[id(parameter)] for parameter in group["params"]]
        assert {part_of(name) for name in own} == {part_of(own[0])}
        assert group["lr"] == RATES[part_of(own[0])]
        assert {name in decayed for name in own} == {group["weight_decay"] == 0.3}
        assert group["weight_decay"] in (0.0, 0.3)
        seen += own
    assert sorted(seen) == sorted(names.values())
    assert not any("bias" in name or "norm" in name for name in decayed)


@pytest.mark.slow
def test_the_schedule_scales_all_and_the_log_tells(tmp_path: Path) -> None:
    """Linear over four steps without warm-up: 1, 3/4, 1/2, 1/4 of each rate; ``learning_rate`` is the base one."""
    common = {"lr_scheduler_type": "linear", "learning_rate": 8e-4}
    trainer(tmp_path / "one", pairs(8), learning_rates={"vision": 4e-4}, **common).train()
    trainer(tmp_path / "all", pairs(8), learning_rates=RATES, **common).train()
    trainer(tmp_path / "none", pairs(8), **common).train()
    factors = [1.0, 0.75, 0.5, 0.25]
    for name in ("one", "all", "none"):
        rates = [line["learning_rate"] for line in logged(tmp_path / name)]
        assert rates == pytest.approx([8e-4 * factor for factor in factors], rel=1e-12)
    assert [line["learning_rate/vision"] for line in logged(tmp_path / "one")] == pytest.approx(
        [4e-4 * factor for factor in factors], rel=1e-12
    )
    for line, factor in zip(logged(tmp_path / "all"), factors, strict=True):
        for part, rate in RATES.items():
            assert line[f"learning_rate/{part}"] == pytest.approx(rate * factor, rel=1e-12)
    assert {key for key in logged(tmp_path / "one")[0] if "rate/" in key} == {"learning_rate/vision"}
    assert not any("rate/" in key for key in logged(tmp_path / "none")[0])


@pytest.mark.slow
def test_an_adapter_belongs_where_it_sits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    moves = Moves()
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {"optim": "sgd", "learning_rate": 5e-3, "per_device_train_batch_size": 4, "callbacks": [moves]}
    run = trainer(tmp_path, pairs(4), learning_rates={"vision": 1e-2}, peft_config=adapter, **settings)
    assert "parameters that train, and their rates: vision 512 at 0.01, text " in capsys.readouterr().err
    run.train()
    moved = dict.fromkeys(PARTS, 0.0)
    for name, before in moves.before.items():
        rate = 1e-2 if "vision_tower" in name else 5e-3
        torch.testing.assert_close(moves.after[name], before - rate * moves.gradients[name], rtol=1e-6, atol=1e-9)
        moved[part_of(name)] += float((moves.after[name] - before).abs().sum())
    assert moved["vision"] > 0
    assert moved["text"] > 0
    with pytest.raises(
        RecipeError, match=r"projector: that part is frozen as a whole; what trains: vision \(512\), text"
    ):
        check_parts(run.model, {"projector": 1e-3})


@pytest.mark.slow
def test_resuming_with_other_rates_is_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, pairs(4), learning_rates=RATES, **settings).train()
    with pytest.raises(RunError, match=r"was trained with training\.learning_rates .*'vision': 0\.001.* has None"):
        trainer(tmp_path, pairs(4), **settings).train(resume_from_checkpoint=True)
    trainer(tmp_path, pairs(4), learning_rates=RATES, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"visoin": 1e-3}, "learning_rates.visoin: no such part; there are vision, projector, text"),
        ({"vision": 0}, "learning_rates.vision: expected a rate above 0, got 0"),
        ({"vision": "1e-3"}, "learning_rates.vision: expected a rate above 0, got '1e-3'"),
        ({"text": float("inf")}, "learning_rates.text: expected a rate above 0, got inf"),
    ],
)
def test_values_that_are_no_rates(tmp_path: Path, rates: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        MPOConfig(output_dir=str(tmp_path), learning_rates=rates)


def test_what_cannot_take_rates_says_so(tmp_path: Path) -> None:
    from tests.tiny_models import processor
    from tests.training import config
    from vlmpo import MPOTrainer

    model = tiny_model()
    args = config(tmp_path, learning_rates=RATES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(RecipeError, match="an optimizer was passed, with its rates"):
        MPOTrainer(model=model, args=args, processing_class=processor(), optimizers=(optimizer, None))
    strange = tiny_model()
    strange.model.eyes = strange.model.vision_tower
    del strange.model.vision_tower
    with pytest.raises(RecipeError, match="which parameters of InternVLForConditionalGeneration are its vision tower"):
        check_parts(strange, {"text": 1e-3})


@pytest.mark.slow
def test_from_a_recipe(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(4))
    recipe = write_recipe(tmp_path, checkpoint, training={"learning_rates": {"vision": 2e-4, "text": 5e-4}})
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    assert "vision 32,096 at 0.0002, projector 5,440 at 0.001, text 53,792 at 0.0005" in result.output
    assert logged(tmp_path / "run")[0]["learning_rate/text"] == 5e-4
    frozen = call("train", recipe, "model.freeze=[vision_tower]", f"training.output_dir={tmp_path / 'other'}")
    assert frozen.exit_code == 2
    assert "training.learning_rates.vision: that part is frozen as a whole; what trains: projector" in frozen.output
    unknown = call("train", recipe, "training.learning_rates={tower: 1}", f"training.output_dir={tmp_path / 'other'}")
    assert unknown.exit_code == 2
    assert "learning_rates.tower: no such part" in unknown.output
    assert not (tmp_path / "other" / "manifest.json").exists()
