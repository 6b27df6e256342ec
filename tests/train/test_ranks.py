"""Two processes are one: the same losses, delta and weights as a single one on the same pairs, under DDP and FSDP2.

Everything is in float64 and every bound far below 1e-5: what remains is the order of sums. Weights are compared by what
training changed in them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.commands.test_train import checkpoint, records, write_data, write_recipe  # noqa: F401
from tests.paths import REPO
from tests.ranks import make_trainer
from tests.tiny_models import model as tiny_model
from tests.training import flat_weights, logged
from vlmpo.train.trainer import MPOTrainer

pytestmark = pytest.mark.slow

# The wrapped model must be of these classes: on the CPU accelerate silently makes DDP of FSDP.
CLASS = {"ddp": "DistributedDataParallel", "fsdp": "FSDPModule"}
TIMING = ("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share", "memory_gib")

CLIPPED = {"count": 18, "max_grad_norm": 0.5}  # five steps, all clipped; in the last one rank 1 has no pair
EVALUATED = {"evaluate": 7, "eval_strategy": "steps", "eval_steps": 1}
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "num_train_epochs": 2}
# 16 + 16 + 5 pairs
UNEVEN = {"count": 37, "uneven": True, "max_tiles": 12, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
SUM_EACH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
EXACT: dict[str, dict[str, Any]] = {
    "ddp": CLIPPED,
    "fsdp": {**CLIPPED, "fsdp": True},
    "ddp_static": {**CLIPPED, "ddp_find_unused_parameters": False},
    "fsdp_tied": {**CLIPPED, "fsdp": True, "tied": True},
    "ddp_checkpointing": {"count": 18, "activation_checkpointing": True},
    "ddp_every_second_layer": {
        "count": 18,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"every_n_layers": 2},
    },
    "fsdp_checkpointing": {"count": 18, "fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
    "fsdp_no_wrap": {"count": 18, "fsdp": True, "fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
    "ddp_accumulated": {"count": 21, "mixed": True, **ACCUMULATED},
    "fsdp_accumulated": {"count": 21, "fsdp": True, **ACCUMULATED, **EVALUATED},
    "fsdp_summed_each": {"count": 21, "fsdp": True, **ACCUMULATED, "accelerator_config": {**SUM_EACH}},
    "ddp_evaluated": {**CLIPPED, **EVALUATED},
    "ddp_lora": {"count": 21, "lora": True, **EVALUATED},
    "fsdp_lora_separate": {"count": 21, "lora": True, "fsdp": True, "attention": "separate"},
    "ddp_separate": {"count": 21, "attention": "separate"},
    # Running delta weighs ranks alike, not pairs: one process says the same where all ranks have equally many.
    "ddp_running": {"count": 20, "max_length": None, "reward_shift": "running"},
    "ddp_running_shuffled": {"count": 20, "mixed": True, "reward_shift": "running"},
    "fsdp_running": {"count": 20, "max_length": None, "reward_shift": "running", "fsdp": True},
    "ddp_cached": {"count": 18, "reference_kind": "cache", "num_train_epochs": 2},
    "fsdp_cached": {"count": 18, "reference_kind": "cache", "num_train_epochs": 2, "fsdp": True},
    "ddp_grouped": {"count": 18, "group_by_prompt": 3, "train_sampling_strategy": "random"},
    "ddp_uneven": UNEVEN,
    "fsdp_uneven": {**UNEVEN, "fsdp": True},
    "ddp_in_order": {**UNEVEN, "balance_ranks": False},
    # No rank has a pair in the second step: no weight decay, no momentum.
    "ddp_empty_step": {"count": 18, "unfit": [4, 5, 6, 7], "weight_decay": 0.1},
    "fsdp_empty_step": {"count": 18, "unfit": [4, 5, 6, 7], "weight_decay": 0.1, "fsdp": True},
    "fsdp_sft": {"count": 18, "loss_weights": {"nll": 1.0}, "fsdp": True},
    "fsdp_one_loads": {"count": 18, "fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}, "garbage": True},
    "fsdp_scored_at_start": {"count": 18, "fsdp": True, **EVALUATED, "eval_on_start": True},
}
IN_BF16 = {"bits": 32, "bf16": True}
# What goes bad on which rank, and in which step.
SPOILT: dict[str, dict[str, Any]] = {
    "ddp": {"count": 12, "spoil": [1, "policy", 2]},
    "ddp_none": {"count": 12, "reward_shift": "none", "max_grad_norm": 0.0, "spoil": [0, "gradient", 2]},
    "ddp_accumulated": {"count": 16, "mixed": True, **ACCUMULATED, **IN_BF16, "spoil": [1, "loss", 3]},
    "ddp_lora": {"count": 12, "lora": True, "spoil": [1, "reference", 2]},
    "fsdp": {"count": 12, "fsdp": True, "max_grad_norm": 0.5, "spoil": [1, "policy", 2]},
    "fsdp_sft": {
        "count": 12,
        "fsdp": True,
        "loss_weights": {"nll": 1.0},
        "bits": 32,
        "bf16": True,
        "spoil": [0, "policy", 2],
    },
    "fsdp_lora_accumulated": {"count": 16, "lora": True, "fsdp": True, **ACCUMULATED, "spoil": [1, "reference", 2]},
}
SCORED = {"count": 2, "fsdp": True, "evaluate": 7, "score_only": True}
WORKER_ONLY = ("fsdp", "fsdp_config", "ddp_find_unused_parameters", "garbage", "standins")

Ranks = dict[str, list[dict[str, Any]]]


def torchrun(*arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}"}
    return subprocess.run(
        [*command, *arguments], cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout
    )


def two_processes(folder: Path, runs: dict[str, dict[str, Any]]) -> Ranks:
    """Do the runs with two processes; for each, what either rank knew at its end."""
    named = [{"name": name, **run} for name, run in runs.items()]
    done = torchrun("tests.rank_worker", str(folder), json.dumps(named))
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stderr.txt").write_text(done.stderr)
    return {name: [torch.load(folder / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)] for name in runs}


def events(folder: Path) -> list[dict[str, Any]]:
    """All that was logged, evaluations too, without timing."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines if "train_loss" not in line]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranks]:
    folder = tmp_path_factory.mktemp("two")
    return folder, two_processes(folder, {**EXACT, "scored": SCORED})


