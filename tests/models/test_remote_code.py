"""Code that comes with a model runs only if the recipe says so, and nobody is asked on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.test_train import call, records, write_data, write_recipe
from tests.tiny_models import model, processor
from vlmpo.errors import ModelError
from vlmpo.models.loading import load_model, load_processor

CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import {base}
class Theirs({base}):
    model_type = "theirs"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose config and processor are classes in its own files, which leave a mark if they are imported."""
    found = tmp_path / "model"
    model().save_pretrained(found)
    processor().save_pretrained(found)
    for file, base, entry in (
        ("config.json", "PreTrainedConfig", {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"}),
        ("processor_config.json", "ProcessorMixin", {"AutoProcessor": "theirs_processor.Theirs"}),
    ):
        content = json.loads((found / file).read_text()) if (found / file).exists() else {}
        content |= {"auto_map": entry, "model_type": "theirs", "processor_class": "Theirs"}
        (found / file).write_text(json.dumps(content))
        code = next(iter(entry.values())).split(".")[0]
        (found / f"{code}.py").write_text(CODE.format(mark=str(tmp_path / "mark"), base=base))
    return found


def test_loading_refuses_it_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_model, load_processor):
        with pytest.raises(ModelError, match=r"not run unless you set model\.trust_remote_code: true"):
            load(str(folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("command", ["train", "inspect", "evaluate", "cache"])
def test_commands_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    write_data(tmp_path, records(4))
    evaluate = {"model": str(folder)}
    recipe = write_recipe(
        tmp_path, folder, data={"eval": ["set/meta.json"]}, evaluate=evaluate, reference={"kind": "cache"}
    )
    result = call(command, recipe)
    assert result.exit_code == 2
    assert "model.trust_remote_code: true" in result.output
    assert not (tmp_path / "mark").exists()


def test_the_recipe_may_allow_it(folder: Path, tmp_path: Path) -> None:
    write_data(tmp_path, records(4))
    call("inspect", write_recipe(tmp_path, folder, model={"trust_remote_code": True}))
    assert (tmp_path / "mark").exists()
