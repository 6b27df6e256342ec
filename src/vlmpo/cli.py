"""The command line: one command a stage. Parses first; imports the stage, and torch with it, only then.

Exit codes: 0 done; 2 the recipe, the data or the arguments are at fault (one message, no traceback); 1 anything else;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from vlmpo.errors import VlmpoError
from vlmpo.recipe_yaml import load_recipe

app = typer.Typer(
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

_THREADS_END = 0.5  # seconds


class Dtype(StrEnum):
    """What weights may be written as."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _show_version(asked: bool) -> None:
    if asked:
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
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train as the recipe says.

    The run folder is the recipe's training.output_dir, runs/<name of the recipe> by default.
    """
    with _exit_codes():
        parsed = load_recipe(recipe, overrides or [])
        from vlmpo.commands.train import train as run

        if parsed.evaluate is None or parsed.evaluate.questions is None:
            run(parsed)
            return
        from vlmpo.commands.evaluate import ask_while_training

        run(parsed, ask_while_training(parsed))


@app.command()
def cache(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Compute the reference's log-probs ahead of training.

    For recipes with reference.kind: cache. Training then finds them and needs no reference model.
    """
    with _exit_codes():
        parsed = load_recipe(recipe, overrides or [])
        from vlmpo.commands.train import cache as run

        run(parsed)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Evaluate a trained model on held-out pairs and questions.

    The recipe's evaluate section says which model, against which, and on what questions.
    """
    with _exit_codes():
        parsed = load_recipe(recipe, overrides or [])
        from vlmpo.commands.evaluate import evaluate as run

        run(parsed)


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=0, help="How many pairs to show as the model sees them.")] = 1,
) -> None:
    """Show the pairs as the model sees them.

    Scored tokens are marked; lengths, tiles, and what is dropped and why, are counted.
    """
    with _exit_codes():
        parsed = load_recipe(recipe, overrides or [])
        from vlmpo.commands.inspect import inspect as run

        run(parsed, pairs)


@app.command()
def sample(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Sample responses to questions.

    As the recipe's build section says, into responses.jsonl in build.output_dir, runs/<name of the recipe>/build by
    default. Started again after a stop it goes on with what is missing.
    """
    with _exit_codes():
        parsed = load_recipe(recipe, overrides or [])
        from vlmpo.commands.sample import sample as run

        run(parsed)


pair_app = typer.Typer(help="Make preference pairs of sampled responses.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(pair_app, name="pair")


@pair_app.command("correctness")
def pair_correctness(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Pair right responses with wrong ones.

    Of the responses in build.output_dir; the pairs, and the questions all right (easy) or all wrong (hard), go there.
    """
    with _exit_codes():
        parsed = load_recipe(recipe, overrides or [])
        from vlmpo.commands.pair import correctness as run

        run(parsed)


@pair_app.command("dropout-ntp")
def pair_dropout_ntp(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Pair responses with their first half, continued without the image.

    For questions without a checkable answer. Started again after a stop it goes on with what is missing.
    """
    with _exit_codes():
        parsed = load_recipe(recipe, overrides or [])
        from vlmpo.commands.pair import dropout_ntp as run

        run(parsed)


@app.command()
def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A run folder, checkpoint or adapter folder.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base model, in place of the one the adapter names.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights written.")] = Dtype.float32,
) -> None:
    """Merge a LoRA adapter into its base model.

    The output folder holds a whole model and its processor, which load with transformers.
    """
    with _exit_codes():
        from vlmpo.commands.merge import merge as run

        run(adapter, output, base, dtype.value)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the data, the models and the logs go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the images, the model and the training.")] = 0,
) -> None:
    """Align a tiny model on a drawn task.

    Draws a small visual task, builds a tiny InternVL, warms it up and aligns it with MPO: minutes on two cores.
    """
    with _exit_codes():
        from vlmpo.commands.demo import demo as run

        run(output, seed)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn what a stage raises into its message and exit code."""
    try:
        yield
        _leave_ranks()
    except VlmpoError as error:
        _complain(error)
        _let_threads_end()  # the group itself is left: other ranks may be within a collective
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # `vlmpo inspect ... | head`: typer closes down quietly
    except Exception:
        traceback.print_exc()
        raise typer.Exit(1) from None


def _leave_ranks() -> None:
    """End the process group, if this is a rank."""
    if _let_threads_end():
        sys.modules["torch.distributed"].destroy_process_group()


def _let_threads_end() -> bool:
    """Whether this is a rank; if so, one of gloo's threads has had time to end its work.

    One that lets go of the last collective's tensors while the interpreter ends aborts the process: the exit code is
    lost, and the launcher ends the first rank, which may still be writing the model. For that it needs the
    interpreter's lock, and gets it while we sleep. (To join the threads by dropping all that holds the group can wait
    for ever: torch keeps the lock there.)
    """
    distributed = sys.modules.get("torch.distributed")
    found = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if found:
        time.sleep(_THREADS_END)
    return found


def _complain(error: VlmpoError) -> None:
    """Print the error on stderr: once a job, or by the first rank of a node, or by the one rank that met it."""
    rank = os.environ.get("RANK", "0")
    first_of_node = os.environ.get("LOCAL_RANK") == "0"
    if not (rank == "0" or error.met_by == "rank" or (error.met_by == "node" and first_of_node)):
        time.sleep(1.0)  # the launcher ends the job when the first rank leaves: let the one that speaks finish
        return
    heading = "error: " if rank == "0" else f"error on rank {rank}: "
    Console(stderr=True).print(Text.assemble((heading, "bold red"), str(error)), soft_wrap=True)


def main() -> None:
    """Entry point of the ``vlmpo`` command."""
    app(prog_name="vlmpo")
