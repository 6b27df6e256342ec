"""Router loss of mixtures of experts: transformers' own per response, whatever the layout; on when the config says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from tests.case_worker import two_processes
from tests.tiny_models import image_tree, noise_image, random_pair, tokenizer
from tests.tiny_models import model as tiny_model
from tests.training import Gradients, flat_weights, logged, pairs, relative, trainer
from tests.tree.test_forward import separate_logps
from vlmpo.errors import ModelError
from vlmpo.train.reference import switch_dropout_off, weights_hash
from vlmpo.tree.forward import install
from vlmpo.tree.layout import PromptTree, RowLayout, TreeSpan, build_row
from vlmpo.tree.router_loss import response_router_losses, router_coefficient

COEFFICIENT = 0.3  # large, so that a wrong router loss cannot hide in the sum
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "sgd"}


def text_fields(**changes: Any) -> dict[str, Any]:
    """A tiny mixture: 4 experts, 2 a token, router weights large enough to be uneven."""
    fields = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "output_router_logits": True,
        "router_aux_loss_coef": COEFFICIENT,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return {**fields, **changes}


def routed(family: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    fields = text_fields(**changes)
    if family == "qwen3_moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields))
    if family == "qwen2_moe":
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**fields))
    if family == "mixtral":
        fields["num_local_experts"] = fields.pop("num_experts")
        return MixtralForCausalLM(MixtralConfig(**fields))
    if family == "qwen3_vl_moe":
        rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
        return Qwen3VLMoeForConditionalGeneration(
            Qwen3VLMoeConfig(text_config={**fields, "rope_parameters": rope}, vision_config=vision)
        )
    assert family == "internvl"
    config: InternVLConfig = copy.deepcopy(tiny_model().config)
    config = InternVLConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=Qwen3MoeConfig(**fields).to_dict(),
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def in_float64() -> Any:
    model = routed("qwen3_moe").double()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def text_trees() -> list[PromptTree]:
    return [image_tree([], [6, 4, 9], 2), image_tree([], [1, 8], 3)]


def trees_for(family: str) -> list[PromptTree]:
    return [image_tree([noise_image(60, 60, 1)], [5, 8], 1), *text_trees()] if family == "internvl" else text_trees()


def own_losses(model: Any, trees: list[PromptTree]) -> Tensor:
    """One forward a response, and transformers' function on the router logits of it: no code of ours."""
    losses = []
    text = model.config.get_text_config()
    for tree in trees:
        for response in tree.responses:
            heard = router_logits(model, torch.cat([tree.prompt_ids, response])[None], tree.vision)
            assert len(heard) == text.num_hidden_layers
            losses.append(load_balancing_loss_func(tuple(heard), 4, 2))
    return torch.stack(losses)


def router_logits(model: Any, ids: Tensor, vision: dict[str, Tensor]) -> list[Tensor]:
    heard: list[Tensor] = []
    gates = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    hooks = [gate.register_forward_hook(lambda m, a, out: heard.append(out[0])) for gate in gates]
    model(input_ids=ids, **vision)
    for hook in hooks:
        hook.remove()
    return heard


def gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "internvl", "qwen3_vl_moe"]
CASES = [(family, shared) for family in FAMILIES for shared in (True, False)]


@pytest.mark.parametrize(("family", "shared"), CASES)
def test_router_loss_of_a_branch_is_that_of_its_own_forward(family: str, shared: bool) -> None:
    """To 1e-6, the log-probs beside it to 1e-5 a token; gradients of both to 1e-5 relative."""
    plain = routed(family)
    ours = copy.deepcopy(plain)
    install(ours, shared=shared)
    trees = trees_for(family)
    rows = [build_row(trees)] if shared else [build_row([part]) for tree in trees for part in tree.separate()]
    logps, losses = ours(packed_rows=rows, router_losses=True)
    expected = own_losses(plain, trees)
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    assert expected.std() > 1e-3  # the responses do differ
    torch.testing.assert_close(logps, separate_logps(plain, trees), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(packed_rows=rows), logps, atol=0, rtol=0)
    weights = torch.randn(losses.shape, generator=torch.Generator().manual_seed(1))
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert gradient(plain).norm() > 1e-3
    assert relative(gradient(ours), gradient(plain)) < 1e-5


def test_the_models_own_loss_is_that_of_one_sequence() -> None:
    """What transformers adds to the loss of a forward of one response is what we add for that response."""
    plain = routed("qwen3_moe")
    tree = text_trees()[1]
    ids = torch.cat([tree.prompt_ids, tree.responses[0]])[None]
    assert plain(input_ids=ids).aux_loss.item() == pytest.approx(own_losses(plain, [tree])[0].item(), rel=1e-6)


