"""Fused kernels, by stand-ins in plain torch: bound to instances, each family reads as before, nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
import weakref
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests import tiny_models
from tests.fused_standins import FUNCTIONS, wrong
from tests.training import relative
from tests.tree.test_families import flat_gradient, greedy, plain_logps, rows_of
from tests.zoo import FAMILIES, encoded_pairs
from vlmpo.models import families
from vlmpo.models.families import Fused
from vlmpo.models.kernel_check import kinds_that_agree, why_not
from vlmpo.models.kernels import Functions, Kernels, bind, fusable, is_bound, unbind
from vlmpo.tree.forward import install

ALL = ("rms_norm", "glu", "mlp", "layer_norm", "rotary")
CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("name", list(FAMILIES))
NORMS = {name: fused for name, fused in families._FUSED.items() if fused.kind == "rms_norm"}
PLAIN_MLPS = [name for name, fused in families._FUSED.items() if fused.kind == "mlp"]
MLPS = [name for name, fused in families._FUSED.items() if fused.kind == "glu"]


def class_of(name: str) -> Any:
    package, kind = name.split(".")
    return getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), kind)


def mlp(name: str, activation: str = "silu") -> Any:
    """One MLP of a class; each finds what it needs in a config like this."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "mlp_bias": False, "shared_expert_intermediate_size": 40}
    acts = {"hidden_act": activation, "hidden_activation": activation}
    config = SimpleNamespace(**sizes, **acts, moe_intermediate_size=40, pretraining_tp=1)
    extra = {"qwen2_moe.Qwen2MoeMLP": (40,), "qwen3_5.Qwen3_5MLP": (40,)}.get(name, ())
    return class_of(name)(config, *extra)


def bound(model: Any, kinds: Iterable[str] = ALL, functions: Functions = FUNCTIONS) -> dict[str, int]:
    return dict(Kernels(kinds, functions).bind(model))


# ---- the table ----


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_norm_of_the_table_is_computed_as_its_class_does(name: str, dtype: torch.dtype) -> None:
    """A wrong epsilon, offset or place of the casts would be seen: eps is as large as the variance."""
    norm, row = class_of(name)(32, eps=1.0), NORMS[name]
    assert why_not(norm, row, FUNCTIONS, device=CPU, dtypes={dtype}) is None
    states, plain = torch.randn(5, 32, dtype=dtype), copy.deepcopy(norm.to(dtype))
    nn.init.normal_(plain.weight)
    fused = copy.deepcopy(plain)
    bind(fused, row, FUNCTIONS)
    assert relative(fused(states).double(), plain(states).double()) < (1e-6 if dtype == torch.float32 else 1e-2)
    if dtype == torch.bfloat16:  # to the bit: rounded as often as the class rounds
        assert float((fused(states) == plain(states)).float().mean()) > 0.97
        other = dataclasses.replace(row, casting="gemma" if row.casting == "llama" else "llama")
        bind(fused, other, FUNCTIONS)
        assert float((fused(states) == plain(states)).float().mean()) < 0.97
    changed = dataclasses.replace(row, offset=1.0 - row.offset)
    assert "off by" in (why_not(norm, changed, FUNCTIONS, device=CPU, dtypes={dtype}) or "")


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_every_mlp_of_the_table_is_computed_as_its_class_does(name: str, activation: str) -> None:
    module = mlp(name, activation)
    for dtype in (torch.float32, torch.bfloat16):
        assert why_not(module, Fused("glu"), FUNCTIONS, device=CPU, dtypes={dtype}) is None
    states, fused = torch.randn(2, 5, 24), copy.deepcopy(module)
    bind(fused, Fused("glu"), FUNCTIONS)
    assert relative(fused(states), module(states)) < 1e-6


def plain_mlp(name: str) -> Any:
    config = SimpleNamespace(hidden_size=24, intermediate_size=40, hidden_act="gelu")
    given = (24, 40, "quick_gelu") if name == "qwen2_vl.VisionMlp" else (config,)
    return class_of(name)(*given)


