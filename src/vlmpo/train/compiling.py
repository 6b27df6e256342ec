"""Compile a model's text layers, each in place: what ``torch_compile`` means here.

A whole model would be compiled anew for each row: images, positions and rows are Python's work, and differ from step to
step. A text layer is one graph, for every layer and every length of a row; its attention is one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from vlmpo import compat
from vlmpo.errors import RecipeError, first_line
from vlmpo.log import logger
from vlmpo.models.adapters import unwrap_peft

_GRAPHS = 64  # of a text layer; a run of Gemma 3 or Qwen3.5 has ten, and torch stops compiling in silence at eight


def check_backend(args: TrainingArguments) -> None:
    """Raise RecipeError if the settings name a compiler that does not exist."""
    names = sorted(backend.value.lower() for backend in DynamoBackend if backend != DynamoBackend.NO)
    if args.torch_compile and str(args.torch_compile_backend).lower() not in names:
        raise RecipeError(
            f"training.torch_compile_backend: there is no {args.torch_compile_backend!r}; there are {', '.join(names)}"
        )


def compile_policy(accelerator: Any, model: Any, args: TrainingArguments) -> None:
    """Compile the policy's text layers if the settings ask for it, and keep accelerate from compiling whole models.

    Raises:
        RecipeError: this machine cannot compile.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO and not args.torch_compile:
        logger.info("accelerate's dynamo backend is not used: set training.torch_compile to compile the text layers")
    plugin.backend = DynamoBackend.NO
    if not args.torch_compile:
        return
    try:
        torch.compile(torch.neg, **_settings(args))(torch.ones(2, device=args.device))
    except Exception as error:
        raise RecipeError(
            f"training.torch_compile: nothing can be compiled here ({first_line(error)}); leave it out, or set "
            "training.torch_compile_backend"
        ) from error
    count = compile_text_layers(model, args)
    logger.info(f"torch_compile: the {count} text layers are compiled, for rows of any length; nothing else is")


def compile_text_layers(model: Any, args: TrainingArguments) -> int:
    """Compile the text layers of ``model`` in place if the settings ask for it; return their number.

    The graphs of all layers, models and runs of a process count together: policy and reference, with gradients and
    without, each kind of layer. torch keeps as many as it is told here; of two models alike one would else be read
    without a compiler, and rewards start off 0.
    """
    if not args.torch_compile:
        return 0
    limits: Any = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS)
    base = unwrap_peft(model)
    wholes = compat.layers_to_wrap(base)
    layers = [
        module
        for module in base.get_decoder().modules()
        if any(kind.__name__ in wholes for kind in type(module).__mro__)  # FSDP2 makes a subclass
    ]
    for layer in layers:
        layer.compile(**_settings(args))
    return len(layers)


def _settings(args: TrainingArguments) -> dict[str, Any]:
    return {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode, "dynamic": True}
