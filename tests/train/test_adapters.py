"""LoRA whole: which reference it gets, that the reference stays, what is saved, what resumes, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.case_worker import two_processes
from tests.commands.test_train import call, records, write_data, write_recipe
from tests.tiny_models import SIZE, image_tree, noise_image, processor
from tests.tiny_models import model as tiny_model
from tests.training import AfterSteps, Gradients, flat_weights, logged, pairs, relative, trainer
from tests.tree.test_forward import separate_logps
from vlmpo import MPOTrainer
from vlmpo.commands.adapter_settings import lora_config
from vlmpo.errors import ModelError, RecipeError, RunError
from vlmpo.models.adapters import named_base, trained_beside_adapter, use_adapter
from vlmpo.models.loading import load_model
from vlmpo.recipe_yaml import parse_recipe
from vlmpo.train.reference import AdapterReference, CopyReference, weights_hash
from vlmpo.tree.forward import install, response_logps
from vlmpo.tree.layout import PackedRow, PromptTree, build_row

TARGETS = ["q_proj", "v_proj"]
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model and its processor, as an adapter names it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def policy(seed: int = 0, **fields: Any) -> PeftModel:
    """A tiny model under an adapter that was trained before: its weights are not those of a fresh one."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **fields})
    return get_peft_model(tiny_model(), config)


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """All parameters but those of the frozen adapter."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".reference." not in f"{n}."}


def trees() -> list[PromptTree]:
    return [image_tree([noise_image(60, 60, 1)], [5, 8], 1), image_tree([], [3, 4], 2)]


def starts_at_zero(folder: Path) -> None:
    first = logged(folder)[0]
    assert first["rewards/chosen"] == 0.0
    assert first["rewards/rejected"] == 0.0


# ---- the frozen adapter as reference ----


def reference_logps(run: MPOTrainer, rows: list[PackedRow]) -> torch.Tensor:
    """``[responses]``, as the run's reference reads them."""
    assert run.reference is not None
    return run.reference.response_logps(SimpleNamespace(rows=rows))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_frozen_adapter_is_the_initial_policy_on_the_same_base(tmp_path: Path) -> None:
    model = policy()
    before = own_weights(model)
    size = sum(p.numel() for p in model.parameters())
    adapter_size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    initial = frozen_copy_of(model)
    run = trainer(tmp_path, pairs(6), model=model, learning_rate=1e-2)
    assert isinstance(run.reference, AdapterReference)
    assert run.reference.frozen == "reference"
    assert sum(p.numel() for p in run.model.parameters()) == size + adapter_size  # no second copy of the base
    run.train()
    starts_at_zero(tmp_path)
    rows = [build_row([tree]) for tree in trees()]
    with torch.no_grad():
        assert torch.equal(reference_logps(run, rows), response_logps(initial, rows))
        moved = run.model(packed_rows=rows)
    assert (moved - initial(packed_rows=rows)).abs().max() > 1e-2
    after = own_weights(run.model)
    for name, weight in before.items():
        assert torch.equal(after[name], weight) != ("lora_" in name), name


def frozen_copy_of(model: Any) -> Any:
    twin = copy.deepcopy(model)
    install(twin.get_base_model(), shared=True)
    return twin.requires_grad_(False).eval()


@pytest.mark.slow
def test_it_trains_as_against_a_deep_copy(tmp_path: Path) -> None:
    """The same run with a whole frozen model as reference: equal rewards and weights."""
    other = frozen_copy_of(policy())
    with_copy = trainer(tmp_path / "copy", pairs(6), model=policy(), ref_model=other, learning_rate=1e-2)
    with_adapter = trainer(tmp_path / "adapter", pairs(6), model=policy(), learning_rate=1e-2)
    for run in (with_copy, with_adapter):
        run.train()
    assert isinstance(with_copy.reference, CopyReference)
    expected = own_weights(with_copy.model)
    for name, weight in own_weights(with_adapter.model).items():
        assert torch.equal(weight, expected[name]), name
    for mine, theirs in zip(logged(tmp_path / "adapter"), logged(tmp_path / "copy"), strict=True):
        for key in ("loss", "rewards/chosen", "rewards/rejected", "reward_shift", "grad_norm"):
            assert mine[key] == theirs[key], key
    assert abs(logged(tmp_path / "adapter")[-1]["rewards/margins"]) > 1e-3
    assert with_copy.reference.weights_hash() == with_adapter.reference.weights_hash()


