"""The model card: every figure in it is the run's, every claim is true of the run, and it gives nothing away."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from tests.commands.test_evaluate import write_questions
from tests.commands.test_train import bad_lines, call, checkpoint, manifest, records, write_data, write_recipe  # noqa: F401
from tests.paths import REPO
from tests.tiny_models import random_pair
from tests.training import logged, pairs, trainer
from vlmpo.errors import RunError
from vlmpo.train.checkpoint import STATE_FILE
from vlmpo.train.model_card import RunSummary, compared, hub_name, model_card, update_results

BEGIN_PAIRS, END_PAIRS = "<!-- vlmpo pairs -->", "<!-- end of vlmpo pairs -->"
SECRET = "hf_aSecretThatMustNotBeTold"


def split(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def table(body: str, first: str) -> list[list[str]]:
    """The rows of the table whose head begins with ``first``."""
    lines = body.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def card_of(folder: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    run = trainer(folder, pairs(4), **settings)
    run.train()
    run.create_model_card()
    return split((folder / "README.md").read_text())


@pytest.mark.slow
def test_the_card_of_a_run(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", SECRET)
    write_data(tmp_path, [*records(16), *bad_lines()[1:4]])
    (tmp_path / "set" / "images" / "broken.png").write_bytes(b"no picture")
    write_questions(tmp_path)
    questions = {"questions": "questions.jsonl", "image_root": "set/images", "max_new_tokens": 4}
    training = {"gradient_accumulation_steps": 3, "weight_decay": 0.05, "eval_strategy": "epoch", "ema_decay": 0.9}
    recipe = write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, training=training, evaluate=questions)
    result = call("train", recipe, "loss.beta=0.2")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "run" / "README.md").read_text()
    head, body = split(text)
    written = manifest(tmp_path)

    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmpo", "mpo"],
    }  # a local base model and local data have no names on the Hub, and no licence is known
    assert body.lstrip().startswith("# run\n")
    assert f"`{checkpoint.name}` trained with Mixed Preference Optimization (MPO)." in body

    counts = written["data"]["sets"]["noise"]
    dropped = sum(counts["dropped"].values())
    assert dropped == 3
    (row,) = table(body, "data set")
    expected = [counts["read"], counts["used"], counts["held_out"], dropped, counts["not_reached"]]
    assert row == ["noise", *map(str, expected)]
    for reason, count in counts["dropped"].items():
        assert f"{count} {reason}" in body

    assert dict(table(body, "term")) == {"sigmoid": "0.8", "bco_pair": "0.2", "nll": "1"}
    assert "beta 0.2, against a frozen model" in body
    settings = dict(table(body, "setting"))
    assert settings["global batch"] == "6 pairs"
    assert settings["learning rate"] == "0.001"
    assert settings["optimizer"].endswith("weight decay 0.05")
    assert settings["parameters, vision"] == "32,096 trained of 32,096"
    assert settings["trained weights kept in"] == "float32"

    lines = logged(tmp_path / "run")
    progress = {name: (first, last) for name, first, last in table(body, "while training")}
    for name in ("loss", "loss/sigmoid", "loss/bco_pair", "loss/nll", "rewards/margins"):
        assert progress[name] == (f"{lines[0][name]:.4f}", f"{lines[-1][name]:.4f}")

    figures = written["evaluation"]["held_out"]
    (row,) = table(body, "evaluation set")
    accuracy = [figures[f"held_out_rewards/accuracies{bound}"] for bound in ("", "_low", "_high")]
    margin = [figures[f"held_out_rewards/margins{bound}"] for bound in ("", "_low", "_high")]
    assert row == [
        "held_out",
        "all",
        str(int(figures["held_out_pairs"])),
        f"{figures['held_out_loss']:.4f}",
        "{:.3f} [{:.3f}, {:.3f}]".format(*accuracy),
        "{:+.3f} [{:+.3f}, {:+.3f}]".format(*margin),
    ]
    asked = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in asked if "eval_answers/accuracy" in line][-1]
    assert (
        f"Greedy answers to 4 questions at step {last['step']}: accuracy {last['eval_answers/accuracy']:.3f} [" in body
    )

    assert f"The weights are those of the last optimizer step, {lines[-1]['step']}." in body
    assert f"(decay 0.9, through step {lines[-1]['step']})" in body
    assert f"- transformers {written['versions']['transformers']}" in body
    assert "arXiv:2411.10442" in body
    assert str(tmp_path) not in text
    assert "/" not in re.sub(r"(?m)^.*(loss/|rewards/|ema/).*$", "", text)  # no path at all
    assert SECRET not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "name", "tags", "papers"),
    [
        ({"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}, "Mixed Preference Optimization (MPO)", ["mpo"], 3),
        ({"sigmoid": 1.0}, "Direct Preference Optimization (DPO)", ["dpo"], 1),
        ({"bco_pair": 1.0, "nll": 0.5}, "Binary Classifier Optimization with an NLL term (BCO+)", ["bco"], 1),
        ({"nll": 1.0}, "supervised fine-tuning (SFT)", ["sft"], 0),
    ],
    ids=["mpo", "dpo", "bco+", "sft"],
)
def test_it_is_called_what_it_was(tmp_path: Path, weights: Any, name: str, tags: list[str], papers: int) -> None:
    head, body = card_of(tmp_path, loss_weights=weights)
    assert f"trained with {name}." in body
    assert head["tags"] == ["vlmpo", *tags]
    assert body.count("@article") == papers
    assert ("MPO" in body) == (tags == ["mpo"])
    assert ("2411.10442" in body) == (tags == ["mpo"])
    assert dict(table(body, "term")) == {term: f"{weight:g}" for term, weight in weights.items()}
    with_rewards = "sigmoid" in weights or "bco_pair" in weights
    assert ("beta 0.1" in body) == with_rewards
    assert ("rewards/margins" in [row[0] for row in table(body, "while training")]) == with_rewards
    assert ("reward shift" in body) == ("bco_pair" in weights)
    assert ("nll reduction" in body) == ("nll" in weights)
    assert "No evaluation was asked for." in body


def summary(**fields: Any) -> RunSummary:
    """A run of three steps on nothing."""
    known: dict[str, Any] = {
        **{"title": "run", "location": "me/run", "base_model": None, "adapter": False, "reads_images": True},
        **{"processor_class": "AutoProcessor", "weights": {"nll": 1.0}, "beta": 0.1, "reward_shift": "previous"},
        **{"nll_reduction": "token", "label_smoothing": 0.0, "reference": "a frozen model", "settings": []},
        **{"log_history": [], "final_step": 3},
    }
    return RunSummary(**{**known, **fields})


@pytest.mark.parametrize("mask", range(1, 8))
def test_every_mix_of_terms_has_a_name_and_its_papers(mask: int) -> None:
    terms = ("sigmoid", "bco_pair", "nll")
    weights = {term: 1.0 for bit, term in enumerate(terms) if mask >> bit & 1}
    head, body = split(model_card(summary(weights=weights), {}))
    assert ("mpo" in head["tags"]) == ("(MPO)" in body) == (mask == 7)
    papers = [name for name in ("2411.10442", "2305.18290", "2404.04656") if f"arXiv:{name}" in body]
    expected = [("2411.10442", mask == 7), ("2305.18290", "sigmoid" in weights), ("2404.04656", "bco_pair" in weights)]
    assert papers == [name for name, cited in expected if cited]
    assert body.count("@article") == len(papers)
    bibtex = body.partition("```bibtex\n")[2].partition("```")[0]
    assert bibtex.count("\n}\n") == len(papers)
    assert bibtex.count("\n\n@") == max(0, len(papers) - 1)


def test_a_card_of_values_alone() -> None:
    """Which weights, whether averaged, which answers: those at the final step; and nothing to report."""
    _, body = split(model_card(summary(), {}))
    assert "A model trained with supervised fine-tuning (SFT)." in body
    assert "The weights are those of the last optimizer step, 3." in body
    assert "No pair was used." in body
    assert "No evaluation was asked for." in body
    answers = {"eval_answers/items": 8, "eval_answers/low": 0.25, "eval_answers/high": 0.75}
    answers["eval_answers/unparsed"] = 0.125
    log = [{"step": step, "eval_answers/accuracy": step / 8, **answers} for step in (2, 3, 4)]
    _, body = split(
        model_card(
            summary(best_by=("eval_loss", 0.123456), ema={"decay": 0.9, "step": 4}, log_history=log, adapter=True), {}
        )
    )
    assert "of optimizer step 3, the best checkpoint by `eval_loss` (0.1235)." in body
    assert "(decay 0.9, through step 4)" in body
    assert "answers to 8 questions at step 3: accuracy 0.375 [0.250, 0.750], unparsed 12.5%." in body
    assert 'from_pretrained("the base model")' in body


def test_odd_names_stay_in_their_cells() -> None:
    data = {"a|b\nc": {"used": 2, "dropped": {"bad_json": 1}}}
    metrics = {"x|y_pairs": 2, "x|y_loss": 0.5}
    _, body = split(model_card(summary(data=data, results={"x|y": metrics}, settings=[("adapter", "a|b")]), {}))
    assert table(body, "data set") == [["a\\|b c", "not counted", "2", "not counted", "1", "not counted"]]
    assert "Dropped of a\\|b c: 1 bad_json." in body
    assert table(body, "evaluation set") == [["x\\|y", "all", "2", "0.5000", "", ""]]
    assert table(body, "setting") == [["adapter", "a\\|b"]]


@pytest.mark.parametrize(
    "name",
    [
        'x")\nimport os  # ```',
        "```\n# Injected\n<script>alert(1)</script>",
        "[click](http://evil) ![i](x) `code`",
        "a\x1b[31m\u202etxt",
        "<!-- end of vlmpo pairs -->",
    ],
)
def test_hostile_names_break_out_of_nothing(name: str) -> None:
    data = {name: {"used": 2, "dropped": {"bad_json": 1}}}
    run = summary(
        title=name,
        location=name,
        base_model=f"/models/{name}",
        data=data,
        best_by=(name, 1.0),
        adapter=True,
        results={"eval": {"eval_pairs": 2, "eval_loss": 0.5, f"eval_pairs/{name}": 1, "eval_pairs/b": 1}},
    )
    _, body = split(model_card(run, {}))
    lines = body.splitlines()
    assert [line for line in lines if line.startswith("```")] == ["```python", "```"]
    assert [line for line in lines if line.startswith("# ")] == [lines[next(i for i, x in enumerate(lines) if x)]]
    prose = body.split("```")[0] + body.split("```")[2]
    assert "<script" not in prose.replace("\\<script", "")
    assert not {"\x1b", "\u202e"} & set(body)
    code = body.split("```python\n")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loads = [call.args[-1] for call in calls if getattr(call.func, "attr", "") == "from_pretrained"]
    named = [ast.literal_eval(argument) for argument in loads if not isinstance(argument, ast.Attribute)]
    assert sorted(named) == [name] * 3  # adapter's config, adapter, processor; the config names the base
    assert body.count(BEGIN_PAIRS) == body.count(END_PAIRS) == 1
    assert "import os" not in [line.strip() for line in code.splitlines()]


CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_code_answers_as_printed(tmp_path: Path, checkpoint: Path, kind: str) -> None:  # noqa: F811
    """In a process of its own, in the folder that the run's lies in; evaluating brings the results up to date, once."""
    write_data(tmp_path, records(16))
    write_questions(tmp_path)
    asked = {
        "questions": "questions.jsonl",
        "image_root": "set/images",
        "max_new_tokens": 4,
        "against": str(checkpoint),
    }
    recipe = write_recipe(tmp_path, checkpoint, data={"hold_out": 0.25}, training={"max_steps": 1}, evaluate=asked)
    given = ["model.lora={r: 2}"] if kind == "adapter" else ["loss.weights={nll: 1}"]
    result = call("train", recipe, *given)
    assert result.exit_code == 0, result.output
    card = tmp_path / "run" / "README.md"
    (code,) = CODE.findall(card.read_text())
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    if kind == "adapter":
        return
    loss = manifest(tmp_path)["evaluation"]["held_out"]["held_out_loss"]
    assert f"held_out: loss {loss:.4f} on " in result.output
    for _ in range(2):
        assert call("evaluate", recipe, *given).exit_code == 0
    figures = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    body = split(card.read_text())[1]
    assert body.count("| held_out | all |") == body.count("Greedy answers to 4 questions: accuracy") == 1
    assert table(body, "evaluation set")[0][3] == f"{figures['pairs']['held_out']['held_out_loss']:.4f}"
    assert f"the difference is {figures['questions']['comparison']['difference']:+.3f} [" in body


