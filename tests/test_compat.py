"""Private names of other libraries: each exists as recorded, and none is used outside of vlmpo.compat."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)

from tests import tiny_models
from tests.paths import REPO
from tests.zoo.text import build
from vlmpo import MPOTrainer, compat
from vlmpo.models import families

SOURCE = REPO / "src" / "vlmpo"
# Documented, although they begin with an underscore: methods of every NamedTuple.
PUBLIC = {"_fields", "_replace", "_asdict", "_make"}


def parameters(function: object) -> str:
    """The signature without annotations: names, kinds and defaults."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


# ---- the contract ----


@pytest.mark.parametrize(("name", "recorded"), list(compat.TRAINER_OVERRIDES.items()), ids=lambda value: value)
def test_the_trainers_methods_are_as_recorded(name: str, recorded: str) -> None:
    assert parameters(inspect.getattr_static(Trainer, name)) == recorded


def test_the_recorded_overrides_are_those_of_mpo_trainer() -> None:
    own = MPOTrainer.__mro__[: MPOTrainer.__mro__.index(Trainer)]
    overridden = {
        name
        for kind in own
        for name, value in vars(kind).items()
        if callable(value) and hasattr(Trainer, name) and not name.startswith("__")
    }
    assert overridden == set(compat.TRAINER_OVERRIDES)


def test_names_of_models_and_configs() -> None:
    assert PreTrainedConfig()._name_or_path == ""
    assert compat.name_or_path(PreTrainedConfig()) is None
    assert compat.name_or_path(None) is None
    config = PreTrainedConfig()
    config._name_or_path = "somewhere"
    assert compat.name_or_path(config) == "somewhere"
    assert "_model_mapping" in vars(AutoModelForImageTextToText)
    assert compat.is_image_text_config(tiny_models.model().config)
    assert not compat.is_image_text_config(LlamaConfig())
    assert {"_no_split_modules", "_can_record_outputs", "_hf_peft_config_loaded"} <= set(dir(PreTrainedModel))
    assert compat.attention_implementation(build(0, "llama").config) == "sdpa"
    assert compat.layers_to_wrap(build(0, "llama")) == {"LlamaDecoderLayer"}
    assert not compat.has_transformers_adapter(build(0, "llama"))


def test_an_attention_rotates_by_a_global_of_its_module() -> None:
    kinds = [name for name, fused in families._FUSED.items() if fused.kind == "rotary"]
    for package, name in (kind.split(".") for kind in kinds):
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        kind, plain = getattr(module, name), module.apply_rotary_pos_emb
        forward = kind.forward
        assert parameters(plain) == "(q, k, cos, sin, unsqueeze_dim=1)"
        assert compat.rotation_of(kind) is plain
        made = compat.rotating_by(kind, parameters)
        assert made.__globals__["apply_rotary_pos_emb"] is parameters
        assert parameters(made) == parameters(kind.forward)
        assert (kind.forward, module.apply_rotary_pos_emb) == (forward, plain)
    with pytest.raises(AttributeError, match="forward calls no apply_rotary_pos_emb"):
        compat.rotation_of(torch.nn.Linear)


def test_routers_are_found_by_what_transformers_records() -> None:
    assert MixtralForCausalLM._can_record_outputs["router_logits"].target_class.__name__ == "MixtralTopKRouter"
    model = build(0, "mixtral", num_local_experts=2, num_experts_per_tok=1)
    assert compat.router_class(model).__name__ == "MixtralTopKRouter"
    assert compat.router_class(torch.nn.Linear(1, 1)) is None


def test_names_of_processors() -> None:
    expected = "(self, ModelProcessorKwargs=None, tokenizer_init_kwargs=None, **kwargs)"
    assert parameters(ProcessorMixin._merge_kwargs) == expected
    processor = tiny_models.processor()
    assert compat.settings_merger(processor) == processor._merge_kwargs
    assert compat.settings_merger(None) is None
    assert parameters(type(processor)._get_num_multimodal_tokens) == "(self, image_sizes=None, **kwargs)"
    count = compat.image_token_counter(processor)
    assert count is not None
    assert len(count(image_sizes=[[60, 60]], images_kwargs={})["num_image_tokens"]) == 1
    assert compat.image_token_counter(None) is None