@pytest.mark.slow
def test_reading_as_another_adapter_leaves_no_trace(tmp_path: Path) -> None:
    """PEFT's switches thaw whatever they switch on; here part of the adapter stays frozen, inside and after."""
    model = policy()
    frozen = [p for n, p in model.named_parameters() if "layers.0" in n and "lora_" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    run = trainer(tmp_path, pairs(2), model=model)
    flags = [(n, p.requires_grad) for n, p in run.model.named_parameters()]
    assert sum(flag for _, flag in flags) == 8 == 2 * len(frozen)  # the other text layer, and the vision tower's
    for name in ("reference", None):
        with use_adapter(run.model, name):
            assert [(n, p.requires_grad) for n, p in run.model.named_parameters()] == flags
        assert [(n, p.requires_grad) for n, p in run.model.named_parameters()] == flags
        assert run.model.active_adapters == ["default"]
    before = own_weights(run.model)
    run.train()
    assert {n for n, w in own_weights(run.model).items() if not torch.equal(w, before[n])} == {
        n for n, flag in flags if flag
    }


@pytest.mark.slow
def test_dropout_that_came_with_the_adapter_is_off(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = trainer(tmp_path, pairs(4), model=policy(lora_dropout=0.5), learning_rate=1e-2)
    assert "dropout switched off in 6 modules" in capsys.readouterr().err  # three layers, two projections each
    run.train()
    starts_at_zero(tmp_path)
    assert not [m for m in run.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]


# ---- trained copies of whole modules ----


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False], ids=["adapter off", "frozen adapter"])
def test_modules_to_save_are_switched_with_the_adapter(tmp_path: Path, fresh: bool) -> None:
    """The reference reads the modules as they were, and its hash does not move with the trained copies."""
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["multi_modal_projector", "lm_head"])
    model = tiny_model() if fresh else get_peft_model(tiny_model(), config)
    initial = frozen_copy_of(get_peft_model(tiny_model(), config))
    extra = {"peft_config": config} if fresh else {}
    run = trainer(tmp_path, pairs(6), model=model, **CHECKPOINTS, **extra)
    assert isinstance(run.reference, AdapterReference)
    assert run.reference.frozen == (None if fresh else "reference")
    hashed = weights_hash(run.model, run.reference.frozen)
    run.train()
    starts_at_zero(tmp_path)
    rows = [build_row([tree]) for tree in trees()]
    with torch.no_grad():
        torch.testing.assert_close(reference_logps(run, rows), response_logps(initial, rows), atol=0, rtol=0)
    head = run.model.get_base_model().lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert weights_hash(run.model, run.reference.frozen) == hashed
    state = json.loads((tmp_path / "checkpoint-4" / "vlmpo_state.json").read_text())
    assert state["reference_hash"] == hashed
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in saved
    resumed = trainer(
        tmp_path,
        pairs(6),
        model=tiny_model() if fresh else get_peft_model(tiny_model(), config),
        **CHECKPOINTS,
        **extra,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# ---- what is saved, and what resumes ----


@pytest.mark.slow
@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_resume_of_an_adapter_that_came_with_the_policy(tmp_path: Path, adapter_name: str) -> None:
    """Bit-equal to the run that was not cut; the reference is the initial adapter, never the resumed one."""

    def start() -> Any:
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        return get_peft_model(tiny_model(), config, adapter_name=adapter_name)

    whole = trainer(tmp_path / "whole", pairs(6), model=start(), **CHECKPOINTS)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "cut" / later)
    resumed = trainer(tmp_path / "cut", pairs(6), model=start(), **CHECKPOINTS)
    resumed.train(resume_from_checkpoint=True)
    expected = dict(whole.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    lines = [logged(tmp_path / name) for name in ("cut", "whole")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert [line["rewards/margins"] for line in lines[0]] == [line["rewards/margins"] for line in lines[1]]
    with pytest.raises(RunError, match="a different reference model"):
        trainer(tmp_path / "cut", pairs(6), model=whole.model, **CHECKPOINTS).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["checkpoint-2", "final"])
def test_only_the_policys_adapter_is_saved(tmp_path: Path, place: str) -> None:
    run = trainer(tmp_path, pairs(2), model=policy(), **CHECKPOINTS)
    run.train()
    run.save_model(str(tmp_path / "final"))
    folder = tmp_path / place
    assert not [f for f in folder.rglob("*") if "reference" in f.name]
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 12
    loaded = PeftModel.from_pretrained(tiny_model(), folder)
    trained = own_weights(run.model)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, trained[name]), name


