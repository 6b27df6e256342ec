"""``vlmpo merge``: a base model and an adapter become one whole model."""

from __future__ import annotations

from pathlib import Path

from vlmpo.errors import ModelError, RunError
from vlmpo.fileio import writing
from vlmpo.log import print_line
from vlmpo.models.adapters import is_adapter
from vlmpo.models.merge import write_merged
from vlmpo.train.checkpoint import last_complete_checkpoint


def merge(adapter: Path, output: Path, base: str | None = None, dtype: str = "float32") -> None:
    """Write base and adapter as one model, with its processor, into ``output``, and print where it is.

    Args:
        adapter: an adapter folder, a checkpoint, or the run folder of a finished run.
        output: a new or empty folder; if the merge fails, nothing is written.
        base: the base model; by default the one that the adapter names.
        dtype: dtype of the weights written, ``float32`` or ``bfloat16``.

    Raises:
        RunError: ``output`` is not empty.
        ModelError: there is no adapter or no base model, or they do not fit each other.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RunError(f"{output} is not empty; name a new folder for the merged model")
    _check_adapter(adapter)
    with writing(output):
        write_merged(adapter, output, base, dtype)
    print_line(f"model and processor: {output}")


def _check_adapter(adapter: Path) -> None:
    if is_adapter(adapter):
        return
    if not adapter.is_dir():
        raise ModelError(f"there is no adapter folder {adapter}")
    if (adapter / "config.json").is_file():
        raise ModelError(f"{adapter} holds a whole model, no adapter: there is nothing to merge")
    newest = last_complete_checkpoint(adapter)
    hint = f"; its newest checkpoint is {newest}" if newest is not None else ""
    raise ModelError(f"{adapter} holds no adapter (adapter_config.json is missing){hint}")
