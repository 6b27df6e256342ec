"""MPOTrainer: exact start, independence of the batch layout, rewards, delta, supervised fine-tuning, bad records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.tiny_models import model as tiny_model
from tests.tiny_models import processor, random_pair
from tests.training import Gradients, config, flat_weights, logged, pairs, relative, trainer
from vlmpo import MPOConfig, MPOTrainer
from vlmpo.errors import RecipeError, RecordError
from vlmpo.train.memory_choice import row_tokens
from vlmpo.train.reference import AdapterReference, CopyReference
from vlmpo.tree.layout import build_row

pytestmark = pytest.mark.slow

START = 0.8 * math.log(2) + 0.2 * 2 * math.log(2)


def test_rows_are_bounded_by_what_suits_the_device(tmp_path):
    assert MPOConfig(str(tmp_path), use_cpu=True).max_tokens_per_row == "auto"
    assert MPOConfig(str(tmp_path), use_cpu=True, max_tokens_per_row=90).max_tokens_per_row == 90
    assert MPOConfig(str(tmp_path), use_cpu=True, max_tokens_per_row=None).max_tokens_per_row is None
    assert row_tokens("cuda") == 16384


def test_first_step_is_exactly_the_expected_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = trainer(tmp_path, pairs(4), per_device_train_batch_size=4)
    run.train()
    (first,) = logged(tmp_path)
    assert first["rewards/chosen"] == 0.0
    assert first["rewards/rejected"] == 0.0
    assert first["rewards/margins"] == 0.0
    assert first["rewards/accuracies"] == 0.0  # a tie is not right
    assert first["loss/sigmoid"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["loss/bco_pair"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert first["loss"] == pytest.approx(START + first["loss/nll"], rel=1e-6)
    assert first["start/expected_loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert "expected 0.8318 + nll" in capsys.readouterr().err
    assert isinstance(run.reference, CopyReference)


def test_every_promised_metric_is_logged(tmp_path: Path) -> None:
    trainer(tmp_path, pairs(4)).train()
    promised = (
        "step epoch loss loss/sigmoid loss/bco_pair loss/nll rewards/chosen rewards/rejected rewards/margins "
        "rewards/accuracies reward_shift logps/chosen logps/rejected grad_norm learning_rate step_seconds "
        "pairs_per_second tokens_per_second data_wait_share memory_gib"
    )
    for line in logged(tmp_path):
        assert set(promised.split()) <= line.keys()
        assert all(math.isfinite(line[name]) for name in promised.split())


@pytest.mark.parametrize(
    ("reward_shift", "nll_reduction"),
    [
        *(("previous", "sequence"), ("none", "token")),
        *(pytest.param(*each, marks=pytest.mark.long) for each in (("previous", "token"), ("none", "sequence"))),
    ],
)
def test_the_batch_layout_changes_nothing(tmp_path: Path, reward_shift: str, nll_reduction: str) -> None:
    """The same 8 pairs a step as 8x1, 4x2, 2x4, 1x8, as one row or many, shared or separate: two steps in float64."""
    layouts = {
        "8x1 in one row": {"per_device_train_batch_size": 8, "max_tokens_per_row": None},
        "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "8x1 in many rows": {"per_device_train_batch_size": 8, "max_tokens_per_row": 90},
        "8x1 in separate rows": {"per_device_train_batch_size": 8, "attention": "separate"},
    }
    found = {}
    for name, layout in layouts.items():
        gradients, folder = Gradients(), tmp_path / name
        settings = {"reward_shift": reward_shift, "nll_reduction": nll_reduction, "callbacks": [gradients], **layout}
        run = trainer(folder, pairs(16), dtype=torch.float64, **settings)
        run.train()
        assert len(gradients.steps) == 2
        found[name] = (gradients.steps, logged(folder), flat_weights(run.model), run.reward_shift.value)
    steps, logs, weights, delta = found.pop("8x1 in one row")
    assert (abs(delta) > 1e-6) == (reward_shift == "previous")
    for name, (other_steps, other_logs, other_weights, other_delta) in found.items():
        for mine, theirs in zip(other_steps, steps, strict=True):
            assert relative(mine, theirs) < 1e-6, name
        for mine, theirs in zip(other_logs, logs, strict=True):
            for key in ("loss", "loss/sigmoid", "loss/bco_pair", "loss/nll", "logps/chosen", "logps/rejected"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-6), (name, key)
        assert relative(other_weights, weights) < 1e-6, name
        assert other_delta == pytest.approx(delta, rel=1e-6), name


def test_previous_delta_is_the_mean_of_all_earlier_rewards(tmp_path: Path) -> None:
    trainer(tmp_path, pairs(10), num_train_epochs=2, learning_rate=3e-3).train()
    lines = logged(tmp_path)
    assert len(lines) == 10
    rewards = [(line["rewards/chosen"] + line["rewards/rejected"]) / 2 for line in lines]
    for index, line in enumerate(lines):  # two pairs in every step: the mean of means is the mean
        assert line["reward_shift"] == pytest.approx(sum(rewards[: index + 1]) / (index + 1), abs=1e-6)
    assert abs(lines[-1]["reward_shift"]) > 1e-3
    # what the logged loss used is delta BEFORE the step: bco by hand needs each pair, so one pair a step
    single = tmp_path / "single"
    trainer(single, pairs(4), per_device_train_batch_size=1, learning_rate=3e-3).train()
    before = 0.0
    for line in logged(single):
        expected = math.log1p(math.exp(-(line["rewards/chosen"] - before)))
        expected += math.log1p(math.exp(line["rewards/rejected"] - before))
        assert line["loss/bco_pair"] == pytest.approx(expected, abs=1e-5)
        before = line["reward_shift"]


def test_running_delta_takes_in_each_micro_batch_before_its_loss(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 1, "reward_shift": "running", "learning_rate": 3e-3}
    trainer(tmp_path, pairs(5), **settings).train()
    means: list[float] = []
    for line in logged(tmp_path):
        means.append((line["rewards/chosen"] + line["rewards/rejected"]) / 2)
        delta = sum(means) / len(means)
        assert line["reward_shift"] == pytest.approx(delta, abs=1e-6)
        expected = math.log1p(math.exp(-(line["rewards/chosen"] - delta)))
        expected += math.log1p(math.exp(line["rewards/rejected"] - delta))
        assert line["loss/bco_pair"] == pytest.approx(expected, abs=1e-5)
    assert abs(means[-1]) > 1e-3


def test_running_counts_a_micro_batch_once_however_many_rows(tmp_path: Path) -> None:
    values = []
    for name, rows in (("one", None), ("many", 60)):
        run = trainer(
            tmp_path / name, pairs(8), per_device_train_batch_size=4, reward_shift="running", max_tokens_per_row=rows
        )
        run.train()
        values.append(run.reward_shift.state_dict())
    assert values[0]["count"] == values[1]["count"] == 2
    assert values[1]["sum"] == pytest.approx(values[0]["sum"], abs=1e-5)


def test_supervised_fine_tuning_is_the_corner_case(tmp_path: Path) -> None:
    """{nll: 1}: no reference, no rejected response, no rewards; the loss is the model's own cross entropy."""
    data = [replace(pair, rejected=None) for pair in pairs(3)]
    run = trainer(tmp_path, data, per_device_train_batch_size=3, loss_weights={"nll": 1.0})
    assert run.reference is None
    expected = []
    for pair in data:
        encoded = run.encoder.encode(pair)
        assert encoded.rejected_ids is None
        ids = torch.cat([encoded.prompt_ids, encoded.chosen_ids])[None]
        labels = ids.clone()
        labels[0, : encoded.prompt_ids.numel()] = -100
        expected.append(tiny_model()(input_ids=ids, labels=labels, **encoded.vision).loss.item())
    run.train()
    (line,) = logged(tmp_path)
    assert line["loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert not [key for key in line if key.startswith("rewards") or key in ("reward_shift", "logps/rejected")]


@pytest.mark.parametrize("weights", [{"sigmoid": 1.0}, {"bco_pair": 1.0}, {"sigmoid": 1.0, "nll": 1.0}])
def test_subsets_of_terms(tmp_path: Path, weights: dict) -> None:
    trainer(tmp_path, pairs(4), loss_weights=weights).train()
    for line in logged(tmp_path):
        terms = {key.removeprefix("loss/"): line[key] for key in line if key.startswith("loss/")}
        assert terms.keys() == weights.keys()
        assert line["loss"] == pytest.approx(sum(weights[name] * value for name, value in terms.items()), rel=1e-5)


def test_lora_reference_is_the_adapter_switched_off(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=True)
    base = tiny_model()
    run = trainer(tmp_path, pairs(6), model=base, peft_config=adapter, learning_rate=1e-2)
    assert isinstance(run.reference, AdapterReference)
    assert adapter.lora_dropout == 0.0
    run.train()
    lines = logged(tmp_path)
    assert lines[0]["rewards/chosen"] == 0.0
    assert lines[0]["rewards/rejected"] == 0.0
    assert lines[-1]["rewards/margins"] != 0.0
    fresh = {k.replace(".base_layer.", "."): v for k, v in run.model.get_base_model().state_dict().items()}
    for name, weight in tiny_model().state_dict().items():
        assert torch.equal(fresh[name], weight), name  # the reference never moved


def test_adapter_that_came_with_the_policy_stays_in_the_reference(tmp_path: Path) -> None:
    from peft import get_peft_model

    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    run = trainer(tmp_path, pairs(2), model=policy)
    assert isinstance(run.reference, AdapterReference)
    assert run.reference.frozen == "reference"  # test_adapters.py has the rest
    run.train()
    assert logged(tmp_path)[0]["rewards/chosen"] == 0.0


def test_contradictory_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="carries none"):
        trainer(tmp_path, pairs(2), reference_kind="adapter")