@pytest.mark.slow
def test_a_second_trainer_on_the_same_model_takes_a_reference_of_its_own(tmp_path: Path) -> None:
    first = trainer(tmp_path / "1", pairs(4), model=policy(), learning_rate=1e-2)
    first.train()
    second = trainer(tmp_path / "2", pairs(4), model=first.model, learning_rate=1e-2)
    assert second.reference.frozen == "reference_2"
    second.train()
    starts_at_zero(tmp_path / "2")
    assert first.reference.weights_hash() == weights_hash(first.model, "reference")


# ---- other fields of LoraConfig ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({"use_dora": True}, None),
        ({"use_rslora": True}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"lora_bias": True}, None),
        ({"init_lora_weights": "pissa"}, "reference"),
        ({"init_lora_weights": False}, "reference"),
        ({"init_lora_weights": "olora"}, "reference"),
        ({"init_lora_weights": "orthogonal"}, "reference"),
    ],
    ids=str,
)
def test_every_kind_of_lora_starts_at_zero_and_keeps_its_reference(
    tmp_path: Path, fields: dict[str, Any], reference: str | None
) -> None:
    """PiSSA and OLoRA change the base model: the adapter switched off would be another model than the initial one."""
    torch.manual_seed(0)
    run = trainer(tmp_path, pairs(6), peft_config=LoraConfig(r=4, target_modules=TARGETS, **fields), learning_rate=1e-2)
    assert isinstance(run.reference, AdapterReference)
    assert run.reference.frozen == reference
    rows = [build_row([tree]) for tree in trees()]
    with torch.no_grad():
        before, read = reference_logps(run, rows), response_logps(run.model, rows)
    torch.testing.assert_close(before, read, atol=0, rtol=0)
    run.train()
    starts_at_zero(tmp_path)
    with torch.no_grad():
        assert torch.equal(reference_logps(run, rows), before)
        assert (response_logps(run.model, rows) - before).abs().max() > 1e-3


@pytest.mark.slow
def test_trained_biases_ask_for_a_whole_copy(tmp_path: Path) -> None:
    """``bias: all`` trains weights of the base: an adapter switched off would leave them moved in the reference."""
    config = LoraConfig(r=4, target_modules=TARGETS, bias="all")
    run = trainer(tmp_path, pairs(6), peft_config=config, learning_rate=1e-2)
    assert isinstance(run.reference, CopyReference)
    assert len(trained_beside_adapter(run.model)) > 5
    hashed = run.reference.weights_hash()
    run.train()
    starts_at_zero(tmp_path)
    assert run.reference.weights_hash() == hashed
    with pytest.raises(RecipeError, match="weights outside the adapter train too"):
        trainer(
            tmp_path,
            pairs(2),
            peft_config=LoraConfig(r=4, target_modules=TARGETS, bias="all"),
            reference_kind="adapter",
        )


