"""Coming from TRL: the same script, data set and arguments with either trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel

from tests.paths import REPO
from tests.tiny_models import model as tiny_model
from tests.tiny_models import noise_image, pairs_like_trl
from tests.train.test_trl_parity import RESPONSES, template_processor
from tests.training import config, flat_weights, logged, trainer
from vlmpo import MPOTrainer
from vlmpo.errors import DataError, RecipeError

pytest.importorskip("trl", reason="TRL is a development dependency")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a data set in TRL's format, saved."""
    root = tmp_path_factory.mktemp("from_trl")
    tiny_model().save_pretrained(root / "model")
    template_processor().save_pretrained(root / "model")
    images = [noise_image(60, 60, 0), noise_image(120, 56, 1), noise_image(40, 80, 2)]
    data = pairs_like_trl(images, RESPONSES)
    datasets.DatasetDict({"train": data, "test": data.select([1, 2])}).save_to_disk(root / "data")
    return root


def run(which: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": f"{REPO / 'src'}{os.pathsep}{REPO}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPO / "tests" / "dropin_script.py"), which, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{which}.json").read_text())


@pytest.mark.slow
def test_one_script_runs_with_either(folder: Path) -> None:
    """Losses of three steps under LoRA, evaluation, and what the saved adapter says: equal to 1e-5 relative."""
    ours, theirs = run("vlmpo", folder), run("trl", folder)
    assert len(ours["losses"]) == 3
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["losses"][0] != pytest.approx(ours["losses"][-1], rel=1e-3)
    assert ours["eval_accuracy"] == theirs["eval_accuracy"]
    adapters = []
    for which in ("vlmpo", "trl"):
        adapted = PeftModel.from_pretrained(tiny_model(), folder / which / "final")
        adapters.append(torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_" in n]))
    assert (adapters[0] - adapters[1]).norm() / adapters[1].norm() < 1e-5


@pytest.mark.slow
def test_names_are_loaded(folder: Path, tmp_path: Path) -> None:
    data = datasets.load_from_disk(str(folder / "data"))["train"]
    run = MPOTrainer(str(folder / "model"), ref_model=str(folder / "model"), args=config(tmp_path), train_dataset=data)
    assert torch.equal(flat_weights(run.model), flat_weights(tiny_model()))
    run.train()
    assert logged(tmp_path)[0]["rewards/chosen"] == 0.0
    assert run.all_pair_counts().used.total() == 3


def test_a_loaded_model_brings_its_processor(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(folder / "model")
    run = MPOTrainer(loaded, args=config(tmp_path))
    assert type(run.processing_class) is type(template_processor())
    with pytest.raises(RecipeError, match="processing_class is missing"):
        MPOTrainer(tiny_model(), args=config(tmp_path))


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics"])
def test_what_has_no_use_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{name} is not used"):
        MPOTrainer(tiny_model(), args=config(tmp_path), **{name: print})


def test_a_stream_is_refused(folder: Path, tmp_path: Path) -> None:
    data = datasets.load_from_disk(str(folder / "data"))["train"]
    with pytest.raises(DataError, match="train_dataset: IterableDataset has no length"):
        trainer(tmp_path, data.to_iterable_dataset())


@pytest.mark.slow
def test_a_bad_record_is_counted_by_its_place(folder: Path, tmp_path: Path) -> None:
    data = datasets.load_from_disk(str(folder / "data"))["train"].to_list()
    data[1]["chosen"] = [{"role": "assistant", "content": "  "}]
    run = trainer(tmp_path, data)
    run.train()
    accounts = run.all_pair_counts()
    assert accounts.used.total() == 2
    assert accounts.reasons() == {"empty_response": 1}
    assert accounts.examples["empty_response"][0].startswith("train_dataset[1]: ")


@pytest.mark.slow
def test_evaluation_takes_records_too(folder: Path, tmp_path: Path) -> None:
    data = datasets.load_from_disk(str(folder / "data"))
    run = trainer(tmp_path, data["train"], eval_dataset={"a": data["test"], "b": data["train"]})
    run.train()
    metrics = run.evaluate()
    assert (metrics["eval_a_pairs"], metrics["eval_b_pairs"]) == (2, 3)
    assert run.evaluate(data["test"])["eval_loss"] == metrics["eval_a_loss"]
