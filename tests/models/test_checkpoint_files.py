"""Folders without a model that can be loaded: one line says why, and nothing is allocated for them."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import constants

from tests.commands.test_train import call
from tests.zoo import FAMILIES
from vlmpo.errors import ModelError
from vlmpo.models import checkpoint_files
from vlmpo.models.adapters import is_adapter
from vlmpo.models.loading import load_model, load_processor

FAMILY = FAMILIES["internvl-qwen2"]
AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    FAMILY.model(0).save_pretrained(folder)
    FAMILY.processor().save_pretrained(folder)
    return folder


def with_config(whole: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the checkpoint whose config has other values; None takes one out."""
    shutil.copytree(whole, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a model was about to be built")

    for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"vlmpo.models.loading.{name}.from_pretrained", refuse)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether to run code"))


def refusals(path: Path | str) -> list[str]:
    """What loading the model, and loading its processor, say; one line each."""
    said = []
    for load in (load_model, load_processor):
        with pytest.raises(ModelError) as caught:
            load(str(path))
        said.append(str(caught.value))
        assert "\n" not in said[-1]
        assert str(path) in said[-1]
    return said


# ---- code of its own ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "auto_map": AUTO_MAP}, "-HF"),
        ({"model_type": "internvl_chat", "architectures": None}, "original layout"),
        ({"model_type": "intern_something", "architectures": ["InternVLChatModel"]}, "-HF"),
        ({"model_type": "minicpmv", "architectures": ["MiniCPMV"], "auto_map": AUTO_MAP}, "'minicpmv'"),
        (
            {"model_type": "ovis", "architectures": ["Ovis"], "auto_map": AUTO_MAP},
            "set model.trust_remote_code: true",
        ),
        ({"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}, "no model of type 'llava_llama'"),
    ],
)
def test_a_model_that_transformers_does_not_know(
    tmp_path: Path, whole: Path, changes: dict[str, Any], words: str
) -> None:
    for said in refusals(with_config(whole, tmp_path / "model", **changes)):
        assert words in said


def test_code_beside_a_model_that_transformers_knows_is_no_fault(tmp_path: Path, whole: Path) -> None:
    """As many checkpoints have it: transformers' own class is taken."""
    folder = with_config(whole, tmp_path / "model", auto_map=AUTO_MAP)
    assert type(load_processor(str(folder))) is type(FAMILY.processor())
    with pytest.raises(pytest.fail.Exception, match="about to be built"):
        load_model(str(folder))


def test_a_kind_registered_by_the_user_is_known(tmp_path: Path, whole: Path) -> None:
    class Own(transformers.PreTrainedConfig):
        model_type = "a_kind_of_my_own"

    transformers.AutoConfig.register("a_kind_of_my_own", Own)
    folder = with_config(whole, tmp_path / "model", model_type="a_kind_of_my_own", auto_map=AUTO_MAP)
    assert type(load_processor(str(folder))) is type(FAMILY.processor())


# ---- no model there ----


def test_an_empty_folder(tmp_path: Path) -> None:
    assert all("it is an empty folder" in said for said in refusals(tmp_path))


