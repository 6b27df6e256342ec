"""``vlmpo chat`` and ``vlmpo serve``: which model, what it is compared with, and that the answers are the model's own;
and what loads with transformers alone where there is no torchvision."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.commands.test_merge import adapted
from tests.commands.test_train import records, write_data, write_recipe
from tests.paths import REPO
from tests.tiny_models import model, noise_image, processor
from vlmpo.cli import app
from vlmpo.commands.chat import Session, show_answers
from vlmpo.commands.chat_web import build_page
from vlmpo.commands.trained import find_trained
from vlmpo.data.records import Message
from vlmpo.errors import ModelError, RecordError, RunError
from vlmpo.generate.base import Generated, GenerationRequest, Sampling
from vlmpo.generate.conversation import Conversation, Speaker
from vlmpo.generate.local import LocalEngine
from vlmpo.generate.server import ServerEngine
from vlmpo.models.loading import load_model, load_processor

QUESTION = "what is it?"
TOKENS = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint a step, beside its base model and an image."""
    folder = tmp_path_factory.mktemp("chat")
    model().save_pretrained(folder / "base")
    processor().save_pretrained(folder / "base")
    noise_image(120, 56, 1).save(folder / "image.png")
    write_data(folder, records(4))
    training = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05}
    result = call("train", write_recipe(folder, folder / "base", training=training))
    assert result.exit_code == 0, result.output
    return folder


def call(*arguments: str, typed: str = "") -> Any:
    return CliRunner().invoke(app, list(arguments), input=typed)


def greedy(folder: Path, image: Path, tiles: int | None = 2) -> str:
    """The answer of the model in ``folder`` by the engine that evaluation uses."""
    engine = LocalEngine(
        load_model(str(folder)), load_processor(str(folder)), Sampling(0.0, 1.0, TOKENS), 1, max_tiles=tiles
    )
    ((answer,),) = engine.generate([GenerationRequest((Message("user", f"<image>\n{QUESTION}"),), (image,), 1, 0)])
    return answer.text


# ---- asked from a pipe ----


@pytest.mark.slow
def test_a_run_and_its_reference_answer_from_a_pipe(trained: Path) -> None:
    """Each line is a question of its own: the second answers are the first; bad lines are said, and passed over."""
    image = trained / "image.png"
    expected = [greedy(trained / "run", image), greedy(trained / "base", image)]
    assert expected[0] != expected[1]
    lines = f"{QUESTION}\n/image nowhere.png\n/what\n{QUESTION}\n"
    result = call("chat", str(trained / "run"), str(image), "--max-new-tokens", str(TOKENS), typed=lines)
    assert result.exit_code == 0, result.output
    for heading, text in zip(("trained", "reference"), expected, strict=True):
        found = re.findall(rf"^{heading}: (.*)$", result.stdout, flags=re.MULTILINE)
        assert [line.removesuffix(" [cut off at the limit of tokens]") for line in found] == [text, text]
    assert "there is no image file nowhere.png" in result.stderr
    assert "/what is no command" in result.stderr
    asked = call("chat", str(trained / "run"), str(trained / "no.png"))
    assert (asked.exit_code, asked.stdout) == (2, "")
    assert "there is no image file" in asked.stderr


@pytest.mark.slow
def test_an_adapter_switched_off_is_the_reference(trained: Path) -> None:
    adapted(trained / "base", trained / "adapter")
    image = trained / "image.png"
    expected = [greedy(trained / "adapter", image, None), greedy(trained / "base", image, None)]
    assert expected[0] != expected[1]
    arguments = ("--max-new-tokens", str(TOKENS))
    result = call("chat", str(trained / "adapter"), str(image), *arguments, typed=QUESTION)
    found = re.findall(r"^(?:trained|reference): (.*)$", result.stdout, flags=re.MULTILINE)
    assert [line.removesuffix(" [cut off at the limit of tokens]") for line in found] == expected
    alone = call("chat", str(trained / "base"), str(image), *arguments, typed=QUESTION)
    assert f"model: {expected[1]}" in alone.stdout
    assert "reference:" not in alone.stdout


# ---- which model ----


