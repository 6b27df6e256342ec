"""Run a model's vision part alone."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def encode_images(base: Any, vision: dict[str, Tensor]) -> Any:
    """Return what ``base.get_image_features`` makes of the processor's vision tensors.

    Args:
        base: a transformers model without its head, of a family that takes features.
        vision: the tensors; those that the family does not ask for are left out.
    """
    named = inspect.signature(type(base).get_image_features).parameters
    arguments = {name: tensor for name, tensor in vision.items() if name in named}
    return base.get_image_features(**arguments, return_dict=True)
