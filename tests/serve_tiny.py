"""``transformers serve`` beside a CPU build of torch: python tests/serve_tiny.py MODEL --port N ...

torchvision's compiled operators are missing there, so its schemas are declared and Pillow decodes the images; the rest
is transformers' own command.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before transformers' model classes, which import torchvision


def decode_image(data: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Encoded bytes, uint8 [bytes], to uint8 [3, height, width]: torchvision.io.decode_image by way of Pillow."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data.numpy().tobytes()))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def main() -> None:
    torch.set_num_threads(1)
    import torchvision.io

    torchvision.io.decode_image = decode_image
    from transformers.cli.transformers import main as transformers_command

    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    transformers_command()


if __name__ == "__main__":
    main()