def test_names_of_training_arguments(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert args._n_gpu == args.n_gpu == 0
    compat.use_one_gpu(args)
    assert args.n_gpu == 1
    assert "lr_scheduler_kwargs" in compat.fields_given_as_json()


def test_names_of_the_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    trainer = Trainer(torch.nn.Linear(1, 1), args)
    assert compat.batch_size_per_device(trainer) == 3
    trainer._total_loss_scalar, trainer._tr_loss, trainer._globalstep_last_logged = 0.0, torch.tensor(0.0), 0
    sums = {"total": 2.5, "since_log": 0.5, "logged": 3}
    compat.restore_loss_sums(trainer, **sums)
    assert compat.loss_sums(trainer) == sums
    source = inspect.getsource(Trainer)
    assert all(f"self.{name} =" in source for name in ("_total_loss_scalar", "_tr_loss", "_globalstep_last_logged"))


def test_names_of_accelerate() -> None:
    assert parameters(GradientState._set_sync_gradients) == "(self, sync_gradients)"
    accelerator = Accelerator(cpu=True)
    for due in (False, True):
        compat.set_gradient_sync(accelerator, due)
        assert accelerator.sync_gradients is due
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert not compat.is_prepared(first)
    prepared = [accelerator.prepare(model) for model in (first, second)]
    assert compat.is_prepared(prepared[0])
    compat.forget_model(accelerator, prepared[0])
    assert [id(model) for model in accelerator._models] == [id(prepared[1])]
    accelerator.free_memory()


def test_a_prepared_model_can_be_prepared_again() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    model = torch.nn.Linear(1, 1)
    plain = model.forward
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare(model)
    assert model(torch.ones(1)).dtype == torch.float32  # converted back
    assert model.forward != plain
    compat.undo_preparation(model)
    assert model.forward == plain
    assert not compat.is_prepared(model)
    accelerator.prepare(model)
    assert model.forward != plain
    accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_rates_that_a_scheduler_reports() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    compat.set_last_rates(scheduler, [0.5])
    assert scheduler.get_last_lr() == [0.5]


def test_names_of_torch() -> None:
    dropouts = (torch.nn.Dropout, torch.nn.Dropout2d, torch.nn.AlphaDropout)
    assert all(compat.is_dropout(kind()) for kind in dropouts)
    norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)
    assert all(compat.is_batch_norm(kind(2)) for kind in norms)
    assert not compat.is_dropout(torch.nn.Linear(1, 1))
    assert not compat.is_batch_norm(torch.nn.LayerNorm(1))


def test_a_layer_is_computed_again_by_what_one_gives() -> None:
    model = build(0, "llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    layer = model.get_decoder().layers[0]
    calls = []

    def around(checkpoint, *args, **kwargs):
        calls.append(checkpoint)
        return checkpoint(*args, **kwargs)

    compat.checkpoint_by(layer, around)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert len(calls) == 1
    assert layer.self_attn.q_proj.weight.grad is not None


def test_a_modules_parameters_can_be_replaced() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU(), torch.nn.Linear(1, 1))
    places = compat.parameter_places(model)
    assert [(name, parameter.shape) for _, name, parameter in places] == [
        ("weight", (1, 2)),
        ("weight", (1, 1)),
        ("bias", (1,)),
    ]
    places[0][0]["weight"] = torch.zeros(1, 2)
    assert not model[0].weight.any()
    assert not isinstance(model[0].weight, torch.nn.Parameter)


def test_changes_in_place_are_counted_and_copies_convert() -> None:
    weight, rounded = torch.nn.Parameter(torch.tensor([1.01])), torch.zeros(1, dtype=torch.bfloat16)
    before = compat.version(weight)
    compat.copy_each([rounded], [weight.detach()])
    compat.copy_each([], [])
    assert (rounded.item(), compat.version(weight)) == (1.0078125, before)  # 1 + 2^-7
    torch.optim.SGD([weight], lr=1.0).zero_grad()
    with torch.no_grad():
        weight.mul_(2.0)
    assert compat.version(weight) > before


def test_a_function_can_be_run_first() -> None:
    weight = torch.ones(1, requires_grad=True)
    done: list[str] = []
    early, late = weight.exp(), weight.exp()
    early.register_hook(lambda _: done.append("early"))
    early.grad_fn.register_hook(lambda *_: done.append("its function"))
    compat.run_backward_first(early)
    chain = late.sin()
    chain.grad_fn.register_hook(lambda *_: done.append("another"))
    (early + chain).sum().backward()
    assert done == ["early", "its function", "another"]


