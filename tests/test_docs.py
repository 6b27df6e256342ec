"""The documentation against the code: recipes parse, commands and options exist, links lead somewhere, examples run."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import vlmpo
from tests.paths import REPO
from tests.test_architecture import FLOORS
from vlmpo.cli import app
from vlmpo.recipe import Recipe

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
SCRIPTS = sorted((REPO / "examples").glob("*.sh"))
# Commands of others that the pages show; what follows them is not ours to check.
FOREIGN = {"vllm", "pip", "sbatch", "hf"}
BASE = {
    "model": {"path": "some/model"},
    "data": {"train": ["pairs.jsonl"]},
    "build": {"questions": "questions.jsonl"},
    "evaluate": {"questions": "questions.jsonl"},
}


def page_id(page: Path) -> str:
    return page.relative_to(REPO).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of ``languages``."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def all_blocks(*languages: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page_id(page)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, *languages), start=1)
    ]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The command line's own loader, whatever module it is in."""
    from vlmpo import cli

    return cli.load_recipe(path, overrides)


# ---- recipes ----


def merged(base: dict[str, Any], fragment: dict[str, Any]) -> dict[str, Any]:
    both = {key: base[key] for key in base if key not in fragment}
    for key, value in fragment.items():
        mapping = isinstance(value, dict) and isinstance(base.get(key), dict)
        both[key] = {**base[key], **value} if mapping else value
    return both


@functools.cache
def training_keys() -> frozenset[str]:
    from vlmpo.train.config import MPOConfig

    return frozenset(field.name for field in dataclasses.fields(MPOConfig))


@pytest.mark.parametrize("text", all_blocks("yaml"))
def test_every_recipe_parses(tmp_path: Path, text: str) -> None:
    """A block with a model and something to do is a whole recipe; any other is a part of one."""
    block = yaml.safe_load(text)
    whole = "model" in block and block.keys() & {"data", "build", "evaluate"}
    file = tmp_path / "recipe.yaml"
    file.write_text(text if whole else yaml.safe_dump(merged(BASE, block)), encoding="utf-8")
    recipe = load_recipe(file, [])
    assert recipe.training.keys() <= training_keys()


def section_keys() -> Iterator[str]:
    """``section.key`` of every recipe key but those of ``training``."""
    for section, field in Recipe.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from (f"{section}.{key}" for key in kind.model_fields)


def named_keys(text: str) -> set[str]:
    """Recipe keys in backticks, as ``section.key``; ``loss.weights.nll`` counts as ``loss.weights``."""
    sections = "|".join(Recipe.model_fields)
    return {f"{section}.{key}" for section, key in re.findall(rf"`({sections})\.(\w+)[^`]*`", text)}


def test_every_recipe_key_is_documented() -> None:
    documented = named_keys("\n".join(prose(page) for page in PAGES))
    own = {"training.max_tokens_per_row", "training.learning_rates", "training.ema_decay"}
    own |= {"training.deterministic"}
    assert sorted({*section_keys(), *own} - documented) == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_recipe_key_in_the_text_exists(page: Path) -> None:
    known = {*section_keys(), *(f"training.{key}" for key in training_keys())}
    # `data` and `loss` are also a module and a metric
    files = {key for key in named_keys(prose(page)) if key.endswith(".py")}
    assert sorted(named_keys(prose(page)) - known - files) == []


# ---- commands ----


def command_lines(text: str) -> list[str]:
    """The commands of a shell block or script: comments off, continued lines joined."""
    joined = text.replace("\\\n", " ")
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in stripped if line and not line.startswith("set -") and not re.match(r"\w+=\S*$", line)]


def shell_lines() -> list[Any]:
    sources = [(page_id(page), block) for page in PAGES for block in blocks(page, "bash", "sh")]
    sources += [(page_id(script), script.read_text(encoding="utf-8")) for script in SCRIPTS]
    return [pytest.param(line, id=f"{name}: {line[:50]}") for name, text in sources for line in command_lines(text)]