def in_one_process(folder: Path, run: dict[str, Any]) -> tuple[MPOTrainer, float]:
    """The same run in this process, which reads both ranks' pairs; and how far its weights went, as a norm."""
    alone = {name: value for name, value in run.items() if name not in WORKER_ONLY}
    alone["per_device_train_batch_size"] = 2 * alone.get("per_device_train_batch_size", 2)
    single = make_trainer(folder, **alone)
    before = flat_weights(single.model).clone()
    single.train()
    return single, float((flat_weights(single.model) - before).norm())


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return two_processes(tmp_path_factory.mktemp("spoilt"), SPOILT)


@pytest.mark.parametrize("name", SPOILT)
def test_a_number_that_is_not_finite_on_one_rank_ends_all_with_one_message(spoilt: Ranks, name: str) -> None:
    first, second = spoilt[name]
    _, what, step = SPOILT[name]["spoil"]
    assert first["error"] == second["error"]
    assert (first["met_by"], second["met_by"]) == ("all", "all")
    assert (first["moved"], second["moved"]) == (False, False)
    head, *lines = first["error"].splitlines()
    assert head.startswith(f"step {step}: ")
    told = {
        "policy": "log-probs of the policy are not finite in",
        "reference": "log-probs of the reference are not finite in",
        "loss": "the loss is not finite (loss, sigmoid)",
        "gradient": "the gradient is not finite, though loss and log-probs are",
    }
    assert told[what] in head
    named = [line.split(":")[1] for line in lines if line.startswith("  memory:")]
    assert len(set(named)) == len(named) >= 3  # of both ranks (one pair of the skewed ones is too long)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_equal_one(tmp_path: Path, exact: tuple[Path, Ranks], name: str) -> None:
    folder, found = exact
    ranks = found[name]
    single, moved = in_one_process(tmp_path, EXACT[name])
    for rank in ranks:
        assert CLASS[name.partition("_")[0]] in rank["wrapper"]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert float((ranks[0]["weights"] - flat_weights(single.model)).norm()) < 1e-10 * moved
    assert ranks[0]["shift"] == ranks[1]["shift"]
    expected = single.reward_shift.state_dict()
    assert ranks[0]["shift"]["count"] == expected["count"]
    assert ranks[0]["shift"]["sum"] == pytest.approx(expected["sum"], rel=1e-10, abs=1e-12)
    assert ranks[0]["accounts"] == single.all_pair_counts().to_json()
    mine, others = events(folder / name), events(tmp_path)
    assert len(mine) == len(others)
    for line, other in zip(mine, others, strict=True):
        assert line == pytest.approx(other, rel=1e-6, abs=1e-10)  # `loss` is added up by transformers in float32