@pytest.mark.parametrize("name", PLAIN_MLPS)
def test_every_plain_mlp_of_the_table_is_computed_as_its_class_does(name: str) -> None:
    """To the bit, gradients too; and the activation is not kept: it is made again once, in the backward pass."""
    plain, row = plain_mlp(name), families._FUSED[name]
    assert why_not(plain, row, FUNCTIONS, device=CPU, dtypes={torch.float32, torch.bfloat16}) is None
    fused, calls = copy.deepcopy(plain), []
    getattr(fused, row.parts[1]).register_forward_hook(lambda *_: calls.append(1))
    bind(fused, row, FUNCTIONS)
    results = []
    for module in (plain, fused):
        states = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = module(states)
        forwards = len(calls)
        out.square().sum().backward()
        results.append([out, states.grad, *(p.grad for p in module.parameters())])
    assert (forwards, len(calls)) == (1, 2)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_an_mlp_multiplies_last_is_not_kept() -> None:
    """It is gone once the forward pass is over; hooks of another, such as checkpointing's, get it as they always do."""
    module = mlp("qwen2.Qwen2MLP")
    bind(module, Fused("glu"), FUNCTIONS)
    states = torch.randn(1, 7, 24, requires_grad=True)
    products: list[Any] = []
    module.down_proj.register_forward_pre_hook(lambda _, given: products.append(weakref.ref(given[0])))
    plain = mlp("qwen2.Qwen2MLP")
    plain.load_state_dict(module.state_dict())
    plain.down_proj.register_forward_pre_hook(lambda _, given: products.append(weakref.ref(given[0])))
    out, expected = module(states), plain(states)
    ours, theirs = (product() for product in products)
    assert ours is None
    assert theirs is not None
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        module(states)
    assert saved.count((7, 40)) == 1  # the product, as the last matrix keeps it
    out.sum().backward()
    gradient, states.grad = states.grad, None
    expected.sum().backward()
    assert relative(gradient, states.grad) < 1e-6


def test_the_table_holds_each_class_that_computes_so() -> None:
    """A class of a tested family whose code is that of a class in the table is in the table itself."""
    packages = {name.split(".")[0] for name in (*NORMS, *MLPS, *PLAIN_MLPS)}
    for package in packages:
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and issubclass(kind, nn.Module):
                code = kind.forward.__code__.co_code, kind.forward.__code__.co_names
                for name in (*NORMS, *MLPS, *PLAIN_MLPS):
                    own = class_of(name).forward.__code__
                    if code == (own.co_code, own.co_names):
                        assert f"{package}.{kind.__name__}" in families._FUSED


def test_counts_by_hand() -> None:
    """InternVL of 2 vision and 2 text layers: 2 norms a layer and one behind the last, one MLP a text layer."""
    model = FAMILIES["internvl-qwen2"].model(0)
    vision, text = model.config.vision_config.num_hidden_layers, model.config.text_config.num_hidden_layers
    found = bound(model)
    assert found == {"rms_norm": 2 * text + 1, "glu": text, "mlp": vision, "rotary": text, "layer_norm": 2 * vision + 1}
    gemma = bound(FAMILIES["gemma3-text"].model(0))
    assert gemma == {"rms_norm": 2 * 6 + 1, "glu": 2}  # four norms a layer, and those of queries and keys
    qwen = bound(FAMILIES["qwen2.5-vl"].model(0), ("glu", "rms_norm"))
    depth = FAMILIES["qwen2.5-vl"].model(0).config.vision_config.depth
    assert qwen == {"rms_norm": 2 * 2 + 1 + 2 * depth + 1, "glu": 2 + depth}  # the vision tower's as well
    assert bound(FAMILIES["mixtral-text"].model(0), ("glu",)) == {}  # experts stay plain
    assert bound(FAMILIES["cohere-text"].model(0)) == {"glu": 2}  # so do its norms