def test_by_hand() -> None:
    """Two experts, one a token; prompt of 2, responses of 1 and 2. Logits of ln 3 against 0 route by 3/4 and 1/4."""
    up, down = [torch.log(torch.tensor(3.0)).item(), 0.0], [0.0, torch.log(torch.tensor(3.0)).item()]
    logits = torch.tensor([up, up, down, up, up])
    layout = RowLayout((TreeSpan(0, 2, (1, 2)),))
    found = response_router_losses([logits], layout, top_k=1)
    # first: 3 tokens, up up down: f = (2/3, 1/3), P = (7/12, 5/12)
    # second: 4 tokens, all up: f = (1, 0), P = (3/4, 1/4)
    assert found.tolist() == pytest.approx([2 * (2 / 3 * 7 / 12 + 1 / 3 * 5 / 12), 2 * 3 / 4])
    # two layers, the second perfectly undecided: f and P are means over layers too
    even = torch.zeros(5, 2)
    half = response_router_losses([logits, even], layout, top_k=2)
    assert half.tolist() == pytest.approx([2.0, 2.0])  # every expert gets every token: 2 * (1 * P_0 + 1 * P_1)


def test_a_sibling_does_not_count() -> None:
    """Negative control: the loss over the whole row, as transformers would take it, is another number."""
    model = routed("qwen3_moe")
    tree = text_trees()[0]
    install(model, shared=True)
    _, losses = model(packed_rows=[build_row([tree])], router_losses=True)
    longer = PromptTree(tree.prompt_ids, (*tree.responses[:2], torch.randint(0, 300, (40,))))
    _, others = model(packed_rows=[build_row([longer])], router_losses=True)
    torch.testing.assert_close(others[:2], losses[:2], atol=1e-6, rtol=0)
    assert abs(others[2] - losses[2]) > 1e-3


# ---- in training ----


def text_pairs(count: int) -> list:
    return [random_pair(seed, images=0) for seed in range(count)]


@pytest.mark.slow
def test_the_batch_layout_changes_nothing(tmp_path: Path) -> None:
    """The same 8 pairs a step however split and laid out: loss, router loss and gradient, two steps in float64."""
    layouts = {
        "8x1 in one row": {"per_device_train_batch_size": 8, "max_tokens_per_row": None},
        "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "8x1 in many rows": {"per_device_train_batch_size": 8, "max_tokens_per_row": 90},
        "8x1 in separate rows": {"per_device_train_batch_size": 8, "attention": "separate"},
    }
    found = {}
    for name, layout in layouts.items():
        gradients, folder = Gradients(), tmp_path / name
        run = trainer(folder, text_pairs(16), model=in_float64(), callbacks=[gradients], **layout)
        assert run.shared == ("separate" not in name)
        run.train()
        found[name] = (gradients.steps, logged(folder))
    steps, logs = found.pop("8x1 in one row")
    assert len(steps) == len(logs) == 2
    for name, (other_steps, other_logs) in found.items():
        for mine, theirs in zip(other_steps, steps, strict=True):
            assert relative(mine, theirs) < 1e-6, name
        for mine, theirs in zip(other_logs, logs, strict=True):
            for key in ("loss", "loss/router_aux", "loss/sigmoid", "loss/nll"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-6), (name, key)


@pytest.mark.slow
def test_the_mean_over_all_responses_is_added(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = text_pairs(3)
    run = trainer(tmp_path, data, model=routed("qwen3_moe"), per_device_train_batch_size=3)
    trees = []
    for pair in data:
        encoded = run.encoder.encode(pair)
        trees.append(PromptTree(encoded.prompt_ids, (encoded.chosen_ids, encoded.rejected_ids)))
    expected = own_losses(routed("qwen3_moe"), trees).mean().item()
    run.train()
    (line,) = logged(tmp_path)
    assert line["loss/router_aux"] == pytest.approx(expected, rel=1e-6)
    terms = 0.8 * line["loss/sigmoid"] + 0.2 * line["loss/bco_pair"] + line["loss/nll"]
    assert line["loss"] == pytest.approx(terms + COEFFICIENT * expected, rel=1e-6)
    assert line["start/expected_loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert f"+ router {COEFFICIENT * expected:.4f}" in capsys.readouterr().err


@pytest.mark.slow
def test_supervised_fine_tuning_counts_the_chosen_alone(tmp_path: Path) -> None:
    data = text_pairs(3)
    run = trainer(tmp_path, data, model=routed("qwen3_moe"), per_device_train_batch_size=3, loss_weights={"nll": 1.0})
    trees = [PromptTree(e.prompt_ids, (e.chosen_ids,)) for e in map(run.encoder.encode, data)]
    expected = own_losses(routed("qwen3_moe"), trees).mean().item()
    run.train()
    assert logged(tmp_path)[0]["loss/router_aux"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}], ids=str)
def test_off_when_the_config_does_not_say_so(tmp_path: Path, changes: dict) -> None:
    trainer(tmp_path, text_pairs(4), model=routed("qwen3_moe", **changes), **SETTINGS).train()
    (line,) = logged(tmp_path)
    assert "loss/router_aux" not in line
    terms = 0.8 * line["loss/sigmoid"] + 0.2 * line["loss/bco_pair"] + line["loss/nll"]
    assert line["loss"] == pytest.approx(terms, rel=1e-6)