def loads(ranks: list[dict[str, Any]], costs: list[int]) -> list[list[int]]:
    """What the pairs of each optimizer step cost, by rank. The last one is short: two micro-batches, not four."""
    steps = [slice(0, 4), slice(4, 8), slice(8, 10)]
    return [[sum(costs[pair] for batch in rank["batches"][at] for pair in batch) for rank in ranks] for at in steps]


@pytest.mark.parametrize("name", ["ddp_uneven", "fsdp_uneven"])
def test_ranks_have_equal_work(exact: tuple[Path, Ranks], name: str) -> None:
    """The test above compares these runs with one process; here: who read what, and what it cost."""
    folder, found = exact
    even, plain = found[name], found["ddp_in_order"]
    costs = even[0]["costs"]
    assert costs == even[1]["costs"]
    assert plain[0]["costs"] is None
    assert sorted(pair for rank in even for batch in rank["batches"] for pair in batch) == list(range(37))
    assert max(costs) > 3 * min(costs)  # the pairs are uneven
    for mine, other in zip(loads(even, costs), loads(plain, costs), strict=True):
        assert sum(mine) == sum(other)  # the same pairs
        assert max(mine) < 1.04 * min(mine)
    lags = [[2 * max(step) / sum(step) for step in loads(run, costs)] for run in (even, plain)]
    told = "ranks: the heaviest has {:.2f} times the mean work of a step ({:.2f} in plain order)"
    assert told.format(*(sum(each) / len(each) for each in lags)) in (folder / "stderr.txt").read_text()
    assert sum(lags[0]) / 3 < 1.01
    assert sum(lags[1]) / 3 > 1.25


def test_running_delta_and_sequential_order_stay_as_they_are(exact: tuple[Path, Ranks]) -> None:
    _, found = exact
    for name in ("ddp", "ddp_running", "ddp_running_shuffled"):
        assert found[name][0]["costs"] is None
    assert found["ddp_grouped"][0]["costs"] is not None


def test_the_last_part_of_a_step_trains_what_only_the_first_rank_saw(exact: tuple[Path, Ranks]) -> None:
    """Five steps, every gradient clipped: the test above compares a run in which that happens."""
    folder, _ = exact
    steps = logged(folder / "fsdp")
    assert len(steps) == 5
    assert all(step["grad_norm"] > 0.5 for step in steps)


def test_the_reference_is_sharded_and_known_by_the_same_hash(exact: tuple[Path, Ranks], tmp_path: Path) -> None:
    _, found = exact
    single = make_trainer(tmp_path, 2)
    assert single.reference is not None
    for name in ("ddp", "fsdp", "fsdp_no_wrap", "fsdp_one_loads"):
        for rank in found[name]:
            assert rank["reference"] == single.reference.weights_hash()
            assert ("FSDPModule" in rank["reference_wrapper"]) == name.startswith("fsdp")
    assert "NoneType" in found["fsdp_lora_separate"][0]["reference_wrapper"]  # the policy itself, its adapter off


def test_an_evaluation_changes_nothing(exact: tuple[Path, Ranks]) -> None:
    _, found = exact
    for plain, evaluated in zip(found["ddp"], found["ddp_evaluated"], strict=True):
        assert torch.equal(plain["weights"], evaluated["weights"])
        assert plain["shift"] == evaluated["shift"]


def test_scored_without_training(tmp_path: Path, exact: tuple[Path, Ranks]) -> None:
    """Sharded only to be scored, the policy gives the figures of one process. Trained it cannot be: that is said."""
    _, found = exact
    expected = make_trainer(tmp_path, 2, evaluate=7).evaluate()
    for rank in found["scored"]:
        assert rank["metrics"] == pytest.approx(expected, rel=1e-12)
        assert rank["metrics"]["eval_rewards/margins"] == 0.0
        assert "set training.eval_on_start: true" in rank["refused"]


def test_out_of_step_ranks_are_found_out(tmp_path: Path) -> None:
    """Negative control: without the idle images the ranks' collectives no longer meet."""
    run = {"name": "broken", **CLIPPED, "fsdp": True, "out_of_step": True}
    with contextlib.suppress(subprocess.TimeoutExpired):  # or they wait for each other for ever
        assert torchrun("tests.rank_worker", str(tmp_path), json.dumps([run]), timeout=60).returncode != 0


