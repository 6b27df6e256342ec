"""The command line. Parses the recipe first; imports the command, and torch with it, only then.

Exit codes: 0 done; 2 the recipe, the data, the arguments or the disk are at fault (one message, no traceback); 130 and
143 interrupted by Ctrl-C and by SIGTERM; 1 any other error.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vlmpo.argument_kinds import check_recipe_argument, check_run_argument, check_sections, looks_like_path, no_command
from vlmpo.errors import RecipeError
from vlmpo.exit_codes import complain, exit_codes
from vlmpo.interrupt import SIGNALS, ignore_signals
from vlmpo.options import answer_options
from vlmpo.recipe import Recipe
from vlmpo.recipe_yaml import load_recipe


class _RecipeCommand(TyperCommand):
    """A command that takes a recipe and overrides, and answers options of other tools by what to write instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        if (told := answer_options(args, known)) is not None:
            complain(RecipeError(told))
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


class _Group(TyperGroup):
    """Commands; given a file or folder in the place of a command's name, it says which command wants that."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and looks_like_path(args[0]):
            with exit_codes():
                raise RecipeError(no_command(str(ctx.command_path), Path(args[0])))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Group,
    help="Mixed Preference Optimization for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help and plain usage errors: they read the same in a log
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides, e.g. loss.beta=0.2", show_default=False),
]


class Dtype(StrEnum):
    """Dtypes that merged weights can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmpo {version('vlmpo')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Mixed Preference Optimization for vision-language models."""


@app.command()
def init(
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Pairs, or questions: a file, a folder or a Hub name.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="PATH", help="A checkpoint's folder or Hub name.")] = None,
    output: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a recipe fitted to your data and model.

    What is not named is looked for in the current folder. Prints the commands to go on with.
    """
    with exit_codes():
        from vlmpo.commands.init import init as run

        run(data, model, output)


@app.command(cls=_RecipeCommand)
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_changes: Annotated[
        str,
        typer.Option(metavar="KEY[,KEY]", help="Keys that may differ from those of the run that is resumed."),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do all that comes before the first step; train and write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in the run folder first; files of others stay.")
    ] = False,
) -> None:
    """Train a model.

    The run folder is the recipe's training.output_dir, runs/<name of the recipe> by default. With
    training.resume_from_checkpoint=true the same command starts a run, goes on with it, and leaves it once finished.
    """
    allowed = [key for key in allow_changes.split(",") if key]
    go_on = [_RESUME, *(["--allow-changes", ",".join(allowed)] if allowed else [])]
    with _parsed("train", recipe, overrides, go_on) as parsed:
        if dry_run:
            from vlmpo.commands.dry_run import dry_run as try_out

            try_out(parsed, allowed, overwrite)
            return
        from vlmpo.commands.train import train as run

        run(parsed, allowed, overwrite)


@app.command(cls=_RecipeCommand)
def cache(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Compute the reference's log-probs ahead of training.

    For recipes with reference.kind: cache. Training then reads them and loads no reference model.
    """
    with _parsed("cache", recipe, overrides) as parsed:
        from vlmpo.commands.train import cache as run

        run(parsed)


@app.command(cls=_RecipeCommand)
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Evaluate a trained model on held-out pairs and questions.

    The recipe's evaluate section names the model, a model to compare it with, and the questions.
    """
    with _parsed("evaluate", recipe, overrides) as parsed:
        from vlmpo.commands.evaluate import evaluate as run

        run(parsed)


@app.command(cls=_RecipeCommand)
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=0, help="How many pairs to show as the model sees them.")] = 1,
    card: Annotated[
        float | None, typer.Option(min=1, help="GiB of the card to train on, for the estimate of memory.")
    ] = None,
) -> None:
    """Show the pairs as the model sees them.

    Scored tokens are marked. Also lists lengths and tiles, the pairs that are dropped, with the reason, and what the
    run will take of a card's memory (by default this machine's).
    """
    with _parsed("inspect", recipe, overrides) as parsed:
        from vlmpo.commands.inspect import inspect as run

        run(parsed, pairs, card)