def test_a_given_reference_is_used(tmp_path: Path) -> None:
    run = trainer(tmp_path, pairs(2), ref_model=tiny_model(seed=1))
    run.train()
    assert abs(logged(tmp_path)[0]["rewards/chosen"]) > 1e-3


def test_dropout_is_off_in_policy_and_reference(tmp_path: Path) -> None:
    noisy = tiny_model()
    for layer in noisy.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    noisy.model.vision_tower.encoder.layer[0].dropout.p = 0.5
    trainer(tmp_path, pairs(2), model=noisy).train()
    assert logged(tmp_path)[0]["rewards/chosen"] == 0.0


def test_bf16_autocast_starts_at_zero_rewards_too(tmp_path: Path) -> None:
    trainer(tmp_path, pairs(2), bf16=True).train()
    (line,) = logged(tmp_path)
    assert line["rewards/chosen"] == 0.0
    assert line["rewards/rejected"] == 0.0
    assert line["loss"] == pytest.approx(START + line["loss/nll"], rel=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    steps = []
    for name, on in (("plain", False), ("checkpointed", True)):
        gradients = Gradients()
        trainer(tmp_path / name, pairs(2), gradient_checkpointing=on, callbacks=[gradients]).train()
        steps.append(gradients.steps[0])
    assert relative(steps[1], steps[0]) < 1e-6


BAD = {
    "over_long": replace(random_pair(90), chosen="red " * 400, origin="a.jsonl:7"),
    "empty_response": replace(random_pair(91), rejected="  ", origin="a.jsonl:8"),
    "identical": replace(random_pair(92), rejected=random_pair(92).chosen, origin="a.jsonl:9"),
    "missing_image": replace(random_pair(93), images=("no/such/image.png",), origin="a.jsonl:10"),
}


@pytest.mark.parametrize("reason", list(BAD))
def test_bad_records_are_dropped_and_counted(tmp_path: Path, reason: str, capsys: pytest.CaptureFixture) -> None:
    good = pairs(4)
    run = trainer(tmp_path, [*good, BAD[reason]], max_length=300, num_train_epochs=2)
    run.train()
    accounts = run.all_pair_counts()
    assert accounts.used.total() == 4
    assert accounts.reasons() == {reason: 1}
    assert BAD[reason].origin in capsys.readouterr().err
    assert BAD[reason].origin in accounts.examples[reason][0]


@pytest.mark.parametrize("reason", list(BAD))
def test_bad_records_stop_the_run_when_asked(tmp_path: Path, reason: str) -> None:
    run = trainer(tmp_path, [BAD[reason]], max_length=300, on_bad_record="fail", per_device_train_batch_size=1)
    with pytest.raises(RecordError, match=rf"{BAD[reason].origin}: .*\[{reason}\]"):
        run.train()


def test_a_dropped_pair_leaves_the_loss_of_the_others(tmp_path: Path) -> None:
    """The denominators count pairs that are there: the same gradient as without the bad one."""
    steps = []
    for name, data in (("with", [*pairs(3), BAD["identical"]]), ("without", pairs(3))):
        gradients = Gradients()
        trainer(tmp_path / name, data, per_device_train_batch_size=4, callbacks=[gradients]).train()
        steps.append(gradients.steps[0])
    assert relative(steps[0], steps[1]) < 1e-5


def test_workers_read_the_same(tmp_path: Path) -> None:
    weights = []
    for name, workers in (("none", 0), ("two", 2)):
        run = trainer(tmp_path / name, pairs(6), dataloader_num_workers=workers)
        run.train()
        weights.append(flat_weights(run.model))
    assert torch.equal(weights[0], weights[1])


def test_evaluation_touches_nothing_of_training(tmp_path: Path) -> None:
    runs = []
    for name, extra in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1})):
        run = trainer(tmp_path / name, pairs(8), eval_dataset=pairs(4, first=50), learning_rate=3e-3, **extra)
        run.train()
        runs.append(run)
    assert torch.equal(flat_weights(runs[0].model), flat_weights(runs[1].model))
    assert runs[0].reward_shift.state_dict() == runs[1].reward_shift.state_dict()
    assert abs(runs[0].reward_shift.value) > 1e-3
    assert [line["loss"] for line in logged(tmp_path / "with")] == [
        line["loss"] for line in logged(tmp_path / "without")
    ]