@every_family
def test_log_probs_and_gradients_of_every_family_stay(name: str) -> None:
    family = FAMILIES[name]
    ours, kinds = family.model(0), list(encoded_pairs(name))
    install(ours, family.shared)
    counts = bound(ours)
    assert counts
    expected = plain_logps(plain := family.model(0), name, kinds)
    got = ours(packed_rows=rows_of(family, kinds).rows)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    # The delta rule amplifies rounding: half a unit in the last place of all weights moves its gradient by 5e-5.
    assert relative(flat_gradient(ours), flat_gradient(plain)) < (2e-4 if name == "qwen3.5" else 2e-5)


# ---- instances ----


def test_other_models_of_the_class_are_untouched() -> None:
    """Classes, functions of their modules and a second model stay as they were, to the bit."""
    from transformers.models.qwen2 import modeling_qwen2

    def state() -> dict[str, Any]:
        named = vars(modeling_qwen2).items()
        return {name: getattr(value, "__dict__", {}).get("forward", value) for name, value in named}

    before = state()
    name, kinds = "qwen2-text", list(encoded_pairs("qwen2-text"))
    other = FAMILIES[name].model(0)
    with torch.no_grad():
        expected = plain_logps(other, name, kinds)
        mine = FAMILIES[name].model(0)
        assert bound(mine, functions=wrong("rms_norm", 1.0))
        assert relative(plain_logps(mine, name, kinds), expected) > 1e-3
        assert torch.equal(plain_logps(other, name, kinds), expected)
        assert torch.equal(plain_logps(FAMILIES[name].model(0), name, kinds), expected)
    assert state() == before
    assert not any("forward" in vars(module) for module in other.modules())


def test_a_deep_copy_reads_its_own_weights() -> None:
    model = FAMILIES["internvl-qwen2"].model(0)
    bound(model)
    twin = copy.deepcopy(model)
    pairs = [(a, b) for a, b in zip(model.modules(), twin.modules(), strict=True) if is_bound(a)]
    assert pairs
    for module, copied in pairs:
        assert copied.forward.__self__ is copied
        assert module.forward.__self__ is module
    kinds = list(encoded_pairs("internvl-qwen2"))
    with torch.no_grad():
        expected = plain_logps(model, "internvl-qwen2", kinds)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(plain_logps(model, "internvl-qwen2", kinds), expected)
        assert not torch.equal(plain_logps(twin, "internvl-qwen2", kinds), expected)


def test_pickled_it_reads_as_its_classes_do_and_can_be_bound_again() -> None:
    name = "qwen2-text"
    rows = rows_of(FAMILIES[name], list(encoded_pairs(name))).rows
    ours, plain = two(name)
    again = pickle.loads(pickle.dumps(ours))
    kinds = list(encoded_pairs(name))
    with torch.no_grad():
        assert torch.equal(plain_logps(again, name, kinds), plain_logps(FAMILIES[name].model(0), name, kinds))
        install(again, FAMILIES[name].shared)
        assert torch.equal(again(packed_rows=rows), plain(packed_rows=rows))
        assert bound(again) == bound(ours)
        assert torch.equal(again(packed_rows=rows), ours(packed_rows=rows))


