"""The command line: exit codes, messages, what it imports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import typer
from typer.testing import CliRunner

from tests.paths import REPO
from vlmpo.cli import app
from vlmpo.errors import RecipeError, RecordError
from vlmpo.exit_codes import exit_codes

MINIMAL = "model: {path: some/model}\ndata: {train: [pairs.jsonl]}\nbuild: {questions: q.jsonl}\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return str(path)


@pytest.fixture
def stage(monkeypatch):
    """Puts a function in the place of a stage, as the lazy import will find it."""

    def place(module: str, name: str, function) -> None:
        fake = types.ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)

    return place


def call(*args: str):
    return CliRunner().invoke(app, list(args))


def raising(error: BaseException):
    def function(*_):
        raise error

    return function


def test_train_gets_the_parsed_recipe(recipe, stage):
    seen = []
    stage("vlmpo.commands.train", "train", lambda parsed, *given: seen.append((parsed, *given)))
    result = call("train", recipe, "loss.beta=0.2", "training.max_steps=-1")
    assert result.exit_code == 0
    assert call("train", recipe, "--allow-changes", "loss.beta,data.files", "--overwrite").exit_code == 0
    assert seen[0][0].loss.beta == 0.2
    assert seen[0][0].training == {"max_steps": -1, "output_dir": "runs/r"}
    assert [tuple(given) for _, *given in seen] == [([], False), (["loss.beta", "data.files"], True)]


def test_inspect_and_demo_get_their_options(recipe, stage):
    seen = []
    stage("vlmpo.commands.inspect", "inspect", lambda parsed, *given: seen.append((parsed.model.path, *given)))
    stage("vlmpo.commands.demo", "demo", lambda output, seed: seen.append((str(output), seed)))
    assert call("inspect", recipe, "--pairs", "3", "--card", "80").exit_code == 0
    assert call("inspect", recipe, "model.path=other").exit_code == 0
    assert call("demo").exit_code == 0
    assert call("demo", "--output", "there", "--seed", "7").exit_code == 0
    assert seen == [("some/model", 3, 80.0), ("other", 1, None), ("runs/demo", 0), ("there", 7)]


def test_the_users_mistakes_exit_2_with_one_message(recipe, stage):
    stage("vlmpo.commands.train", "train", raising(RecordError("missing_image", "a.jsonl:3", "no image [x].png")))
    result = call("train", recipe)
    assert result.exit_code == 2
    assert result.stderr == "error: a.jsonl:3: no image [x].png [missing_image]\n"
    assert result.stdout == ""


def test_a_wrong_recipe_fails_before_the_stage_is_imported(recipe, stage):
    stage("vlmpo.commands.train", "train", raising(AssertionError("the stage ran")))
    result = call("train", recipe, "loss.bta=1")
    assert result.exit_code == 2
    assert result.stderr == "error: command line: loss.bta: unknown key; did you mean loss.beta?\n"


@pytest.mark.parametrize("args", [["train"], ["nosuch"], ["demo", "--seed", "x"], ["demo", "--nosuch"]])
def test_argument_errors_exit_2(args):
    result = call(*args)
    assert result.exit_code == 2
    assert "Error" in result.stderr


def test_our_own_faults_exit_1_with_a_traceback(recipe, stage):
    for error in (ZeroDivisionError("ours"), EOFError("ours"), ValueError("ours")):
        stage("vlmpo.commands.train", "train", raising(error))
        result = call("train", recipe)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert f"{type(error).__name__}: ours" in result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device", "/data/run/x"),
            "/data/run/x: No space left on device; free some space",
        ),
        (PermissionError(13, "Permission denied", "/data/x"), "/data/x: Permission denied; check its permissions"),
        (FileNotFoundError(2, "No such file or directory", "gone.png"), "gone.png: No such file or directory"),
        (OSError("cannot reach the Hub\nsee https://..."), "cannot reach the Hub"),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "Read-only file system; "),
    ],
)
def test_errors_of_the_system_are_one_line(recipe, stage, error, line):
    stage("vlmpo.commands.train", "train", raising(error))
    result = call("train", recipe)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {line}")
    assert len(result.stderr.splitlines()) == 1


def test_control_characters_in_messages_and_tracebacks_are_shown(recipe, stage):
    for error, code in ((RecordError("bad", "a\x1b[2J:1", "no \u202e"), 2), (ValueError("ours\x1b[2J"), 1)):
        stage("vlmpo.commands.train", "train", raising(error))
        result = call("train", recipe)
        assert result.exit_code == code
        assert "\x1b" not in result.stderr
        assert r"\x1b[2J" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_code(recipe, stage, number, code):
    def sleep(*_):
        os.kill(os.getpid(), number)
        time.sleep(5)

    stage("vlmpo.commands.train", "train", sleep)
    stage("vlmpo.commands.sample", "sample", sleep)
    for command, further in (("train", True), ("sample", False)):
        result = call(command, recipe)
        assert result.exit_code == code
        assert result.stderr.startswith(f"interrupted by {number.name}; to go on: vlmpo {command} {recipe}")
        assert ("training.resume_from_checkpoint=true" in result.stderr) == further
    given = (
        "training.max_steps=3",
        "training.resume_from_checkpoint=runs/a/checkpoint-1",
        "--allow-changes",
        "seed,lr",
    )
    on = "training.max_steps=3 training.resume_from_checkpoint=true --allow-changes seed,lr\n"
    assert call("train", recipe, *given).stderr.endswith(f"{recipe} {on}")


def test_a_lost_rank_is_one_line(recipe, stage, monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5")
    stage("vlmpo.commands.train", "train", raising(error))
    assert call("train", recipe).exit_code == 1  # alone it is no rank
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call("train", recipe)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: another rank has ended (")


def test_interrupting_exits_130(recipe, stage):
    stage("vlmpo.commands.train", "train", raising(KeyboardInterrupt()))
    result = call("train", recipe)
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_only_rank_0_speaks_for_the_job(recipe, stage, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    stage("vlmpo.commands.train", "train", raising(RecipeError("the same on every rank")))
    result = call("train", recipe)
    assert (result.exit_code, result.stderr) == (2, "")
    stage("vlmpo.commands.train", "train", raising(RecordError("bad_json", "a.jsonl:1", "met by this rank alone")))
    assert call("train", recipe).stderr == "error on rank 3: a.jsonl:1: met by this rank alone [bad_json]\n"


def test_version():
    result = call("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"vlmpo \d+\.\d+\.\d+\n", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["inspect", "--help"], ["demo", "--help"]])
def test_help_imports_no_torch(args):
    code = (
        "import sys\nfrom vlmpo.cli import app\n"
        f"try:\n    app({args!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_python_dash_m_is_the_command(tmp_path):
    missing = str(tmp_path / "none.yaml")
    done = subprocess.run([sys.executable, "-m", "vlmpo", "train", missing], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: cannot read the recipe {missing}: No such file or directory\n"


def test_a_rank_leaves_its_group_at_the_end(tmp_path):
    """Otherwise gloo's threads abort the process now and then, as the interpreter ends."""
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with exit_codes():
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_a_signal_that_a_library_catches_is_no_error_of_ours(capsys) -> None:
    """A library that is imported may catch the interruption, and fails later as it is half there."""

    def run() -> None:
        with exit_codes("vlmpo train r.yaml"):
            with contextlib.suppress(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1.0)
            raise RuntimeError("module has no attribute")

    with pytest.raises(typer.Exit) as end:
        run()
    assert end.value.exit_code == 143
    assert capsys.readouterr().err == "interrupted by SIGTERM; to go on: vlmpo train r.yaml\n"


def test_a_torch_that_is_half_imported_is_left_alone(monkeypatch) -> None:
    """What an interrupted import of torch leaves: its submodules, and no torch."""
    monkeypatch.delitem(sys.modules, "torch")
    half = types.ModuleType("torch.distributed")
    monkeypatch.setitem(sys.modules, "torch.distributed", half)
    with pytest.raises(typer.Exit) as end, exit_codes():
        raise RecipeError("beta: must be positive")
    assert end.value.exit_code == 2
    assert "torch" not in sys.modules
