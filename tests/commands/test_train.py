"""``vlmpo train`` from recipe to run folder, on files as a user has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from typer.testing import CliRunner

from tests.fused_standins import FUNCTIONS, wrong
from tests.tiny_models import model, noise_image, processor, random_pair
from tests.training import logged
from vlmpo.cli import app
from vlmpo.train import kernel_choice
from vlmpo.train.checkpoint import STATE_FILE
from vlmpo.train.trainer import MPOTrainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def records(count: int) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        pair = random_pair(seed)
        question = pair.prompt[0].text.removeprefix("<image>\n")
        found.append(
            {"image": f"{seed % 4}.png", "question": question, "chosen": pair.chosen, "rejected": pair.rejected}
        )
    return found


def write_data(folder: Path, lines: list[Any]) -> None:
    """An MMPR data set in ``folder``: four images, one annotation file (strings are written as they are)."""
    (folder / "set" / "images").mkdir(parents=True)
    for seed in range(4):
        noise_image(60 + 20 * seed, 60, seed).save(folder / "set" / "images" / f"{seed}.png")
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "set" / "pairs.jsonl").write_text(text)
    entry = {"root": "set/images", "annotation": "set/pairs.jsonl", "repeat_time": 1, "length": len(lines)}
    (folder / "set" / "meta.json").write_text(json.dumps({"noise": entry}))


def write_recipe(folder: Path, checkpoint: Path, **changes: Any) -> str:
    recipe: dict[str, Any] = {
        "model": {"path": str(checkpoint)},
        "data": {"train": ["set/meta.json"], "max_tiles": 2},
        "training": {
            "output_dir": str(folder / "run"),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    for section, keys in changes.items():
        recipe[section] = recipe.get(section, {}) | keys
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return str(file)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "manifest.json").read_text())


@pytest.mark.slow
def test_a_run_leaves_its_folder_whole(tmp_path: Path, checkpoint: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmpo.recipe_yaml import load_recipe

    write_data(tmp_path, records(6))
    recipe = write_recipe(tmp_path, checkpoint, data={"eval": ["set/pairs.jsonl"]}, training={"seed": 5})
    recipe_eval = yaml.safe_load(Path(recipe).read_text())
    recipe_eval["data"]["eval"] = [{"path": "set/pairs.jsonl", "image_root": "set/images"}]
    Path(recipe).write_text(yaml.safe_dump(recipe_eval))
    result = call("train", recipe, "loss.beta=0.2")
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    lines = logged(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    written = manifest(tmp_path)
    assert written["status"] == "finished"
    assert written["seed"] == 5
    assert written["data"]["sets"] == {"noise": {"read": 6, "used": 6, "held_out": 0, "dropped": {}, "not_reached": 0}}
    assert len(written["reference_hash"]) == 32
    assert written["versions"]["vlmpo"]
    assert list(written["data"]["hashes"]) == [str(tmp_path / "set" / "pairs.jsonl")]
    assert written["evaluation"]["eval"]["eval_pairs"] == 6
    overlap = written["overlap"]["eval"]  # the same file on both sides: every item was seen, and it is said
    assert (overlap["items"], overlap["with_seen_image"], overlap["seen_whole"]) == (6, 6, 6)
    assert load_recipe(run / "recipe.yaml").loss.beta == 0.2
    AutoModelForImageTextToText.from_pretrained(run)
    AutoProcessor.from_pretrained(run)
    assert "reward accuracy" in result.output


@pytest.mark.slow
def test_what_a_run_has_chosen_is_in_its_manifest(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, records(6))
    recipe = write_recipe(tmp_path, checkpoint, training={"save_strategy": "steps", "save_steps": 2})
    assert call("train", recipe, "model.vision_memory=recompute").exit_code == 0
    chosen = manifest(tmp_path)["chosen"]["memory"]
    assert chosen["vision"] == "recompute"
    assert chosen["asked"] == ["auto", "recompute"]
    assert chosen["bound"]["most"] == 2048
    state = json.loads((tmp_path / "run" / "checkpoint-2" / STATE_FILE).read_text())
    assert state["settings"]["chosen"]["memory"] == chosen


@pytest.mark.slow
def test_a_pair_that_is_out_of_memory_ends_with_one_message(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Qwen2MLP.forward

    def full(self: Any, states: Any) -> Any:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(self, states)

    monkeypatch.setattr(Qwen2MLP, "forward", full)
    write_data(tmp_path, records(6))
    done = call("train", write_recipe(tmp_path, checkpoint))
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert "pairs.jsonl:" in text
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert f"image patches, is out of memory ({reason}); set training.activation_checkpointing" in text
    assert "Traceback" not in text
    assert manifest(tmp_path)["status"] == "failed"
    assert manifest(tmp_path)["chosen"]["memory"]["out_of_memory"] == 1  # rows of two pairs were tried first


@pytest.mark.slow
def test_holding_out_part_of_the_images(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, records(16))
    result = call("train", write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}))
    assert result.exit_code == 0, result.output
    counts = manifest(tmp_path)["data"]["sets"]["noise"]
    assert counts == {"read": 16, "used": 12, "held_out": 4, "dropped": {}, "not_reached": 0}  # 4 images, 4 pairs each
    assert manifest(tmp_path)["evaluation"]["held_out"]["held_out_pairs"] == 4
    assert manifest(tmp_path)["overlap"]["held_out"]["with_seen_image"] == 0


def bad_lines() -> list[Any]:
    good = records(8)
    return [
        good[0],
        '{"image": "0.png", "question": "no end',
        {**good[1], "image": "nowhere.png"},
        {**good[2], "image": "broken.png"},
        {**good[3], "rejected": ""},
        {**good[4], "rejected": good[4]["chosen"]},
        {**good[5], "chosen": "red " * 500},
        {**good[6], "chosen": "look: <IMG_CONTEXT>"},
        good[7],
    ]


REASONS = {
    "bad_json": 2,
    "missing_image": 3,
    "undecodable_image": 4,
    "empty_response": 5,
    "identical": 6,
    "over_long": 7,
    "control_token_in_text": 8,
}


@pytest.mark.slow
def test_bad_records_are_skipped_counted_and_named(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, bad_lines())
    (tmp_path / "set" / "images" / "broken.png").write_bytes(b"no picture")
    result = call("train", write_recipe(tmp_path, checkpoint, data={"max_length": 400}))
    assert result.exit_code == 0, result.output
    found = manifest(tmp_path)["data"]
    assert found["sets"]["noise"] == {
        "read": 9,
        "used": 2,
        "held_out": 0,
        "dropped": dict.fromkeys(sorted(REASONS), 1),
        "not_reached": 0,
    }
    for reason, line in REASONS.items():
        assert f"pairs.jsonl:{line}: " in found["examples"][reason][0]
        assert reason in result.output


@pytest.mark.slow
@pytest.mark.parametrize("reason", list(REASONS))
def test_a_bad_record_ends_the_run_when_asked(tmp_path: Path, checkpoint: Path, reason: str) -> None:
    lines = bad_lines()
    write_data(tmp_path, [lines[0], lines[REASONS[reason] - 1]])
    (tmp_path / "set" / "images" / "broken.png").write_bytes(b"no picture")
    result = call(
        "train",
        write_recipe(tmp_path, checkpoint, data={"max_length": 400, "on_bad_record": "fail"}),
        "training.dataloader_num_workers=1",
    )
    assert result.exit_code == 2, result.output
    assert f"{tmp_path / 'set' / 'pairs.jsonl'}:2: " in result.output
    assert f"[{reason}]" in result.output
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_a_prompt_that_looks_templated_is_told_of_once(tmp_path: Path) -> None:
    """Found in a loader's worker, or where `inspect` encodes the pairs."""
    from tests.zoo.templates import SIZE, processor
    from vlmpo.testing.tiny import build_model

    own = processor("vicuna")
    own.save_pretrained(tmp_path / "model")
    build_model(own.tokenizer, SIZE).save_pretrained(tmp_path / "model")
    write_data(tmp_path, [{**record, "question": f"USER: {record['question']}"} for record in records(6)])
    recipe = write_recipe(tmp_path, tmp_path / "model", training={"dataloader_num_workers": 1})
    for command in ("inspect", "train"):
        result = call(command, recipe)
        assert result.exit_code == 0, result.output
        assert result.output.count("a prompt begins with 'USER:'") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, not -1"),
        (
            {"dataloader_drop_last": True, "gradient_accumulation_steps": 4},
            "training.dataloader_drop_last: leaves out all 6 pairs, as a step takes 8",
        ),
    ],
)
def test_a_run_that_could_take_no_step_leaves_nothing(
    tmp_path: Path, checkpoint: Path, settings: dict[str, Any], message: str
) -> None:
    """A manifest would refuse the next try."""
    write_data(tmp_path, records(6))
    result = call("train", write_recipe(tmp_path, checkpoint, training=settings))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.slow