def test_results_are_put_in_the_place_of_others(tmp_path: Path) -> None:
    """Hostile names neither end their part nor stay behind; a card that is not vlmpo's is left alone."""
    name = f"{END_PAIRS}\\1<script>"
    figures = {"items": 4, "accuracy": 0.5, "low": 0.25, "high": 0.75, "unparsed": 0.0}
    (tmp_path / "README.md").write_text(model_card(summary(title=name), {}))
    against = compared(name, figures, {"items": 4, "difference": 0.25, "low": 0.0, "high": 0.5})
    for loss in (1.0, 2.0):
        assert update_results(
            tmp_path, {name: {f"{name}_pairs": 2, f"{name}_loss": loss}}, {**figures, "against": against}
        )
    body = split((tmp_path / "README.md").read_text())[1]
    assert "No evaluation was asked for." not in body
    assert [row[3] for row in table(body, "evaluation set")] == ["2.0000"]
    assert body.count("Greedy answers to 4 questions: accuracy 0.500 [0.250, 0.750], unparsed 0.0%.") == 1
    assert "the difference is +0.250 [+0.000, +0.500]." in body
    assert update_results(tmp_path, {}, None)  # nothing new: what is there stays
    assert split((tmp_path / "README.md").read_text())[1] == body
    (tmp_path / "README.md").write_text("# Mine\n\n## Results\n\nGood.\n")
    assert not update_results(tmp_path, {}, figures)