SAVED = {"save_strategy": "steps", "save_steps": 2}
SHARDS = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
WHOLE: dict[str, dict[str, Any]] = {
    "ddp": {"count": 21, "mixed": True, **ACCUMULATED, **SAVED},
    "fsdp": {"count": 21, "fsdp": True, "lr_scheduler_type": "cosine", **ACCUMULATED, **SAVED},
    "fsdp_shards": {"count": 21, **SHARDS, **SAVED, "optim": "adamw_torch", "optim_args": ""},
    "fsdp_lora": {"count": 21, "lora": True, "fsdp": True, **SAVED},
    "fsdp_lora_shards": {"count": 21, "lora": True, **SHARDS, **SAVED},
}
BEST = {"save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "eval_loss", "greater_is_better": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranks]:
    folder = tmp_path_factory.mktemp("saved")
    runs: dict[str, dict[str, Any]] = {}
    for name, run in WHOLE.items():
        runs[name] = {**run, "save": True}
        runs[f"{name}_resumed"] = {**run, "resume": [name, 4]}
    for name, wrapper in (("ddp", {}), ("fsdp", {"fsdp": True}), ("shards", SHARDS)):
        runs[f"best_{name}"] = {"count": 18, **wrapper, **EVALUATED, **BEST, "load_best_model_at_end": True}
    runs["first_step"] = {"count": 18, "max_steps": 1}
    runs["bf16"] = {"count": 18, "bits": 32, "bf16": True, "fsdp": True}
    return folder, two_processes(folder, runs)


@pytest.mark.parametrize("name", WHOLE)
def test_resumed_under_two_ranks(saved: tuple[Path, Ranks], name: str) -> None:
    """To the bit, and it did go on from the checkpoint: the fewer steps say so."""
    folder, found = saved
    for whole, resumed in zip(found[name], found[f"{name}_resumed"], strict=True):
        assert resumed["steps"] == whole["steps"] - 4 > 0
        assert torch.equal(whole["weights"], resumed["weights"])
        assert whole["shift"] == resumed["shift"]
        assert whole["accounts"] == resumed["accounts"]
        assert CLASS[name.partition("_")[0]] in resumed["wrapper"]
        assert resumed["batches"] == whole["batches"]
        assert (resumed["costs"] is not None) == (name == "ddp")  # shuffled, and stopped in mid-epoch
    assert events(folder / name) == events(folder / f"{name}_resumed")


@pytest.mark.parametrize("name", WHOLE)
def test_the_final_folder_holds_the_whole_model(saved: tuple[Path, Ranks], name: str) -> None:
    from transformers import AutoModelForImageTextToText

    folder, found = saved
    final = folder / name / "final"
    if WHOLE[name].get("lora"):
        loaded: Any = PeftModel.from_pretrained(tiny_model(dtype=torch.float64), final, autocast_adapter_dtype=False)
    else:
        loaded = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float64)
    assert torch.equal(flat_weights(loaded), found[name][0]["weights"])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "shards"])
def test_the_best_checkpoint_is_taken_back(saved: tuple[Path, Ranks], name: str) -> None:
    """The highest loss is called best here: that of the first step."""
    _, found = saved
    difference = found[f"best_{name}"][0]["weights"] - found["first_step"][0]["weights"]
    assert float(difference.norm()) < 1e-14 * float(found["first_step"][0]["weights"].norm())
    assert float((difference - found["first_step"][0]["weights"]).norm()) > 1.0
    assert found[f"best_{name}"][0]["steps"] == 5


def test_bf16_under_fsdp_starts_from_the_reference(saved: tuple[Path, Ranks], tmp_path: Path) -> None:
    """Rewards are 0 to the bit before the first update; five later the weights are float32's but for rounding."""
    folder, found = saved
    first = logged(folder / "bf16")[0]
    assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]) == (0.0, 0.0, 0.0)
    assert first["loss/sigmoid"] == pytest.approx(math.log(2), rel=1e-6)
    single, moved = in_one_process(tmp_path, {"count": 18, "bits": 32})
    assert float((found["bf16"][0]["weights"] - flat_weights(single.model)).norm()) < 0.05 * moved