def test_unbound_it_is_the_model_it_was_and_saves_the_same(tmp_path: Any) -> None:
    model = FAMILIES["qwen3-text"].model(0)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    bound(model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))
    unbind(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_using_fewer_kinds_reaches_all_models_of_a_run() -> None:
    policy, reference = FAMILIES["qwen2-text"].model(0), FAMILIES["qwen2-text"].model(1)
    kernels = Kernels(("rms_norm", "glu"), FUNCTIONS)
    kernels.bind(policy)
    kernels.bind(reference)
    assert kernels.key == "stand-in 1 glu,rms_norm"
    kernels.use(["glu", "unheard of"])
    for model in (policy, reference):
        assert {type(module).__name__ for module in model.modules() if is_bound(module)} == {"Qwen2MLP"}
    assert kernels.key == "stand-in 1 glu"
    kernels.use([])
    assert kernels.key == ""
    assert not any(is_bound(module) for module in policy.modules())
    kernels.use(["rms_norm"])
    assert kernels.kinds == ("rms_norm",)


def test_a_forward_that_something_else_replaced_is_left_alone() -> None:
    model = FAMILIES["qwen2-text"].model(0)
    first = model.model.layers[0].mlp
    own = first.forward
    first.forward = lambda states: own(states)  # as accelerate's hooks do
    replaced = first.forward
    assert bound(model, ("glu",)) == {"glu": 1}
    assert first.forward is replaced
    unbind(model)
    assert first.forward is replaced


def test_a_family_without_a_row_is_left_plain() -> None:
    model = FAMILIES["qwen2-text"].model(0)
    model.config.model_type = "qwen2_of_someone"
    assert list(fusable(model)) == []
    exact = FAMILIES["qwen2-text"].model(0)
    exact.model.layers[0].mlp.act_fn = nn.GELU()  # no kernel has the exact form
    assert bound(exact, ("glu",)) == {"glu": 1}


# ---- what a run does to its model ----


def logps_and_gradient(model: Any, name: str) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    logps = model(packed_rows=rows_of(FAMILIES[name], list(encoded_pairs(name))).rows)
    (logps * torch.linspace(-1, 1, logps.numel())).sum().backward()
    return logps.detach(), flat_gradient(model)


def same(model: Any, other: Any, name: str, tolerance: float = 1e-5) -> None:
    mine, theirs = logps_and_gradient(model, name), logps_and_gradient(other, name)
    torch.testing.assert_close(mine[0], theirs[0], atol=tolerance, rtol=0)
    assert relative(mine[1], theirs[1]) < tolerance


def two(name: str) -> tuple[Any, Any]:
    """The same model twice, one of them bound."""
    models = FAMILIES[name].model(0), FAMILIES[name].model(0)
    for model in models:
        install(model, FAMILIES[name].shared)
    assert bound(models[0])
    return models


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["internvl-qwen2", "qwen3-text", "gemma3-text"])
def test_under_gradient_checkpointing(name: str, reentrant: bool) -> None:
    ours, plain = two(name)
    ours.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    same(ours, plain, name)


def test_adapters_on_the_projections_of_an_mlp_are_called() -> None:
    name = "internvl-qwen2"
    models = []
    for with_kernels in (True, False):
        torch.manual_seed(4)
        targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
        base = FAMILIES[name].model(0)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        install(base, True)
        if with_kernels:
            assert bound(adapted)["glu"] == 2
        models.append(adapted)
    same(models[0], models[1], name)
    grads = {key: p.grad for key, p in models[0].named_parameters() if "up_proj.lora_A" in key and p.grad is not None}
    assert len(grads) == 2
    assert all(float(grad.norm()) > 0 for grad in grads.values())
    with models[0].disable_adapter(), models[1].disable_adapter(), torch.no_grad():
        rows = rows_of(FAMILIES[name], list(encoded_pairs(name))).rows
        torch.testing.assert_close(models[0](packed_rows=rows), models[1](packed_rows=rows), atol=1e-5, rtol=0)


def test_float64_is_the_plain_module_to_the_bit() -> None:
    ours, plain = two("internvl-qwen2")
    ours.double(), plain.double()
    states = torch.randn(1, 3, ours.config.text_config.hidden_size, dtype=torch.float64)
    for mine, theirs in zip(ours.modules(), plain.modules(), strict=True):
        if type(mine).__name__ in ("Qwen2RMSNorm", "Qwen2MLP"):
            assert torch.equal(mine(states), theirs(states))