@pytest.mark.slow
def test_saving_in_python_writes_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last evaluation's results, what was given to the card before, and the folder's own name."""
    monkeypatch.chdir(tmp_path)
    run = trainer(Path("runs/mine"), pairs(4))
    run.train()
    results = run.evaluate(pairs(3, 10))
    run.create_model_card(license="mit")
    run.save_model("runs/other")
    head, body = split((tmp_path / "runs" / "other" / "README.md").read_text())
    assert head["license"] == "mit"
    assert 'AutoProcessor.from_pretrained("runs/other")' in body
    assert table(body, "evaluation set")[0][3] == f"{results['eval_loss']:.4f}"
    run.save_model()
    assert 'AutoProcessor.from_pretrained("runs/mine")' in (tmp_path / "runs" / "mine" / "README.md").read_text()


@pytest.mark.slow
def test_results_of_supervised_fine_tuning_have_no_rewards(tmp_path: Path) -> None:
    run = trainer(tmp_path, pairs(4), loss_weights={"nll": 1.0})
    run.train()
    results = run.evaluate(pairs(3, 10), metric_key_prefix="eval")
    run.card_fields["results"] = {"eval": results}
    run.create_model_card()
    _, body = split((tmp_path / "README.md").read_text())
    assert table(body, "evaluation set") == [["eval", "all", "3", f"{results['eval_loss']:.4f}", "", ""]]


@pytest.mark.slow
def test_several_data_sets_and_odd_names(tmp_path: Path) -> None:
    data = [random_pair(seed, images=0, source=("a|b", "c")[seed % 2]) for seed in range(6)]
    run = trainer(tmp_path, data)
    run.train()
    run.card_fields["results"] = {"eval": run.evaluate(data, metric_key_prefix="eval")}
    run.create_model_card(license="mit", language="en", tags="mine", model_name="Bob", dataset_tags=["who/what"])
    head, body = split((tmp_path / "README.md").read_text())
    assert [(row[0], row[2]) for row in table(body, "data set")] == [("a\\|b", "3"), ("c", "3")]
    assert [row[1] for row in table(body, "evaluation set")] == ["all", "a\\|b", "c"]
    assert "# Bob\n" in body
    assert (head["license"], head["language"], head["datasets"]) == ("mit", "en", ["who/what"])
    assert head["tags"] == ["vlmpo", "mpo", "mine"]


@pytest.mark.slow
def test_an_adapter_says_so(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    run = trainer(tmp_path, pairs(4), peft_config=adapter)
    run.card_fields["base_model"] = "owner/some-model"
    run.card_fields["datasets"] = ["owner/some-data", "pairs.jsonl", "data/pairs.jsonl"]
    run.train()
    run.save_model()
    assert (tmp_path / "README.md").exists()  # PEFT's own, a form to fill in
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    head, body = split(text)
    assert "More Information Needed" not in text
    assert head["base_model"] == "owner/some-model"
    assert head["base_model_relation"] == "adapter"
    assert head["datasets"] == ["owner/some-data"]
    assert head["library_name"] == "peft"
    assert head["tags"] == ["vlmpo", "mpo", "lora"]
    assert 'AutoModelForImageTextToText.from_pretrained("owner/some-model")' in body
    assert "PeftModel.from_pretrained(base" in body
    assert "against the model with its adapter off" in body
    assert dict(table(body, "setting"))["adapter"] == "LORA, rank 4, alpha 8, on q_proj, v_proj"
    assert dict(table(body, "setting"))["parameters, vision"].startswith("512 trained of ")


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("OpenGVLab/InternVL3-2B-hf") == "OpenGVLab/InternVL3-2B-hf"
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for local in ("runs/one", "/home/me/model", "a/b/c", "pairs.jsonl", "data/pairs.jsonl", "data/pairs.json.gz", None):
        assert hub_name(local) is None


# ---- pushing ----


class FakeHub:
    """Stands in for the Hub: takes what it is sent, and keeps what the folder held at that moment."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.uploads: list[dict[str, Any]] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        if self.refuse == "create":
            raise OSError("401 Client Error: Unauthorized\nmore")
        return type("Url", (), {"repo_id": f"me/{name.split('/')[-1]}"})

    def upload_folder(self, **kwargs: Any) -> Any:
        if self.refuse == "upload":
            raise OSError("503 Server Error")
        folder = Path(kwargs["folder_path"])
        card = folder / "README.md"
        kwargs["card"] = card.read_text() if card.exists() else None
        kwargs["names"] = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        self.uploads.append(kwargs)
        return type("Job", (), {"is_done": lambda self: True, "done": lambda self: True})()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    return fake