def test_an_adapter_that_is_not_nothing_at_the_start_is_not_switched_off(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    with pytest.raises(RecipeError, match="init_lora_weights: pissa"):
        trainer(tmp_path, pairs(2), peft_config=config, reference_kind="adapter")


def test_an_init_that_cannot_be_read_back_is_refused(tmp_path: Path, base: Path) -> None:
    """PiSSA by randomised SVD takes another part out of the base at every load: seen here 1 nat and more apart."""
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_4")
    with pytest.raises(ModelError, match="pissa_niter_4 depends on chance"):
        trainer(tmp_path, pairs(2), peft_config=config)
    torch.manual_seed(0)
    model = get_peft_model(load_model(str(base)), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="pissa_niter_4 depends on chance"):
        load_model(str(tmp_path / "adapter"))
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(load_model(str(base)), tmp_path / "adapter")
    one = trees()[1].prompt_ids[None]
    with torch.no_grad():
        difference = (again(input_ids=one).logits.log_softmax(-1) - model(input_ids=one).logits.log_softmax(-1)).abs()
    assert difference.max() > 0.1


def test_what_cannot_train_is_refused(tmp_path: Path) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32, num_layers=2)
    with pytest.raises(ModelError, match=r"PROMPT_TUNING|cannot be put on"):
        trainer(tmp_path, pairs(2), peft_config=prompt)
    with pytest.raises(ModelError, match="already carries an adapter"):
        trainer(tmp_path, pairs(2), model=policy(), peft_config=LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(RecipeError, match="target_modules: the model has nothing that 'no_such_layer' names"):
        trainer(tmp_path, pairs(2), peft_config=LoraConfig(r=4, target_modules=["no_such_layer"]))
    merged = policy()
    merged.merge_adapter()
    with pytest.raises(ModelError, match="is merged"):
        trainer(tmp_path, pairs(2), model=merged)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_adapter_the_same_gradients(tmp_path: Path, reentrant: bool) -> None:
    steps = []
    for name, on in (("plain", False), ("checkpointed", True)):
        gradients = Gradients()
        settings: dict[str, Any] = {"gradient_checkpointing": on, "callbacks": [gradients]}
        if on:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        trainer(tmp_path / name, pairs(2), model=policy(), **settings).train()
        steps.append(gradients.steps[0])
    assert steps[0].norm() > 1e-3
    assert relative(steps[1], steps[0]) < 1e-6


@pytest.mark.slow
def test_a_step_without_pairs_is_survived_under_an_adapter(tmp_path: Path) -> None:
    """The empty part hangs on a weight that trains: the head's own is frozen under LoRA."""
    good, bad = pairs(2), [replace(pair, rejected=pair.chosen) for pair in pairs(2)]
    weights: list[torch.Tensor] = []
    run = trainer(tmp_path, [*good, *bad], model=policy(), train_sampling_strategy="sequential", weight_decay=0.1)
    run.add_callback(AfterSteps(lambda _: weights.append(flat_weights(run.model))))
    run.train()
    assert run.all_pair_counts().empty_steps == 1
    assert torch.equal(weights[0], weights[1])


def on_ranks(folder: Path, **settings: Any) -> Any:
    """An adapter that came along, in float64. Five pairs, four a step: in the last step one rank of two reads none."""
    model = policy().double()
    common = {"per_device_train_batch_size": 4, "learning_rate": 1e-1, "optim": "sgd", **settings}
    return trainer(folder, pairs(5), model=model, **common)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Under DDP, whose hooks hang on the parameters that trained when it was put around the model."""
    weights = two_processes("adapter", tmp_path / "two")
    single = on_ranks(tmp_path / "one")
    before = flat_weights(single.model)
    single.train()
    assert relative(flat_weights(single.model), before) > 1e-4
    assert relative(weights, flat_weights(single.model)) < 1e-9
    starts_at_zero(tmp_path / "two")
    assert len(logged(tmp_path / "two")) == 2


# ---- an adapter on the vocabulary ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]], ids=str)
def test_an_adapter_on_head_and_embedding_reads_alike_in_every_layout(targets: list[str], tied: bool) -> None:
    torch.manual_seed(2)
    base = tiny_model(size=replace(SIZE, tie_word_embeddings=tied))
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    plain = get_peft_model(base, config)
    expected = separate_logps(plain, trees())
    grown = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))

    def gradient(logps: torch.Tensor, model: Any) -> torch.Tensor:
        (logps * grown).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    wanted = gradient(expected, plain)
    assert wanted.norm() > 1e-2
    for shared in (True, False):
        ours = copy.deepcopy(plain)
        ours.zero_grad()
        install(ours.get_base_model(), shared=shared)
        parts = trees() if shared else [part for tree in trees() for part in tree.separate()]
        got = ours(packed_rows=[build_row([part]) for part in parts])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert relative(gradient(got, ours), wanted) < 1e-5


# ---- recipes ----


def adapter_on(base: Path, folder: Path) -> Path:
    """An adapter folder that names ``base``, with weights that change the model."""
    torch.manual_seed(4)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, lora_dropout=0.1)
    get_peft_model(load_model(str(base)), config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_folder(tmp_path: Path, base: Path) -> None:
    adapter = adapter_on(base, tmp_path / "adapter")
    assert named_base(adapter) == str(base)
    assert named_base(base) is None
    write_data(tmp_path, records(4))
    result = call("train", write_recipe(tmp_path, adapter))
    assert result.exit_code == 0, result.output
    starts_at_zero(tmp_path / "run")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    # and so does evaluation, of the run's adapter against the one it started from
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["data"] = {"eval": [{"path": "set/pairs.jsonl", "image_root": "set/images"}], "max_tiles": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "evaluate": {}}))
    evaluated = call("evaluate", str(tmp_path / "recipe.yaml"))
    assert evaluated.exit_code == 0, evaluated.output
    found = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())["pairs"]["eval"]
    assert found["eval_pairs"] == 4
    assert found["eval_rewards/margins"] != 0.0


def spoiled(adapter: Path, how: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    first = sorted(weights)[0]
    if how == "base":
        config["base_model_name_or_path"] = "/no/such/base"
    elif how == "unnamed":
        config["base_model_name_or_path"] = None
    elif how == "missing":
        weights.pop(first)
    elif how == "left over":
        weights["base_model.model.stranger.lora_A.weight"] = torch.zeros(4, 4)
    elif how == "shape":
        weights[first] = torch.zeros(4, 7)
    elif how == "targets":
        config["target_modules"] = ["no_such_layer"]
    elif how == "file":
        (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if how != "file":
        save_file(weights, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("base", "is an adapter on the model /no/such/base"),
        ("unnamed", "names no base model"),
        ("missing", "it lacks"),
        ("left over", "has no place in the model for base_model.model.stranger"),
        ("shape", "does not fit its base model"),
        ("targets", "does not fit its base model"),
        ("file", "adapter"),
    ],
)
def test_an_adapter_that_cannot_be_used_gets_one_message(
    tmp_path: Path,
    base: Path,
    how: str,
    words: str,
) -> None:
    adapter = adapter_on(base, tmp_path / "adapter")
    spoiled(adapter, how)
    write_data(tmp_path, records(2))
    recipe = write_recipe(tmp_path, base)
    written = yaml.safe_load(Path(recipe).read_text())
    written["model"]["path"] = str(adapter)
    Path(recipe).write_text(yaml.safe_dump(written))
    result = call("train", recipe)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_an_adapter_folder_and_a_fresh_adapter_are_too_much(tmp_path: Path, base: Path) -> None:
    adapter = adapter_on(base, tmp_path / "adapter")
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, adapter, model={"path": str(adapter), "lora": {"r": 4}}))
    assert result.exit_code == 2
    assert "model.lora" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "q_proj", ["q_proj", "lm_head"]], ids=str)
def test_frozen_parts_get_no_adapter(tmp_path: Path, base: Path, given: Any) -> None:
    """all-linear would adapt the vision tower; what is excluded already stays excluded."""
    lora: dict[str, Any] = (
        {"r": 4} if given is None else {"r": 4, "exclude_modules": given if isinstance(given, list) else f".*{given}"}
    )
    write_data(tmp_path, records(2))
    model = {"freeze": ["vision_tower", "multi_modal_projector"], "lora": lora}
    result = call("train", write_recipe(tmp_path, base, model=model))
    assert result.exit_code == 0, result.output
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert names
    assert not [name for name in names if "vision_tower" in name or "multi_modal_projector" in name]
    assert any("k_proj" in name for name in names)
    assert any("q_proj" in name for name in names) == (given is None)


@pytest.mark.slow
def test_all_linear_reaches_the_vision_tower(tmp_path: Path, base: Path) -> None:
    """The default, as documented; and the head stays as it is."""
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, base, model={"lora": {"r": 4}}))
    assert result.exit_code == 0, result.output
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert any("vision_tower" in name for name in names)
    assert not any("lm_head" in name for name in names)


def test_freezing_a_part_that_is_trained_whole_is_refused() -> None:
    lora = "lora: {modules_to_save: [multi_modal_projector]}"
    text = f"{{model: {{path: x, freeze: [multi_modal_projector], {lora}}}, data: {{train: [a]}}}}"
    with pytest.raises(RecipeError, match=r"model\.freeze freezes multi_modal_projector"):
        lora_config(parse_recipe(text))


@pytest.mark.slow
def test_freezing_parts_of_an_adapter_that_came_along(tmp_path: Path, base: Path) -> None:
    """Neither the reference beside it nor its switching thaws the frozen part of the policy's adapter."""
    adapter = adapter_on(base, tmp_path / "adapter")
    write_data(tmp_path, records(4))
    result = call("train", write_recipe(tmp_path, adapter, model={"path": str(adapter), "freeze": ["vision_tower"]}))
    assert result.exit_code == 0, result.output
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "run"))
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == ("vision_tower" in name), name