@app.command(cls=_RecipeCommand)
def sample(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Sample responses to questions.

    Reads the recipe's build section; writes responses.jsonl in build.output_dir, runs/<name of the recipe>/build by
    default. Started again after a stop, it samples only the responses that are missing.
    """
    with _parsed("sample", recipe, overrides) as parsed:
        from vlmpo.commands.sample import sample as run

        run(parsed)


pair_app = typer.Typer(cls=_Group, help="Pair sampled responses.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(pair_app, name="pair")


@pair_app.command("correctness", cls=_RecipeCommand)
def pair_correctness(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Pair correct responses with wrong ones.

    Reads the responses in build.output_dir; writes there the pairs, and the questions whose responses are all correct
    (easy) or all wrong (hard).
    """
    with _parsed("pair correctness", recipe, overrides) as parsed:
        from vlmpo.commands.pair import correctness as run

        run(parsed)


@pair_app.command("dropout-ntp", cls=_RecipeCommand)
def pair_dropout_ntp(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Pair responses with their first half, continued without the image.

    For questions without a checkable answer. Started again after a stop, it generates only what is missing.
    """
    with _parsed("pair dropout-ntp", recipe, overrides) as parsed:
        from vlmpo.commands.pair import dropout_ntp as run

        run(parsed)


@app.command()
def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A run folder, checkpoint or adapter folder.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base model, instead of the one the adapter names.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the merged weights.")] = Dtype.float32,
) -> None:
    """Merge a LoRA adapter into its base model.

    Writes a whole model and its processor, which transformers can load, to the output folder.
    """
    with exit_codes():
        check_run_argument("merge", adapter)
        from vlmpo.commands.merge import merge as run

        run(adapter, output, base, dtype.value)


@app.command()
def chat(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run folder, checkpoint, model or adapter.", show_default=False),
    ],
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE", help="Images to ask about.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most; by default as the recipe evaluates.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="Open a web page on this machine (needs vlmpo[web]).")] = False,
) -> None:
    """Ask a trained model and its reference side by side.

    On a terminal questions follow one another; from a pipe each line is a question of its own.
    """
    with exit_codes():
        from vlmpo.commands.chat import chat as run_chat

        run_chat(run, images or [], temperature, max_new_tokens, web)


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run folder, checkpoint, model or adapter.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a model by transformers' OpenAI-compatible chat server.

    Works beside a CPU build of torch too, where transformers serve itself does not start.
    """
    with exit_codes():
        from vlmpo.commands.serve import serve as run

        run(model, host, port)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, of evaluations or of a demo.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write into, instead of the run's own.", show_default=False)
    ] = None,
) -> None:
    """Write a report of one run, or of several over one another.

    An HTML page that needs no network, report.html, and a picture of the main curves, report.png. Training, evaluation
    and demo write it by themselves.
    """
    with exit_codes():
        for folder in runs:
            check_run_argument("report", folder)
        from vlmpo.commands.report import report as run

        run(runs, output)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the data, the models and the logs.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the images, the model and the training.")] = 0,
) -> None:
    """Align a tiny model on a drawn task.

    Draws a small visual task, builds a tiny InternVL, warms it up and aligns it with MPO; takes minutes on two cores.
    """
    with exit_codes():
        from vlmpo.commands.demo import demo as run

        run(output, seed)


_RESUME = "training.resume_from_checkpoint=true"


@contextmanager
def _parsed(command: str, recipe: Path, overrides: list[str] | None, go_on: Sequence[str] = ()) -> Iterator[Recipe]:
    """Yield the recipe; see :func:`exit_codes`. ``go_on`` is what an interrupted command goes on with."""
    key = _RESUME.partition("=")[0]
    kept = [override for override in overrides or [] if override.partition("=")[0] != key or not go_on]
    with exit_codes(f"vlmpo {command} {shlex.join([str(recipe), *kept, *go_on])}"):
        check_recipe_argument(command, recipe)
        parsed = load_recipe(recipe, overrides or [])
        check_sections(command, recipe, parsed)
        yield parsed


def main() -> None:
    """Run the ``vlmpo`` command."""
    try:
        app(prog_name="vlmpo")
    except SystemExit as end:
        if end.code in {128 + number for number in SIGNALS}:
            ignore_signals()  # taking the interpreter down takes seconds: a launcher's repetition finds the code set
        raise