@pytest.mark.parametrize("name", ["llama-7b", "qwen2_vl", "internvl"])
def test_weights_without_a_config(tmp_path: Path, whole: Path, name: str) -> None:
    """transformers would guess the kind by the folder's name, and build a model of 7 billion parameters."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(whole / "model.safetensors", folder)
    assert all(
        "it has no config.json, so there is no model in it, only model.safetensors" in s for s in refusals(folder)
    )


@pytest.mark.parametrize("name", ["llama-7b", "qwen2_vl", "internvl"])
def test_a_config_without_a_kind(tmp_path: Path, whole: Path, name: str) -> None:
    folder = with_config(whole, tmp_path / name, model_type=None)
    assert all("its config.json names no model_type" in said for said in refusals(folder))


def test_a_processor_without_a_model(tmp_path: Path) -> None:
    """It is enough to look at data."""
    FAMILY.processor().save_pretrained(tmp_path)
    assert type(load_processor(str(tmp_path))) is type(FAMILY.processor())
    with pytest.raises(ModelError, match=r"no model can be loaded from .*: it has no config\.json"):
        load_model(str(tmp_path))


def test_a_folder_above_the_model(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run" / "checkpoint-8")
    assert all(f"{tmp_path / 'run' / 'checkpoint-8'} holds one" in said for said in refusals(tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "its config.json cannot be read"), ("[1]", "holds a list"), ("", "cannot be read"), ("null", "NoneType")],
)
def test_a_config_that_is_none(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert all(words in said for said in refusals(tmp_path))


def test_no_folder_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_text("weights")
    assert all("it is a file" in said for said in refusals(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()  # "runs/sft" might be a name on the hub, but not here
    for missing in (tmp_path / "nowhere", "./nowhere", "a/b/c", "runs/sft"):
        assert all("there is no such folder" in said for said in refusals(missing))


def test_a_name_is_not_looked_for_where_there_is_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, at once, unless the Hub's cache has it, a proxy asks for it, or the Hub has an address."""
    asked: list[str] = []

    def no_address(host: str, *_: Any) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(checkpoint_files, "getproxies", dict)
    monkeypatch.setattr(checkpoint_files.socket, "getaddrinfo", no_address)
    for said in refusals("someone/model"):
        assert "there is no such folder here, and it cannot be looked for on the Hub: hub.example cannot be" in said
    assert not is_adapter("someone/model")
    assert set(asked) == {"hub.example"}
    assert not checkpoint_files.can_be_looked_for("someone/model")
    (tmp_path / "cache" / "models--someone--model").mkdir(parents=True)
    assert checkpoint_files.can_be_looked_for("someone/model")
    assert not checkpoint_files.can_be_looked_for("other/model")
    monkeypatch.setattr(checkpoint_files, "getproxies", lambda: {"https": "http://proxy.example"})
    assert checkpoint_files.can_be_looked_for("other/model")


def test_only_an_adapter(tmp_path: Path, whole: Path) -> None:
    """Its base is looked for and looked at, too."""
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    original = with_config(whole, tmp_path / "original", model_type="internvl_chat")
    for base, words in (
        (None, "names no base model"),
        (str(tmp_path / "nowhere"), "there is no such folder"),
        (str(original), "original layout"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": base}))
        assert all(words in said for said in refusals(tmp_path))


# ---- no processor beside the model ----


def test_a_model_that_sees_beside_a_tokenizer_alone(tmp_path: Path, whole: Path) -> None:
    shutil.copy(whole / "config.json", tmp_path)
    FAMILY.processor().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it holds no image processor; put the files of the model's own there"):
        load_processor(str(tmp_path))


def test_a_model_alone(tmp_path: Path, whole: Path) -> None:
    shutil.copy(whole / "config.json", tmp_path)
    with pytest.raises(ModelError, match="it holds no tokenizer and no image processor"):
        load_processor(str(tmp_path))
    FAMILIES["llama-text"].model(0).config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it holds no tokenizer; put"):
        load_processor(str(tmp_path))


# ---- on the command line ----


@pytest.mark.parametrize("command", ["train", "inspect", "sample"])
def test_one_line_and_exit_code_two(tmp_path: Path, whole: Path, command: str) -> None:
    folder = with_config(whole, tmp_path / "model", model_type="internvl_chat", auto_map=AUTO_MAP)
    (tmp_path / "pairs.jsonl").write_text('{"question": "what?", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "questions.jsonl").write_text('{"question": "what?", "answer": "a"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {folder}}}\ndata: {{train: [pairs.jsonl]}}\n"
        f"build: {{questions: questions.jsonl, output_dir: {tmp_path / 'out'}}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    result = call(command, str(recipe))
    assert result.exit_code == 2, result.output
    assert "original layout (InternVLChatModel)" in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