def parse_command(arguments: list[str]) -> dict[str, Any]:
    """Parse arguments of ``vlmpo`` as the command line does, without running them; returns the parameters."""
    import typer

    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    return command.make_context(command.name, arguments).params


def check_line(words: list[str], folder: Path) -> None:
    """Fail unless the command exists with these options."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, arguments = Path(words[0]).name, words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program in ("torchrun", "python") and "-m" in arguments:
        module, *rest = arguments[arguments.index("-m") + 1 :]
        if module == "vlmpo":
            check_line(["vlmpo", *rest], folder)
        elif module == "pytest":
            assert all((REPO / word).exists() for word in rest if not word.startswith("-"))
        else:
            assert importlib.util.find_spec(module) is not None
    elif program == "vlmpo":
        overrides = parse_command(arguments).get("overrides") or []
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(BASE), encoding="utf-8")
        assert load_recipe(file, list(overrides)).training.keys() <= training_keys()
    else:
        assert program in FOREIGN or (REPO / words[0]).is_file(), f"{program} is not known here"


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_exists(tmp_path: Path, line: str) -> None:
    check_line(shlex.split(line), tmp_path)


@pytest.mark.parametrize(
    "line",
    ["vlmpo trian r.yaml", "vlmpo train", "vlmpo merge a b --bse c", "vlmpo train r.yaml loss.bta=1", "make tset"],
)
def test_a_wrong_command_is_noticed(tmp_path: Path, line: str) -> None:
    with pytest.raises(Exception, match=r"."):
        check_line(shlex.split(line), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_in_the_text_exists(page: Path) -> None:
    import typer

    root: Any = typer.main.get_command(app)
    for line in re.findall(r"`vlmpo ([a-z][^`]*)`", prose(page)):
        command: Any = root
        for word in line.split():
            if hasattr(command, "commands"):
                assert word in command.commands, f"vlmpo {line}"
                command = command.commands[word]
            elif word.startswith("--"):
                assert word in {option for param in command.params for option in param.opts}, f"vlmpo {line}"
    for target in re.findall(r"`make ([\w-]+)`", prose(page)):
        check_line(["make", target], REPO)


# ---- links ----


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


@pytest.mark.parametrize("page", [*PAGES, *(REPO / "benchmarks/results").glob("*.md")], ids=page_id)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(REPO), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_in_the_text_exists(page: Path) -> None:
    """Files named in backticks by their path from the root of the repository."""
    roots = "src|tests|docs|examples|recipes|benchmarks"
    named = re.findall(rf"`((?:{roots})/[\w./-]+)(?: [^`]*)?`", prose(page))
    assert [name for name in named if not (REPO / name).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(REPO / link.partition("#")[0]).resolve() for link in links(REPO / "README.md")}
    assert [page_id(page) for page in PAGES if page not in linked and page.name != "README.md"] == []


def test_the_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


# ---- the architecture ----

ARCHITECTURE = REPO / "docs" / "architecture.md"


def test_the_floors_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    drawn = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)`", names)}
    there = {path.stem for path in (REPO / "src" / "vlmpo").iterdir() if path.suffix == ".py" or path.is_dir()}
    packages = {name: floor for floor, names in enumerate(FLOORS) for name in names if name in there}
    for name in ("__init__", "__main__", "torchvision_shim"):
        packages.pop(name, None)
    assert {name: drawn.get(name) for name in packages} == packages


def functions(source: str) -> set[str]:
    """``name`` and ``Class.name`` of the functions of a module."""
    found = set()
    for node in ast.parse(source).body:
        found |= {node.name} if isinstance(node, ast.FunctionDef) else set()
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("value", ["pixel_values", "chosen"])
def test_the_walks_pass_through_functions_that_exist(value: str) -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8").partition(f"### `{value}`")[2]
    section = re.split(r"^### |<!-- walks: end", text, flags=re.MULTILINE)[0]
    hops = re.findall(r"^\| (\d+) \| (\S+) \| `(.*?)` \|", section, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in hops] == list(range(1, len(hops) + 1))
    assert 5 <= len(hops) <= 14
    for _, file, function in hops:
        assert function in functions((REPO / "src" / "vlmpo" / file).read_text(encoding="utf-8")), f"{file}: {function}"


def test_the_modules_in_the_changelog_exist() -> None:
    rows = re.findall(r"^\| `vlmpo\..* \| (.*) \|$", (REPO / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 40
    now = [name for names in rows for name in re.findall(r"`([\w.]+)`", names)]
    assert [name for name in now if importlib.util.find_spec(name) is None] == []


def test_every_public_name_is_documented() -> None:
    text = "\n".join(prose(page) for page in PAGES)
    assert [name for name in vlmpo.__all__ if f"`{name}`" not in text] == []


# ---- English ----

# Words that the pages avoid, each with what to write instead.
AVOIDED = {
    r"\b(trunk|branch)(s|es)?\b": "prompt, response",
    r"\bis told\b|\bare told\b|\btells (you|the user)\b": "is printed, is logged",
    r"\bhouse\b|\bstorey\b|\broof\b": "package, floor",
    r"\bmend\b": "fix, correct",
    r"\balike\b": "equal, the same",
    r"\bheld against\b": "compared with",
    r"\bgoes on with\b": "continues with",
    r"\banew\b": "again",
    r"\bthe run says\b": "the run prints",
}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_pages_avoid_words_a_reader_stumbles_over(page: Path) -> None:
    text = prose(page)
    if page.name == "CHANGELOG.md":
        text = re.sub(r"^\|.*$|instead of trunk and branch", "", text, flags=re.MULTILINE)
    found = {instead: match[0] for words, instead in AVOIDED.items() if (match := re.search(words, text))}
    assert found == {}


# ---- what the pages run ----


@pytest.mark.parametrize("text", all_blocks("python"))
def test_python_blocks_compile(text: str) -> None:
    compile(text, "block", "exec")


@pytest.mark.parametrize("text", all_blocks("json"))
def test_json_blocks_parse(text: str) -> None:
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())


def test_the_objective_alone_runs() -> None:
    (block,) = blocks(REPO / "docs" / "objective.md", "python")
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["output"].loss.requires_grad
    assert names["delta"].value == pytest.approx(0.1 * (0.5 + 0.5 - 0.5 - 1.0) / 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, ``pairs.jsonl`` and its images."""
    from tests.tiny_models import model, noise_image, processor

    folder = tmp_path_factory.mktemp("docs")
    model().save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    lines = []
    for number, colour in enumerate(("red", "blue", "green", "red", "blue")):
        noise_image(50, 50, number).save(folder / "images" / f"{number}.png")
        pair = {"question": "<image>\nwhat colour is it?", "chosen": f"the colour is {colour}", "rejected": "two three"}
        lines.append(json.dumps({"image": f"images/{number}.png", **pair}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def assert_trained(folder: Path) -> None:
    from vlmpo.models.loading import load_model, load_processor

    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = losses[0]
    assert first["loss"] == pytest.approx(0.8318 + first["loss/nll"], abs=1e-3)
    assert load_model(str(folder)) is not None
    assert load_processor(str(folder)) is not None


@pytest.mark.slow
def test_the_readmes_python_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(REPO / "README.md", "python")
    assert "OpenGVLab/InternVL3-2B-hf" in block
    monkeypatch.chdir(tiny)
    exec(block.replace("OpenGVLab/InternVL3-2B-hf", "model"), {})
    assert_trained(tiny / "runs" / "mpo")


@pytest.mark.slow
def test_the_example_in_python_runs(tiny: Path) -> None:
    spec = importlib.util.spec_from_file_location("example_train", REPO / "examples" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(tiny / "model"), str(tiny / "pairs.jsonl"), str(tiny / "example"))
    assert_trained(tiny / "example")


def test_the_examples_recipe_has_all_stages() -> None:
    recipe = load_recipe(REPO / "recipes" / "pipeline.yaml", [])
    assert recipe.build is not None
    assert recipe.evaluate is not None
    assert [source.path for source in recipe.data.train] == [f"{recipe.build.output_dir}/pairs_correctness.jsonl"]
    assert recipe.training.keys() <= training_keys()
