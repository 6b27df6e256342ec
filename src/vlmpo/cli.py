"""The command line. Parses the recipe first; imports the command, and torch with it, only then.

Exit codes: 0 done; 2 the recipe, the data or the arguments are wrong (one message, no traceback); 130 interrupted; 1
any other error.
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
from vlmpo.recipe import Recipe
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
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_changes: Annotated[
        str,
        typer.Option(metavar="KEY[,KEY]", help="Keys that may differ from those of the run that is resumed."),
    ] = "",
) -> None:
    """Train a model.

    The run folder is the recipe's training.output_dir, runs/<name of the recipe> by default. With
    training.resume_from_checkpoint=true the same command starts a run, goes on with it, and leaves it once finished.
    """
    with _parsed(recipe, overrides) as parsed:
        from vlmpo.commands.train import train as run

        run(parsed, [key for key in allow_changes.split(",") if key])


@app.command()
def cache(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Compute the reference's log-probs ahead of training.

    For recipes with reference.kind: cache. Training then reads them and loads no reference model.
    """
    with _parsed(recipe, overrides) as parsed:
        from vlmpo.commands.train import cache as run

        run(parsed)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Evaluate a trained model on held-out pairs and questions.

    The recipe's evaluate section names the model, a model to compare it with, and the questions.
    """
    with _parsed(recipe, overrides) as parsed:
        from vlmpo.commands.evaluate import evaluate as run

        run(parsed)


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=0, help="How many pairs to show as the model sees them.")] = 1,
) -> None:
    """Show the pairs as the model sees them.

    Scored tokens are marked. Also lists lengths and tiles, and the pairs that are dropped, with the reason.
    """
    with _parsed(recipe, overrides) as parsed:
        from vlmpo.commands.inspect import inspect as run

        run(parsed, pairs)


@app.command()
def sample(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Sample responses to questions.

    Reads the recipe's build section; writes responses.jsonl in build.output_dir, runs/<name of the recipe>/build by
    default. Started again after a stop, it samples only the responses that are missing.
    """
    with _parsed(recipe, overrides) as parsed:
        from vlmpo.commands.sample import sample as run

        run(parsed)


pair_app = typer.Typer(help="Pair sampled responses.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(pair_app, name="pair")


@pair_app.command("correctness")
def pair_correctness(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Pair correct responses with wrong ones.

    Reads the responses in build.output_dir; writes there the pairs, and the questions whose responses are all correct
    (easy) or all wrong (hard).
    """
    with _parsed(recipe, overrides) as parsed:
        from vlmpo.commands.pair import correctness as run

        run(parsed)


@pair_app.command("dropout-ntp")
def pair_dropout_ntp(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Pair responses with their first half, continued without the image.

    For questions without a checkable answer. Started again after a stop, it generates only what is missing.
    """
    with _parsed(recipe, overrides) as parsed:
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
    with _exit_codes():
        from vlmpo.commands.merge import merge as run

        run(adapter, output, base, dtype.value)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the data, the models and the logs.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the images, the model and the training.")] = 0,
) -> None:
    """Align a tiny model on a drawn task.

    Draws a small visual task, builds a tiny InternVL, warms it up and aligns it with MPO; takes minutes on two cores.
    """
    with _exit_codes():
        from vlmpo.commands.demo import demo as run

        run(output, seed)


@contextmanager
def _parsed(recipe: Path, overrides: list[str] | None) -> Iterator[Recipe]:
    """Yield the recipe; see :func:`_exit_codes`."""
    with _exit_codes():
        yield load_recipe(recipe, overrides or [])


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn an exception into its message and exit code; at the end leave the process group."""
    try:
        yield
        _leave_process_group(destroy=True)
    except VlmpoError as error:
        _complain(error)
        _leave_process_group(destroy=False)  # other ranks may be within a collective
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # `vlmpo inspect ... | head`: typer closes down quietly
    except Exception:
        traceback.print_exc()
        raise typer.Exit(1) from None


def _leave_process_group(*, destroy: bool) -> None:
    if "torch.distributed" in sys.modules:  # else there is no group: the command has not come so far
        from vlmpo.train.sharding import leave_process_group

        leave_process_group(destroy=destroy)


def _complain(error: VlmpoError) -> None:
    """Print the error on stderr: once a job, once a node, or on the one rank that met it; see ``VlmpoError.met_by``."""
    rank = os.environ.get("RANK", "0")
    first_of_node = os.environ.get("LOCAL_RANK") == "0"
    if not (rank == "0" or error.met_by == "rank" or (error.met_by == "node" and first_of_node)):
        time.sleep(1.0)  # the launcher ends the job when the first rank exits: let the one that prints finish
        return
    heading = "error: " if rank == "0" else f"error on rank {rank}: "
    Console(stderr=True).print(Text.assemble((heading, "bold red"), str(error)), soft_wrap=True)


def main() -> None:
    """Run the ``vlmpo`` command."""
    app(prog_name="vlmpo")