@pytest.mark.slow
def test_evaluation_reports_mpo_alone(tmp_path: Path) -> None:
    """And changes nothing in the run around it."""
    weights = []
    for name, extra in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1})):
        run = trainer(
            tmp_path / name, text_pairs(8), model=routed("qwen3_moe"), eval_dataset=text_pairs(3), **SETTINGS, **extra
        )
        run.train()
        weights.append(flat_weights(run.model))
    assert torch.equal(weights[0], weights[1])
    metrics = run.evaluate()
    assert "eval_loss/router_aux" not in metrics
    terms = 0.8 * metrics["eval_loss/sigmoid"] + 0.2 * metrics["eval_loss/bco_pair"] + metrics["eval_loss/nll"]
    assert metrics["eval_loss"] == pytest.approx(terms, rel=1e-6)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    steps = []
    for name, on in (("plain", False), ("checkpointed", True)):
        gradients = Gradients()
        settings = {**SETTINGS, "gradient_checkpointing": on, "callbacks": [gradients]}
        trainer(tmp_path / name, text_pairs(4), model=routed("qwen3_moe"), **settings).train()
        steps.append(gradients.steps[0])
    assert relative(steps[1], steps[0]) < 1e-6


@pytest.mark.slow
def test_checkpointing_that_would_lose_the_gradient_is_refused(tmp_path: Path) -> None:
    settings = {**SETTINGS, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    run = trainer(tmp_path, text_pairs(4), model=routed("qwen3_moe"), **settings)
    with pytest.raises(ModelError, match="no gradient under re-entrant checkpointing"):
        run.train()


@pytest.mark.slow
def test_it_reaches_an_adapter(tmp_path: Path) -> None:
    """Under LoRA the routers are frozen; the loss still moves what they are given. Under bfloat16 autocast, too."""
    steps = []
    for coefficient in (COEFFICIENT, 0.0):
        gradients = Gradients()
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        model = routed("qwen3_moe", router_aux_loss_coef=coefficient)
        settings = {**SETTINGS, "callbacks": [gradients], "peft_config": config, "bf16": True}
        trainer(tmp_path / str(coefficient), text_pairs(4), model=model, **settings).train()
        steps.append(gradients.steps[0])
    assert relative(steps[1], steps[0]) > 1e-3
    assert logged(tmp_path / str(COEFFICIENT))[0]["rewards/chosen"] == 0.0


def on_ranks(folder: Path, **settings: Any) -> Any:
    """Five pairs, four a step: in the last step one rank of two reads one pair and the other none."""
    return trainer(folder, text_pairs(5), model=in_float64(), **{**SETTINGS, **settings})


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    weights = two_processes("router", tmp_path / "two")
    single = on_ranks(tmp_path / "one")
    single.train()
    assert relative(weights, flat_weights(single.model)) < 1e-9
    for mine, other in zip(logged(tmp_path / "two"), logged(tmp_path / "one"), strict=True):
        for key in ("loss", "loss/router_aux"):
            assert mine[key] == pytest.approx(other[key], rel=1e-6), key


@pytest.mark.slow
def test_an_adapter_on_the_experts(tmp_path: Path) -> None:
    """Experts are one weight, no linear layers: ``target_parameters`` reaches them, and so does a frozen copy."""
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model = get_peft_model(routed("qwen3_moe"), LoraConfig(**fields, init_lora_weights=False))
    run = trainer(tmp_path, text_pairs(6), model=model, learning_rate=1e-2)
    assert run.reference.frozen == "reference"
    before = run.reference.weights_hash()
    run.train()
    assert logged(tmp_path)[0]["rewards/chosen"] == 0.0
    assert abs(logged(tmp_path)[-1]["rewards/margins"]) > 1e-3
    assert weights_hash(run.model, "reference") == before
    experts = [g for n, g in run.model.named_parameters() if "experts.lora_B.default" in n]
    assert len(experts) == 2


# ---- what is refused, and what is switched off ----


def test_routers_that_are_not_known_are_refused() -> None:
    config = Qwen3MoeConfig(**text_fields())
    assert router_coefficient(config) == COEFFICIENT
    assert router_coefficient(tiny_model().config) is None
    config.model_type = "some_moe"
    with pytest.raises(ModelError, match="'some_moe' text tower"):
        router_coefficient(config)


@pytest.mark.slow
def test_router_jitter_is_noise_and_switched_off(tmp_path: Path) -> None:
    noisy = routed("mixtral", router_jitter_noise=0.3)
    assert len(switch_dropout_off(copy.deepcopy(noisy))) == 2
    trainer(tmp_path, text_pairs(4), model=noisy, **SETTINGS).train()
    assert logged(tmp_path)[0]["rewards/chosen"] == 0.0


@pytest.mark.slow
def test_pairs_with_images_through_a_mixture(tmp_path: Path) -> None:
    """InternVL with a Qwen3-MoE text tower, as InternVL3.5 has it: three steps, router loss in each."""
    trainer(tmp_path, pairs(6), model=routed("internvl"), learning_rate=1e-3).train()
    lines = logged(tmp_path)
    assert len(lines) == 3
    assert all(line["loss/router_aux"] > 1.0 for line in lines)
    assert lines[0]["rewards/chosen"] == 0.0
    assert lines[-1]["rewards/margins"] != 0.0
