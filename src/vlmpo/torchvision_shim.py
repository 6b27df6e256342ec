"""Make ``import torchvision`` work beside a CPU build of torch.

PyPI's torchvision is compiled against CUDA torch. Beside a CPU build its import dies with "operator torchvision::nms
does not exist", because the compiled library that declares the operator cannot be loaded. The processors of InternVL
and the Qwen-VL families need torchvision's pure-Python transforms only, so declaring the schemas is enough.
"""

from __future__ import annotations

import sys
from typing import Any

_MISSING_OPERATOR = "operator torchvision::"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # a torch.library.Library withdraws its operators when it is collected


def is_in_use() -> bool:
    """Return whether torchvision's operators had to be declared in this process."""
    return bool(_libraries)


def ensure_torchvision() -> None:
    """Import torchvision; where its compiled operators are missing, declare their schemas and import it again.

    Does nothing when torchvision imports by itself. Raises ImportError when it is not installed.
    """
    try:
        import torchvision

        return
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    import torch

    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]  # what the failed import left behind
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    import torchvision  # noqa: F401