def test_the_accounts_are_not_cut_where_there_is_no_terminal(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, bad_lines())
    (tmp_path / "set" / "images" / "broken.png").write_bytes(b"no picture")
    result = call("train", write_recipe(tmp_path, checkpoint, data={"max_length": 400}))
    (header,) = [line for line in result.output.splitlines() if line.startswith("  data set ")]
    assert set(header.split()) >= set(REASONS)


@pytest.mark.slow
def test_cutting_over_long_responses(tmp_path: Path, checkpoint: Path) -> None:
    lines = records(2)
    lines[1]["chosen"] = "red " * 500
    write_data(tmp_path, lines)
    result = call("train", write_recipe(tmp_path, checkpoint, data={"max_length": 400, "over_long": "cut"}))
    assert result.exit_code == 0, result.output
    assert manifest(tmp_path)["data"]["sets"]["noise"]["used"] == 2


@pytest.mark.slow
def test_resuming_by_the_command_line(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, records(8))
    recipe = write_recipe(tmp_path, checkpoint, training={"save_strategy": "steps", "save_steps": 2})
    assert call("train", recipe).exit_code == 0
    first = logged(tmp_path / "run")
    again = call("train", recipe)
    assert again.exit_code == 2
    assert "already holds a run" in again.output
    (tmp_path / "run" / "checkpoint-4" / STATE_FILE).unlink()  # as if killed while it was written
    resumed = call("train", recipe, "training.resume_from_checkpoint=true")
    assert resumed.exit_code == 0, resumed.output
    timing = ("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share", "memory_gib")
    for mine, other in zip(logged(tmp_path / "run"), first, strict=True):
        assert {k: v for k, v in mine.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert manifest(tmp_path)["data"]["sets"]["noise"]["used"] == 8


def test_a_run_that_failed_before_its_first_checkpoint_is_told_apart(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, records(2))
    recipe = write_recipe(tmp_path, checkpoint)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"status": "running"}')
    again = call("train", recipe)
    assert again.exit_code == 2
    assert "has not reached its first checkpoint" in again.output
    assert "resume_from_checkpoint=true, which starts it anew" in again.output
    assert (tmp_path / "run" / "manifest.json").read_text() == '{"status": "running"}'