# ---- QLoRA ----

HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None


def quantised(size: str) -> dict[str, Any]:
    return {"quantize": size, "lora": {"r": 4, "target_modules": TARGETS}}


def test_quantised_weights_need_an_adapter(tmp_path: Path, base: Path) -> None:
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, base, model={"quantize": "4bit"}))
    assert result.exit_code == 2
    assert "model.quantize: 4bit weights cannot train; add an adapter (model.lora)" in result.output


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_without_bitsandbytes_it_is_named(tmp_path: Path, base: Path) -> None:
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, base, model=quantised("8bit")))
    assert result.exit_code == 2
    assert "model.quantize: it needs bitsandbytes" in result.output


def test_where_bitsandbytes_knows_no_device_its_own_words_are_passed_on(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers raises a bare RuntimeError where bitsandbytes supports none of the machine's devices."""
    from transformers import AutoModelForImageTextToText

    from vlmpo.commands import adapter_settings

    def refuse(*arguments: Any, **keywords: Any) -> None:
        assert keywords["quantization_config"].load_in_4bit
        raise RuntimeError("None of the available devices are supported by the bitsandbytes version you have installed")

    monkeypatch.setattr(adapter_settings, "find_spec", lambda name: object())
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", refuse)
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, base, model=quantised("4bit")))
    assert result.exit_code == 2, result.output
    assert "None of the available devices are supported by the bitsandbytes" in result.output


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("size", ["4bit", "8bit"])
def test_qlora_from_a_recipe(tmp_path: Path, size: str) -> None:
    """The base stays quantised and still, the adapter trains, a resume is bit-equal, the adapter goes on training."""
    wide = replace(SIZE, text_hidden=64, vision_hidden=64)  # bitsandbytes quantises blocks of 64
    tiny_model(size=wide).save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    write_data(tmp_path, records(6))
    settings = {"save_strategy": "steps", "save_steps": 1}
    recipe = write_recipe(tmp_path, tmp_path / "base", model=quantised(size), training=settings)
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    starts_at_zero(tmp_path / "run")
    first, final = logged(tmp_path / "run"), load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert first[-1]["rewards/margins"] != 0.0
    assert len(final) == 12
    for later in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "run" / later)
    resumed = call("train", recipe, "training.resume_from_checkpoint=true")
    assert resumed.exit_code == 0, resumed.output
    again = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in final.items())
    on = call(
        "train",
        recipe,
        "model.lora=null",
        f"model.path={tmp_path / 'run'}",
        f"training.output_dir={tmp_path / 'second'}",
    )
    assert on.exit_code == 0, on.output
    starts_at_zero(tmp_path / "second")