def pushing(folder: Path, checkpoint: Path, **training: Any) -> str:  # noqa: F811
    write_data(folder, records(16))
    given = {"push_to_hub": True, "hub_model_id": "me/aligned", **training}
    return write_recipe(folder, checkpoint, data={"hold_out": 0.25}, training=given)


@pytest.mark.slow
def test_what_is_pushed_has_its_card_and_results(tmp_path: Path, checkpoint: Path, hub: FakeHub) -> None:  # noqa: F811
    result = call("train", pushing(tmp_path, checkpoint, ema_decay=0.9))
    assert result.exit_code == 0, result.output
    (upload,) = hub.uploads  # once, when everything is there
    assert upload["repo_id"] == "me/aligned"
    assert upload["folder_path"] == str(tmp_path / "run")
    assert {"model.safetensors", "README.md", "recipe.yaml", "manifest.json", "ema/model.safetensors"} <= upload[
        "names"
    ]
    assert upload["card"] == (tmp_path / "run" / "README.md").read_text()
    _, body = split(upload["card"])
    assert "# aligned\n" in body
    assert 'from_pretrained("me/aligned")' in body
    assert table(body, "evaluation set")[0][:2] == ["held_out", "all"]


@pytest.mark.slow
def test_a_pushed_checkpoint_can_be_resumed_from(tmp_path: Path, checkpoint: Path, hub: FakeHub) -> None:  # noqa: F811
    more = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "checkpoint", "ema_decay": 0.9}
    result = call("train", pushing(tmp_path, checkpoint, **more))
    assert result.exit_code == 0, result.output
    sent = [upload for upload in hub.uploads if upload.get("path_in_repo") == "last-checkpoint"]
    assert len(sent) == 3
    for upload in sent:
        assert {STATE_FILE, "ema.safetensors", "optimizer.pt", "trainer_state.json"} <= upload["names"]