RESUME = "training.resume_from_checkpoint=true"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_one_command_any_number_of_times(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, killed before the first checkpoint, killed before the model is saved, finished, more steps."""
    write_data(tmp_path, records(8))
    recipe = write_recipe(tmp_path, checkpoint, training={"save_strategy": "steps", "save_steps": 2, "max_steps": 3})
    run = tmp_path / "run"
    for method in ("training_step", "save_model", "save_average", "create_model_card"):
        failing = killed_at_the_end(MPOTrainer.save_model) if method == "save_model" else lambda *_, **__: 1 / 0
        with monkeypatch.context() as patched:
            patched.setattr(MPOTrainer, method, failing)
            assert call("train", recipe, RESUME, "training.ema_decay=0.9").exit_code == 1
        assert manifest(tmp_path)["status"] == "failed"
        assert manifest(tmp_path)["history"][-1]["error"]
    done = call("train", recipe, RESUME, "training.ema_decay=0.9")
    assert done.exit_code == 0, done.output
    straight = call("train", recipe, f"training.output_dir={tmp_path / 'straight'}", "training.ema_decay=0.9")
    assert straight.exit_code == 0
    for name in ("model.safetensors", "ema/model.safetensors", "checkpoint-3/optimizer.pt"):
        assert (run / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    before = contents(run)
    for _ in range(2):
        again = call("train", recipe, RESUME, "training.ema_decay=0.9")
        assert again.exit_code == 0
        assert "finished: the run in" in again.output
        assert contents(run) == before
    more = call("train", recipe, RESUME, "training.ema_decay=0.9", "training.max_steps=4")
    assert more.exit_code == 0, more.output
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4]
    written = manifest(tmp_path)
    assert (written["status"], written["steps"]) == ("finished", 4)
    assert written["history"][-1]["changes"] == {"training.max_steps": [3, 4]}
    assert written["data"]["sets"]["noise"]["not_reached"] == 0


@pytest.mark.slow
def test_a_run_that_starts_anew_takes_the_kernels_it_had(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun where one kernel was left out, and failed before a checkpoint, it starts anew on a machine that has all."""
    write_data(tmp_path, records(4))
    recipe = write_recipe(tmp_path, checkpoint)
    monkeypatch.setattr(kernel_choice, "why_unusable", lambda device: None)
    monkeypatch.setattr(kernel_choice, "load_functions", lambda: wrong("silu_mul", 0.1))
    with monkeypatch.context() as patched:
        patched.setattr(MPOTrainer, "training_step", lambda *_, **__: 1 / 0)
        assert call("train", recipe).exit_code == 1
    kernels = manifest(tmp_path)["chosen"]["kernels"]
    assert kernels == {"asked": "auto", "kinds": ["mlp", "rms_norm", "rotary"]}
    monkeypatch.setattr(kernel_choice, "load_functions", lambda: FUNCTIONS)
    done = call("train", recipe, RESUME)
    assert done.exit_code == 0, done.output
    assert manifest(tmp_path)["chosen"]["kernels"] == kernels
    assert manifest(tmp_path)["model"]["kernels"] == "stand-in 1 mlp,rms_norm,rotary"


def killed_at_the_end(real: Any) -> Any:
    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir == self.args.output_dir:
            raise ZeroDivisionError
        real(self, output_dir, _internal_call)

    return save_model


@pytest.mark.slow
def test_a_resumed_run_is_the_recipes(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, records(8))
    recipe = write_recipe(tmp_path, checkpoint, training={"save_strategy": "steps", "save_steps": 2})
    assert call("train", recipe, "training.max_steps=2").exit_code == 0
    annotation = tmp_path / "set" / "pairs.jsonl"
    text = annotation.read_text()
    lines = text.splitlines(keepends=True)
    for other, key in (("".join(lines[::-1]), "data.train.files"), ("".join(lines[:6]), "data.train.pairs: 8 -> 6")):
        annotation.write_text(other)
        refused = call("train", recipe, RESUME)
        assert refused.exit_code == 2, refused.output
        assert key in refused.output
        assert "--allow-changes data.train.files" in refused.output
    allowed = call("train", recipe, RESUME, "--allow-changes", "data.train.files,data.train.pairs")
    assert allowed.exit_code == 0, allowed.output
    changes = manifest(tmp_path)["history"][-1]["changes"]
    assert changes["data.train.pairs"] == [8, 6]
    assert manifest(tmp_path)["data"]["sets"]["noise"]["not_reached"] >= 0
    annotation.write_text(text)
    for override, key in (("data.hold_out=0.5", "data.hold_out"), ("model.freeze=[vision_tower]", "model.freeze")):
        refused = call("train", recipe, RESUME, override)
        assert (refused.exit_code, f"{key}: " in refused.output) == (2, True), refused.output


FOREIGN = {
    "config.json": "holds config.json, which no run of vlmpo wrote",
    "model-00001-of-00002.safetensors": "holds model-00001-of-00002.safetensors, which no run of vlmpo wrote",
    "README.md": "holds README.md, which no run of vlmpo wrote",
    "checkpoint-7/weights.pt": "holds checkpoint-7, which no run of vlmpo wrote",
    "manifest.json": "is not of a run of vlmpo",
}


@pytest.mark.parametrize("resume", [(), (RESUME,)], ids=["", "resume"])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_not_written_over(tmp_path: Path, checkpoint: Path, name: str, resume: tuple) -> None:
    write_data(tmp_path, records(2))
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    result = call("train", write_recipe(tmp_path, checkpoint), *resume)
    assert (result.exit_code, FOREIGN[name] in result.output) == (2, True), result.output
    assert contents(tmp_path / "run") == {name: b"{}"}


@pytest.mark.parametrize("change", [{"model": {"path": "elsewhere"}}, {"data": {"hashes": {"a.jsonl": "00"}}}, {}])
def test_a_run_of_another_is_not_started_anew(tmp_path: Path, checkpoint: Path, change: dict[str, Any]) -> None:
    write_data(tmp_path, records(2))
    before = {"status": "running", "model": {"path": str(checkpoint)}, "data": {"hashes": {}}, **change}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(before))
    result = call("train", write_recipe(tmp_path, checkpoint), RESUME)
    assert result.exit_code == 2, result.output
    assert "holds a run of another model or other data" in result.output