def test_evaluation_metrics_by_hand(tmp_path: Path) -> None:
    """Rewards and loss recomputed from separate forwards of policy and reference."""
    held_out = [replace(pair, source=("a", "b")[i % 2]) for i, pair in enumerate(pairs(5, first=50))]
    run = trainer(tmp_path, pairs(4), eval_dataset=held_out, learning_rate=3e-3, per_device_eval_batch_size=3)
    run.train()
    metrics = run.evaluate()
    reference, policy = tiny_model(), tiny_model()
    policy.load_state_dict(run.model.state_dict())
    rewards: list[tuple[float, float]] = []
    nll = []
    for pair in held_out:
        encoded = run.encoder.encode(pair)
        scores = []
        for response in (encoded.chosen_ids, encoded.rejected_ids):
            ids = torch.cat([encoded.prompt_ids, response])[None]
            at = encoded.prompt_ids.numel() - 1
            with torch.no_grad():
                logps = [
                    m(input_ids=ids, **encoded.vision)
                    .logits[0, at:-1]
                    .log_softmax(-1)
                    .gather(1, response[:, None])
                    .sum()
                    for m in (policy, reference)
                ]
            scores.append((float(logps[0]), float(logps[1])))
        rewards.append((0.1 * (scores[0][0] - scores[0][1]), 0.1 * (scores[1][0] - scores[1][1])))
        nll.append(-scores[0][0] / encoded.chosen_ids.numel())
    assert metrics["eval_pairs"] == 5
    assert metrics["eval_rewards/accuracies"] == sum(c > r for c, r in rewards) / 5
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(c - r for c, r in rewards) / 5, abs=1e-5)
    assert metrics["eval_loss/nll"] == pytest.approx(sum(nll) / 5, rel=1e-5)
    sigmoid = sum(math.log1p(math.exp(-(c - r))) for c, r in rewards) / 5
    assert metrics["eval_loss/sigmoid"] == pytest.approx(sigmoid, abs=1e-5)
    own = [rewards[i] for i in (0, 2, 4)]
    assert metrics["eval_rewards/accuracies/a"] == sum(c > r for c, r in own) / 3
    assert metrics["eval_pairs/b"] == 2
    lengths = [(run.encoder.encode(p).chosen_ids.numel(), run.encoder.encode(p).rejected_ids.numel()) for p in held_out]
    assert metrics["eval_lengths/chosen"] == pytest.approx(sum(chosen for chosen, _ in lengths) / 5)
    assert metrics["eval_lengths/rejected"] == pytest.approx(sum(rejected for _, rejected in lengths) / 5)
    similar = [reward for reward, (c, r) in zip(rewards, lengths, strict=True) if min(c, r) >= 0.8 * max(c, r)]
    assert metrics["eval_pairs_similar_length"] == len(similar) > 0
    assert metrics["eval_rewards/accuracies_similar_length"] == sum(c > r for c, r in similar) / len(similar)
    low, high = metrics["eval_rewards/accuracies_low"], metrics["eval_rewards/accuracies_high"]
    assert 0.0 <= low <= metrics["eval_rewards/accuracies"] <= high <= 1.0