@pytest.mark.parametrize("name", ["internvl-qwen2", "qwen3-text", "gemma3-text"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_outputs_have_the_plain_modules_types(name: str, weights: torch.dtype, autocast: bool) -> None:
    """Also where autocast mixes types: queries are bf16 and their norm's weight is float32."""
    types: list[list[torch.dtype]] = []
    for model in two(name):
        seen: list[torch.dtype] = []
        types.append(seen)
        model.to(weights)
        for module, _ in fusable(model):
            module.register_forward_hook(
                lambda _m, _i, out, to=seen: to.append((out[0] if isinstance(out, tuple) else out).dtype)
            )
        rows = rows_of(FAMILIES[name], list(encoded_pairs(name))).rows
        rows = [
            dataclasses.replace(row, vision={key: value.to(weights) for key, value in row.vision.items()})
            for row in rows
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            model(packed_rows=rows)
    assert types[0] == types[1]
    assert types[0]


def test_frozen_norms_get_no_gradient_and_hooks_fire() -> None:
    ours, plain = two("qwen2-text")
    called: list[str] = []
    for model in (ours, plain):
        for key, module in model.named_modules():
            if key.endswith("norm"):
                module.weight.requires_grad_(False)
    norm = ours.model.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda *_: called.append("before"))  # as FSDP and ZeRO-3 gather weights
    norm.register_full_backward_hook(lambda *_: called.append("backward"))
    same(ours, plain, "qwen2-text")
    assert norm.weight.grad is None
    assert called == ["before", "backward"]


@pytest.mark.parametrize("name", ["internvl-qwen2", "qwen3-text", "gemma3-text"])
def test_greedy_answers_stay(name: str) -> None:
    ours, plain = FAMILIES[name].model(0), FAMILIES[name].model(0)
    bound(ours)
    assert greedy(ours, name) == greedy(plain, name)


def test_torch_compile_reads_a_bound_module_without_a_break() -> None:
    module = mlp("qwen2.Qwen2MLP")
    fused = copy.deepcopy(module)
    calls = {"silu_mul": lambda gate, up: torch.nn.functional.silu(gate) * up}
    bind(fused, Fused("glu"), Functions(**{**vars(FUNCTIONS), **calls}))
    states = torch.randn(2, 5, 24)
    assert torch.equal(torch.compile(fused, backend="eager", fullgraph=True)(states), module(states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_compile_reads_a_bound_rotation(dtype: torch.dtype) -> None:
    """Also where the kernel cannot read the states, as under autocast, and the plain rotation is called by ours."""
    plain = FAMILIES["qwen2-text"].model(0).model.layers[0].self_attn.to(dtype)
    fused = copy.deepcopy(plain)
    calls = {"rotary": lambda query, key, cos, sin: (2 * query, 3 * key)}
    bind(fused, Fused("rotary"), Functions(**{**vars(FUNCTIONS), **calls}))
    angles = torch.randn(1, 5, plain.head_dim, dtype=dtype)
    given = {
        "hidden_states": torch.randn(1, 5, plain.config.hidden_size, dtype=dtype),
        "position_embeddings": (angles.cos(), angles.sin()),
        "attention_mask": None,
    }
    layer = torch.compile(lambda **given: fused(**given)[0], backend="eager", fullgraph=True)  # as one calls it
    assert torch.equal(layer(**given), fused(**given)[0])
    assert torch.equal(fused(**given)[0], plain(**given)[0]) == (dtype == torch.float64)


# ---- the check at the start ----


def agreement(functions: Functions, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    model = FAMILIES["internvl-qwen2"].model(0)
    return kinds_that_agree([model], ALL, functions, device=CPU, dtypes={dtype})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_functions_agree(dtype: torch.dtype) -> None:
    assert agreement(FUNCTIONS, dtype) == dict.fromkeys(ALL)


@pytest.mark.parametrize("function", ["rms_norm", "silu_mul", "layer_norm"])
@pytest.mark.parametrize("fault", ["a little", "NaN", "an error", "another type", "its gradient"])
def test_a_function_that_is_wrong_is_found(function: str, fault: str) -> None:
    kind = "glu" if function == "silu_mul" else function
    right = getattr(FUNCTIONS, function)

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no compiler\nand more")

    def half_blind(*arguments: Any) -> Tensor:
        out = right(*arguments)
        return out.detach() + 0.999 * (out - out.detach())

    functions = {
        "a little": lambda *arguments: right(*arguments) + 1e-3,
        "NaN": lambda *arguments: right(*arguments) + float("nan"),
        "an error": fails,
        "another type": lambda *arguments: right(*arguments).double(),
        "its gradient": half_blind,
    }
    found = agreement(Functions(**{**vars(FUNCTIONS), function: functions[fault]}))
    assert found.keys() == set(ALL)
    assert {name for name, reason in found.items() if reason} == {kind}
    reason = found[kind] or ""
    assert "RuntimeError: no compiler" in reason if fault == "an error" else "off by" in reason
    assert "\n" not in reason


class _Louder(torch.autograd.Function):
    """Returns what it is given; its gradient is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


def _gradient_of(place: int) -> Any:
    def made(right: Any) -> Any:
        return lambda *given: right(*given[:place], _Louder.apply(given[place]), *given[place + 1 :])

    return made


def _at_one_size(right: Any) -> Any:
    def rotary(query: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        own = query.shape[1] == 2 and query.shape[-1] == 16  # heads and their size of the tiny model
        query, key = right(query, *others)
        return query * (1.01 if own else 1.0), key

    return rotary


HIDDEN_FAULTS: dict[str, tuple[str, Any]] = {
    "1 % of one gradient of a gated MLP": ("silu_mul", _gradient_of(1)),
    "1 % of the gradient of a norm's weight": ("rms_norm", _gradient_of(1)),
    "another epsilon": (
        "rms_norm",
        lambda right: lambda states, weight, eps, *rest: right(states, weight, 1e-12, *rest),
    ),
    "1 % of queries, at one size of heads": ("rotary", _at_one_size),
}


@pytest.mark.parametrize("fault", HIDDEN_FAULTS)
def test_what_rounding_and_other_sizes_hide_is_found(fault: str) -> None:
    """In a run that computes in bf16, whose rounding is as large as these faults."""
    function, change = HIDDEN_FAULTS[fault]
    kind = "glu" if function == "silu_mul" else function
    functions = Functions(**{**vars(FUNCTIONS), function: change(getattr(FUNCTIONS, function))})
    model = FAMILIES["internvl-qwen2"].model(0)
    for given, wrong_there in ((FUNCTIONS, False), (functions, True)):
        found = kinds_that_agree([model], (kind,), given, device=CPU, dtypes={torch.bfloat16})
        assert ("off by" in (found[kind] or "")) == wrong_there


def test_the_check_leaves_model_and_random_numbers_alone() -> None:
    model = FAMILIES["internvl-qwen2"].model(0)
    model.model.language_model.norm.register_forward_pre_hook(lambda *_: pytest.fail("a hook of the model fired"))
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    kinds_that_agree([model], ALL, FUNCTIONS, device=CPU, dtypes={torch.float32})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_elsewhere_are_not_read() -> None:
    """On meta, as where another rank loads them, and empty, as under ZeRO-3."""
    with torch.device("meta"):
        norm = class_of("qwen2.Qwen2RMSNorm")(32)
    assert why_not(norm, Fused("rms_norm"), FUNCTIONS, device=CPU, dtypes={torch.float32}) is None
    empty = class_of("qwen2.Qwen2RMSNorm")(32)
    empty.weight.data = torch.empty(0)
    empty.weight.ds_shape = torch.Size([32])
    assert why_not(empty, Fused("rms_norm"), FUNCTIONS, device=CPU, dtypes={torch.float32}) is None


def test_the_tiny_model_of_the_demo_has_kernels() -> None:
    assert bound(tiny_models.model(), ("rms_norm", "glu"))