@pytest.mark.parametrize("resume", [(), (RESUME,)], ids=["", "resume"])
@pytest.mark.parametrize("link", [False, True])
def test_the_model_is_never_the_output(tmp_path: Path, checkpoint: Path, resume: tuple, link: bool) -> None:
    import shutil

    write_data(tmp_path, records(2))
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "manifest.json").write_text('{"status": "finished"}')  # the final model of an earlier run
    output = tmp_path / "link" if link else model
    if link:
        output.symlink_to(model)
    before = contents(model)
    result = call("train", write_recipe(tmp_path, model), f"training.output_dir={output}", *resume)
    assert result.exit_code == 2, result.output
    assert "is where model.path lies" in result.output
    assert contents(model) == before


LORA_TYPOS = {
    "target_modules: [q_proj, v_prj]": "lora.target_modules: the model has nothing that 'v_prj' names; did you mean v",
    "modules_to_save: [projektor]": "modules_to_save: the model has nothing that 'projektor' names",
    "target_modules: '.*q_prj'": "target_modules: the model has nothing that '.*q_prj' names",
    "exclude_modules: [visoin_tower]": "exclude_modules: the model has nothing that 'visoin_tower' names; did",
    "rank_pattern: {k_prj: 2}": "rank_pattern: the model has nothing that 'k_prj' names; did you mean k_proj",
    "target_modules: [q_proj, lm_head], exclude_modules: [lm_head]": "all that 'lm_head' names is excluded",
}