def test_the_final_model_reloads_and_generates_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    run = trainer(tmp_path, pairs(2))
    run.train()
    run.save_model(str(tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor())
    prompt = run.encoder.encode(pairs(1)[0])
    arguments = {"input_ids": prompt.prompt_ids[None], **prompt.vision, "max_new_tokens": 5, "do_sample": False}
    assert model.generate(**arguments).tolist() == run.model.generate(**arguments).tolist()


def test_start_up_check_falls_back_where_shared_rows_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Positions that go on after the sibling: caught on the first pair, and the run is that of separate rows."""
    from vlmpo.tree import layout

    def broken(trees: list) -> object:
        row = build_row(trees)
        return replace(row, position_ids=torch.arange(row.layout.num_tokens)[None])

    separate = trainer(tmp_path / "separate", pairs(4), attention="separate")
    separate.train()
    assert "NOT sharing" not in capsys.readouterr().err
    monkeypatch.setattr(layout, "build_row", broken)
    fallen = trainer(tmp_path / "fallen", pairs(4))
    fallen.train()
    assert "NOT sharing the prompt between responses: on memory:0" in capsys.readouterr().err
    assert not fallen.shared
    for mine, other in zip(logged(tmp_path / "fallen"), logged(tmp_path / "separate"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert relative(flat_weights(fallen.model), flat_weights(separate.model)) < 1e-6


def test_one_process_uses_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not all of them by DataParallel, whose replicas would each read all rows."""
    settings = config(tmp_path)
    settings._n_gpu = 3  # as on a machine with three, without torchrun
    run = MPOTrainer(model=tiny_model(), args=settings, train_dataset=pairs(2), processing_class=processor())
    run.train()
    assert not isinstance(run.model_wrapped, torch.nn.DataParallel)
    assert "one of 3 GPUs is used; to use all, start with torchrun --nproc_per_node 3" in " ".join(
        capsys.readouterr().err.split()
    )