def test_a_token_in_a_recipe_is_refused(tmp_path: Path, checkpoint: Path, hub: FakeHub) -> None:  # noqa: F811
    result = call("train", pushing(tmp_path, checkpoint), f"training.hub_token={SECRET}")
    assert result.exit_code == 2
    assert "training.hub_token: a recipe is kept in the run folder" in result.output
    assert SECRET not in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("refuse", "words"), [("create", "401 Client Error: Unauthorized (log in"), ("upload", "503")])
def test_a_hub_that_refuses_is_told(tmp_path: Path, checkpoint: Path, hub: FakeHub, refuse: str, words: str) -> None:  # noqa: F811
    hub.refuse = refuse
    result = call("train", pushing(tmp_path, checkpoint))
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    if refuse == "upload":  # nothing is lost
        assert manifest(tmp_path)["status"] == "finished"
        assert (tmp_path / "run" / "model.safetensors").exists()
        assert (tmp_path / "run" / "README.md").exists()


@pytest.mark.slow
def test_pushing_by_hand_keeps_our_card(tmp_path: Path, hub: FakeHub) -> None:
    run = trainer(tmp_path / "by-hand", pairs(4))
    run.train()
    run.push_to_hub(license="apache-2.0")
    head, body = split(hub.uploads[0]["card"])
    assert head["license"] == "apache-2.0"
    assert "trained with Mixed Preference Optimization (MPO)" in body
    assert "generated from a Trainer" not in body
    hub.refuse = "upload"
    with pytest.raises(RunError, match=r"503 Server Error; the model is in"):
        run.push_to_hub()