@pytest.mark.parametrize(
    ("avx512", "amx", "most", "fast"),
    [
        (True, False, None, True),
        (False, True, None, True),
        (False, False, None, False),
        (True, True, "AVX512_CORE", False),
        (True, True, "AVX2", False),
        (True, False, "AVX512_CORE_BF16", True),
        (True, True, "avx512_core_amx", True),
        (True, True, "DEFAULT", True),
    ],
)
def test_fast_bf16(monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, most: str | None, fast: bool) -> None:
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert compat.has_fast_bf16(torch.device("cpu")) is fast
    monkeypatch.setattr(torch.version, "hip", None)
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert compat.has_fast_bf16(torch.device("cuda", 0)) is (capability >= (8, 0))
    assert not compat.has_fast_bf16(torch.device("mps"))


# ---- nobody else uses private names ----


def test_hooks_on_saved_tensors_are_seen() -> None:
    assert not compat.saved_tensors_are_hooked()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert compat.saved_tensors_are_hooked()
    assert not compat.saved_tensors_are_hooked()


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_grows_in_place_unless_the_user_has_set_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    settings: list[str] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:512")
    name = "_accelerator_setAllocatorSettings"
    holder = torch._C if hasattr(torch._C, name) else torch.cuda.memory
    monkeypatch.setattr(holder, name if holder is torch._C else "_set_allocator_settings", settings.append)
    compat.use_expandable_segments()
    assert settings == []  # no CUDA here
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compat.use_expandable_segments()
    assert settings == ([] if given else ["expandable_segments:True"])


def test_operations_are_seen_with_what_they_are_given_and_return():
    seen = []
    weight = torch.ones(2, requires_grad=True)
    with compat.watching_operations(lambda given, made: seen.append((len(given), len(made)))):
        (weight * weight).sum().backward()
    assert (2, 1) in seen  # the product
    assert len(seen) > 3  # the backward pass too
    assert len(compat.tensors_in({"a": [weight, (weight,)], "b": 1})) == 2


def test_a_model_without_values_reads_real_numbers():
    with compat.shapes_alone():
        table = torch.nn.Embedding(4, 3, device="meta")
        ids = torch.tensor([1, 2]).to("meta")
        assert ids.tolist() == [1, 2]
        made = table(ids) * torch.ones(3)
    assert made.is_meta
    assert made.shape == (2, 3)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in PUBLIC


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Names that a module itself makes: functions, classes, variables, attributes it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            base = node.value
            if (isinstance(base, ast.Name) and base.id == "self") or node.attr.startswith("_vlmpo"):
                yield node.attr


def private_uses(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of other packages that a module uses, as ``line: name``."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "vlmpo":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            named = node.args[1]
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and isinstance(named, ast.Constant):
                names = [str(named.value)]
        yield from (f"{node.lineno}: {name}" for name in names if private(name) and name not in own)


def test_private_names_are_used_in_compat_alone() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    own = {name for path, tree in trees.items() if path.name != "compat.py" for name in defined_names(tree)}
    own.add("_exit")  # of os, which documents it
    found = {
        str(path.relative_to(SOURCE)): uses
        for path, tree in trees.items()
        if path != SOURCE / "compat.py" and (uses := list(private_uses(tree, own)))
    }
    assert found == {}, "add a function to vlmpo/compat.py, with its contract in this file"


@pytest.mark.parametrize(
    "source",
    [
        "accelerator._models.clear()",
        "args._n_gpu = 1",
        "getattr(model, '_no_split_modules', None)",
        "setattr(model, '_no_split_modules', [])",
        "from torch.nn.modules.dropout import _DropoutNd",
        "from transformers._somewhere import name",
        "import torch._dynamo",
    ],
)
def test_a_breach_is_seen(source: str) -> None:
    tree = ast.parse(source)
    assert len(list(private_uses(tree, set(defined_names(tree))))) == 1


def test_what_is_allowed_is_let_through() -> None:
    source = "class A:\n    def __init__(self):\n        self._own = 1\n\n\ndef f(a, row):\n    a._own, row._replace()"
    tree = ast.parse(source)
    assert list(private_uses(tree, set(defined_names(tree)))) == []
    assert list(private_uses(ast.parse("from vlmpo.data import _private"), set())) == []


def test_replacing_the_merger_leaves_the_class_alone() -> None:
    processor = SimpleNamespace(_merge_kwargs=None)
    compat.replace_settings_merger(processor, len)
    assert compat.settings_merger(processor) is len