@pytest.mark.parametrize("lora", LORA_TYPOS)
def test_lora_entries_that_name_nothing_are_refused(tmp_path: Path, checkpoint: Path, lora: str) -> None:
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, checkpoint), f"model.lora={{r: 4, {lora}}}")
    assert result.exit_code == 2, result.output
    assert LORA_TYPOS[lora] in result.output
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_lora_from_a_recipe(tmp_path: Path, checkpoint: Path) -> None:
    write_data(tmp_path, records(4))
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    result = call("train", write_recipe(tmp_path, checkpoint, model={"lora": lora}, reference={"kind": "adapter"}))
    assert result.exit_code == 0, result.output
    assert logged(tmp_path / "run")[0]["rewards/chosen"] == 0.0
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_frozen_parts_do_not_move(tmp_path: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    write_data(tmp_path, records(4))
    result = call("train", write_recipe(tmp_path, checkpoint, model={"freeze": ["vision_tower"]}))
    assert result.exit_code == 0, result.output
    before = AutoModelForImageTextToText.from_pretrained(checkpoint)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        frozen = "vision_tower" in name
        if frozen:
            assert torch.equal(old, new), name
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rat=1", "did you mean training.learning_rate"),
        ("training.lr_scheduler_type=cosinus", "training: "),
        ("model.lora={rank: 4}", "model.lora.rank"),
        ("model.freeze=[visual_tower]", "model.freeze: the model has no part 'visual_tower'"),
        ("model.path=no/such/model", "model.path: no"),
        ("data.train=[no/such.jsonl]", "no/such.jsonl"),
        ("training.resume_from_checkpoint=no/such/checkpoint-3", "there is no folder no/such/checkpoint-3"),
    ],
)
def test_mistakes_get_one_message(tmp_path: Path, checkpoint: Path, override: str, words: str) -> None:
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, checkpoint), override)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_data(tmp_path, records(2))
    result = call("train", write_recipe(tmp_path, broken))
    assert result.exit_code == 2
    assert "lacks 1 of the model's weights" in result.output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.optim=adamw_troch",
            "training: optim cannot be 'adamw_troch'; did you mean adamw_torch? Known are",
        ),
        ("training.eval_strategy=often", "training: eval_strategy cannot be 'often'; known are no, steps, epoch"),
    ],
)
def test_a_choice_that_there_is_not_is_named_by_its_key(tmp_path: Path, override: str, message: str) -> None:
    result = call("train", write_recipe(tmp_path, tmp_path / "no model"), override)
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {message}")