@pytest.mark.slow
def test_which_model_of_a_run(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    assert find_trained(str(run)).path == str(run)
    assert find_trained(str(run)).reference == str(trained / "base")
    assert find_trained(str(run / "checkpoint-1")).reference == str(trained / "base")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    assert find_trained(str(run)).what == f"checkpoint-2 of {run}, the newest sound one (the run is interrupted)"
    (run / "checkpoint-2" / "config.json").write_text("{}")
    assert find_trained(str(run)).path == str(run / "checkpoint-1")
    with pytest.raises(RunError, match="checkpoint-2 is damaged"):
        find_trained(str(run / "checkpoint-2"))
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(RunError, match="no sound checkpoint: checkpoint-2 is damaged"):
        find_trained(str(run))
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(RunError, match="no model yet: the run is interrupted"):
        find_trained(str(run))
    with pytest.raises(ModelError, match=f"neither a model nor a run of vlmpo; there are models in {run}"):
        find_trained(str(tmp_path))
    with pytest.raises(ModelError, match="there is no folder"):
        find_trained(str(tmp_path / "absent"))


# ---- turns, and what is shown ----


class Echo:
    """Answers with its name and how many turns and images it was given; refuses one question."""

    batch_size, notices = 1, ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[GenerationRequest] = []

    def generate(self, requests: list[GenerationRequest]) -> Any:
        for request in requests:
            self.asked.append(request)
            refused = request.messages[-1].text.endswith("refuse")
            answer = Generated(f"{self.name} {len(request.messages)} {len(request.images)}", "stop")
            yield RecordError("template_refused", "", "not that") if refused else [answer]


def two(follows: bool = True) -> tuple[Conversation, list[Echo]]:
    engines = [Echo("a"), Echo("b")]
    speakers = [
        Speaker(head, engine, nullcontext) for head, engine in zip(("trained", "reference"), engines, strict=True)
    ]
    return Conversation(speakers, follows=follows), engines  # type: ignore[arg-type]


def test_each_model_goes_on_from_its_own_answers() -> None:
    conversation, (first, second) = two()
    assert [answer.text for answer in conversation.ask("q", ["x.png"])] == ["a 1 1", "b 1 1"]
    with pytest.raises(RecordError):
        conversation.ask("refuse", ["y.png"])
    assert [answer.text for answer in conversation.ask("and now?")] == ["a 3 1", "b 3 1"]
    assert first.asked[-1].messages == (
        Message("user", "<image>\nq"),
        Message("assistant", "a 1 1"),
        Message("user", "and now?"),
    )
    assert second.asked[-1].messages[1] == Message("assistant", "b 1 1")
    conversation.restart()
    assert conversation.ask("q")[0].text == "a 1 0"
    conversation, _ = two(follows=False)
    assert [conversation.ask("q")[0].text for _ in range(2)] == ["a 1 0", "a 1 0"]


def test_a_session_on_a_terminal(tmp_path: Path) -> None:
    """The image given goes with the first question, and after /new again; /image adds one to the next question."""
    noise_image(30, 30, 1).save(tmp_path / "x.png")
    conversation, (engine, _) = two()
    screen = Console(file=io.StringIO(), width=100)
    lines = ["one", "two", f"/image {tmp_path / 'x.png'}", "three", "/new", "four", "/quit", "five"]
    Session(conversation, [tmp_path / "x.png"], screen).talk(iter(lines))
    assert [len(request.images) for request in engine.asked] == [1, 1, 2, 1]
    assert [request.messages[-1].text for request in engine.asked] == [
        "<image>\none",
        "two",
        "<image>\nthree",
        "<image>\nfour",
    ]


@pytest.mark.parametrize(("width", "lines"), [(100, 2), (60, 4)])
def test_side_by_side_where_there_is_room(width: int, lines: int) -> None:
    """Control characters, markup and emoji codes of a model are shown as they are."""
    screen = Console(file=io.StringIO(), width=width, force_terminal=False)
    show_answers(
        ["trained", "reference"], [Generated("\x1b[31m[red] :smile:", "stop"), Generated("", "length")], screen
    )
    shown = [line.rstrip() for line in screen.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert len(shown) == lines
    assert any(line.startswith("\\x1b[31m[red] :smile:") for line in shown)
    assert "".join(shown).endswith("[nothing] [cut off at the limit of tokens]")


def test_the_web_page_asks_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gradio that only records: what the buttons call, and that an image is sent once."""
    made: list[Any] = []

    class Part:
        def __init__(self, *names: Any, **settings: Any) -> None:
            self.names, self.settings, self.calls = names, settings, []
            self.click = self.submit = lambda *call: self.calls.append(call)
            made.append(self)

        def __enter__(self) -> Part:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing to close."""

    names = ("Blocks", "Image", "Row", "Textbox", "Button")
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(**dict.fromkeys(names, Part)))
    conversation, (engine, _) = two()
    build_page(conversation, ["x.png"])
    ask, new = [part.calls[0][0] for part in made if part.names in (("Ask",), ("New conversation",))]
    assert ask("one", "x.png") == ["", "> one\na 1 1\n\n", "> one\nb 1 1\n\n"]
    assert ask("two", "x.png")[1].endswith("> two\na 3 1\n\n")
    assert ask("refuse", "y.png")[1].endswith("error: not that\n\n")
    assert new() == ["", "", ""]
    ask("three", "x.png")
    assert [len(request.images) for request in engine.asked] == [1, 1, 2, 1]


def test_without_gradio_the_page_is_refused() -> None:
    if "gradio" in sys.modules or __import__("importlib.util").util.find_spec("gradio"):
        pytest.skip("gradio is installed")
    result = call("chat", "anything", "--web")
    assert result.exit_code == 2
    assert "pip install 'vlmpo[web]'" in result.stderr


# ---- served ----


def test_what_serve_refuses_before_it_loads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        base = tmp_path / "model"
        base.mkdir()
        (base / "config.json").write_text("{}")
        result = call("serve", str(base), "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "Address already in use; name others by --host and --port" in result.stderr
    monkeypatch.setattr("vlmpo.commands.serve.is_serve_available", lambda: False)
    assert "pip install 'vlmpo[serve]'" in call("serve", str(base)).stderr


@pytest.mark.slow
def test_the_server_answers_as_the_model_does_here(trained: Path) -> None:
    pytest.importorskip("fastapi", reason="transformers' server needs fastapi, uvicorn and openai")
    command = [sys.executable, "-m", "vlmpo", "serve", str(trained / "run"), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "src")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            said = ""
            while (found := re.search(r"on (http://127.0.0.1:\d+/v1)", said)) is None:
                line = server.stderr.readline()
                assert line, said
                said += line
            engine = ServerEngine(found[1], None, Sampling(0.0, 1.0, TOKENS), 1, 60.0, 1)
            assert engine.name == str(trained / "run")
            image = trained / "image.png"
            asked = GenerationRequest((Message("user", f"<image>\n{QUESTION}"),), (image,), 1, 0)
            ((answer,),) = engine.generate([asked])
            assert answer.text == greedy(trained / "run", image, None)
            server.send_signal(signal.SIGINT)
            assert server.stderr.read().splitlines()[-1] == "interrupted by SIGINT"
            assert server.wait(30) == 130
        finally:
            server.kill()


# ---- with transformers alone ----

BARE = """
import sys
sys.modules["torchvision"] = None  # any import of it fails, as if it were not installed
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
ours, llava, picture = sys.argv[1:]

model = AutoModelForImageTextToText.from_pretrained(llava)
processor = AutoProcessor.from_pretrained(llava)
assert type(processor.image_processor).__name__.endswith("Pil")
content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "what is it?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
assert model.generate(**inputs, do_sample=False, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]

try:
    AutoProcessor.from_pretrained(ours)
except ImportError as error:
    assert "Torchvision" in str(error)
else:
    raise AssertionError("transformers no longer needs torchvision for InternVL's processor: change the docs")
model = AutoModelForImageTextToText.from_pretrained(ours)
tokenizer = AutoTokenizer.from_pretrained(ours)
pixels = AutoImageProcessor.from_pretrained(ours, backend="pil")(
    images=[Image.open(picture)], crop_to_patches=True, max_patches=2, return_tensors="pt"
)
tiles = int(pixels.pop("num_patches")[0])
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
    tokenize=False, add_generation_prompt=True,
)
place = "<img>" + "<IMG_CONTEXT>" * tiles * model.config.image_seq_length + "</img>"
prompt = prompt.replace("<IMG_CONTEXT>", place)
inputs = tokenizer(prompt, return_tensors="pt")
media = tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<img>", "</img>", "<video>"])
new = model.generate(**inputs, **pixels, do_sample=False, max_new_tokens=8, suppress_tokens=media)
print(tokenizer.decode(new[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
assert "vlmpo" not in sys.modules
"""


@pytest.mark.slow
def test_what_loads_without_torchvision_and_without_vlmpo(trained: Path, tmp_path: Path) -> None:
    """LLaVA whole; of a trained InternVL the model, its tokenizer and its image processor on Pillow, by which it
    answers as here. The image is as large as a tile: Pillow rounds otherwise when it resizes."""
    from tests.zoo import FAMILIES

    llava = FAMILIES["llava-1.5"]
    llava.model(0).save_pretrained(tmp_path / "llava")
    llava.processor().save_pretrained(tmp_path / "llava")
    noise_image(56, 56, 3).save(tmp_path / "tile.png")
    command = [sys.executable, "-c", BARE, str(trained / "run"), str(tmp_path / "llava"), str(tmp_path / "tile.png")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == greedy(trained / "run", tmp_path / "tile.png")