def test_a_bad_record_on_one_rank_ends_the_job(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    """The job ends with code 2 and one message, though rank 1 alone met the record; no rank waits for it."""
    lines = records(8)
    lines[3]["chosen"] = "red " * 500
    write_data(tmp_path, lines)
    training = {"train_sampling_strategy": "sequential", "ddp_backend": "gloo"}
    recipe = write_recipe(
        tmp_path, checkpoint, training=training, data={"on_bad_record": "fail", "max_length": 300, "over_long": "drop"}
    )
    done = torchrun("vlmpo", "train", recipe, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "pairs.jsonl:4: prompt and response take" in done.stderr
    assert "error on rank" not in done.stderr
    assert "vlmpo/cli.py" not in done.stderr  # no traceback of ours; torchrun's own comes after
    root_cause = done.stderr.partition("Root Cause")[2]
    assert "exitcode  : 2 " in root_cause  # torchrun's own code is always 1


# What is damaged in the newest checkpoint or in all, of which a rank's own file is one.
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "shards": {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
}
DAMAGED = {"ddp": "rng_state_1.pth", "fsdp": "optimizer.bin", "shards": "pytorch_model_fsdp_0/__1_0.distcp"}


def test_one_damaged_shard_is_found_by_all_ranks(tmp_path: Path) -> None:
    """The sound checkpoint before it is used; without one every rank has the same error."""
    runs: dict[str, dict[str, Any]] = {}
    for name, wrapper in LAYOUTS.items():
        run = {"count": 8, "save_strategy": "steps", "save_steps": 1, **wrapper}
        runs |= {name: run}
        for kind, steps in (("newest", [2]), ("all", [1, 2])):
            runs[f"{name}_{kind}"] = {**run, "resume": [name, 2], "damage": [DAMAGED[name], steps]}
    found = two_processes(tmp_path, runs)
    said = (tmp_path / "stderr.txt").read_text()
    for name, file in DAMAGED.items():
        for whole, resumed in zip(found[name], found[f"{name}_newest"], strict=True):
            assert resumed["steps"] == 1
            assert torch.equal(whole["weights"], resumed["weights"])
        newest = tmp_path / f"{name}_newest" / "checkpoint-2"
        assert said.count(f"{newest} is damaged: {file} has changed. Going on from") == 1
        first, second = (rank["refused"] for rank in found[f"{name}_all"])
        assert first == second
        assert all(f"checkpoint-{step} is damaged: {file} has changed" in first for step in (1, 2))


@pytest.mark.long
def test_ranks_that_find_no_sound_checkpoint_end_with_one_message(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(4))
    training = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 1}
    recipe = write_recipe(tmp_path, checkpoint, training=training)
    command = ("vlmpo", "train", recipe, "training.resume_from_checkpoint=true")
    started = torchrun(*command, timeout=120)
    assert started.returncode == 0, started.stderr[-3000:]
    run = tmp_path / "run"
    (run / "checkpoint-1" / "rng_state_1.pth").write_bytes(b"")
    done = torchrun(*command, "training.max_steps=2", timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert f"can be gone on from: {run / 'checkpoint-1'} is damaged: rng_state_1.pth has 0 bytes" in done.stderr
    assert "error on rank" not in done.stderr
    assert "vlmpo/cli.py" not in done.stderr
    assert "exitcode  : 2 " in done.stderr.partition("Root Cause")[2]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.learning_rate=1e12", "step 2: log-probs of the policy are not finite in 4 of its 4 pairs"),
        pytest.param(
            "data.max_length=20",
            "nothing to train on: none of the 8 pairs can be used (8 over_long)",
            marks=pytest.mark.long,
        ),
        ("model.path=damaged", "weight lm_head.weight has 1 non-finite values"),
    ],
)
def test_what_ends_a_run_ends_all_ranks_with_one_message(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    override: str,
    told: str,
) -> None:
    write_data(tmp_path, records(8))
    recipe = write_recipe(tmp_path, checkpoint, training={"ddp_backend": "gloo"})
    if "damaged" in override:
        shutil.copytree(checkpoint, tmp_path / "damaged")
        weights = load_file(tmp_path / "damaged" / "model.safetensors")
        next(weight for name, weight in weights.items() if name.endswith("lm_head.weight"))[0, 0] = math.nan
        save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
        override = f"model.path={tmp_path / 'damaged'}"
    done = torchrun("vlmpo", "train", recipe, override, timeout=120)
    assert done.stderr.count("error: ") == 1, done.stderr
    assert told in done.stderr
    assert "error on rank" not in done.stderr
    assert "vlmpo/cli.py" not in done.stderr
    assert "exitcode  : 2 " in done.stderr.partition("Root Cause")[2]
    assert not list((tmp_path / "run").glob("*.safetensors"))
