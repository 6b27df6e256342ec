"""Look at a checkpoint's files before anything is loaded from them: whether there is a model that can be loaded.

transformers guesses the model's kind from the folder's name if config.json is missing, and would then allocate a model
of that kind's default size, of many gigabytes.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from transformers import CONFIG_MAPPING, PreTrainedConfig

from vlmpo.errors import first_line

_CONFIG = "config.json"
_OF_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"})
_OF_IMAGE_PROCESSORS = frozenset({"processor_config.json", "preprocessor_config.json"})
_SHOWN = 5  # files of a folder that a message names
INTERNVL_CHAT = "InternVLChatModel"  # the class of checkpoints that bring their own code
_NEEDS_CODE = "it needs code that comes with it, which is not run unless you set model.trust_remote_code: true"


def why_unloadable(path: str, *, processor_only: bool = False, trust_remote_code: bool = False) -> str | None:
    """Return why the checkpoint at ``path`` cannot be loaded, and what to do; None if nothing speaks against it.

    Args:
        path: a folder that holds no adapter, or a hub name.
        processor_only: whether a processor without a model is enough.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """
    if os.path.isdir(path):
        files = sorted(os.listdir(path))
        if _CONFIG not in files:
            alone = processor_only and not (_OF_TOKENIZERS | _OF_IMAGE_PROCESSORS).isdisjoint(files)
            return None if alone else _without_config(Path(path), files)
    elif os.path.exists(path):
        return "it is a file; name the folder of a checkpoint"
    elif means_folder(path):
        return "there is no such folder"
    elif (host := _unreachable_hub(path)) is not None:
        return f"there is no such folder here, and it cannot be looked for on the Hub: {host} cannot be reached"
    config = _read_config(path)
    return config if isinstance(config, str) else why_foreign(config, trust_remote_code=trust_remote_code)


def can_be_looked_for(path: str) -> bool:
    """Return whether ``path``, which is not here, is no folder's name and the Hub can be asked for it."""
    return not means_folder(path) and _unreachable_hub(path) is None


def means_folder(path: str) -> bool:
    """Return whether what is not there was meant to be a folder here: by its form, or as the folder above is here."""
    above = os.path.dirname(path)
    return os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1 or os.path.isdir(above)


def _unreachable_hub(name: str) -> str | None:
    """Return the Hub's host if it has no address here and nothing of ``name`` is in the cache, else None.

    Libraries would ask five times, for the better part of a minute. Behind a proxy it need not have an address.
    """
    host = urlsplit(constants.ENDPOINT).hostname
    cached = os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}"))
    if cached or constants.HF_HUB_OFFLINE or getproxies() or not host:
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return host
    return None


def why_foreign(config: dict[str, Any], *, trust_remote_code: bool = False) -> str | None:
    """Return why there is no model for the values of a config.json, and what to do; None if there is one.

    It is transformers' or, if ``trust_remote_code`` allows that, in code that comes with the checkpoint.
    """
    kind = config.get("model_type")
    if not kind:
        return f"its {_CONFIG} names no model_type, so it is not a model's"
    if kind in CONFIG_MAPPING or (trust_remote_code and config.get("auto_map")):
        return None
    if kind == "internvl_chat" or INTERNVL_CHAT in (config.get("architectures") or ()):
        return (
            f"it is an InternVL checkpoint in its original layout ({INTERNVL_CHAT}), which needs code that comes with "
            "it; take the one converted to transformers' layout, whose name ends in -HF (InternVL3-8B-HF)"
        )
    if config.get("auto_map"):
        return (
            f"{_NEEDS_CODE}, as transformers has no model of type {kind!r}; or take a checkpoint converted to "
            "transformers' layout, if there is one"
        )
    return (
        f"transformers has no model of type {kind!r}, which its {_CONFIG} names; take a checkpoint in transformers' "
        "layout, or a newer transformers"
    )


def why_refused(error: Exception) -> str:
    """Return why transformers does not load a checkpoint, in one line."""
    return _NEEDS_CODE if "trust_remote_code" in str(error) else first_line(error)


def what_processor_lacks(path: str) -> str | None:
    """Return which part of its processor a model's folder lacks; None if that is not the fault."""
    if not os.path.isdir(path):
        return None
    files, config = os.listdir(path), _read_config(path)
    sees = isinstance(config, dict) and "vision_config" in config
    parts = {"tokenizer": _OF_TOKENIZERS} | ({"image processor": _OF_IMAGE_PROCESSORS} if sees else {})
    lacking = [part for part, names in parts.items() if names.isdisjoint(files)]
    return f"it holds no {' and no '.join(lacking)}; put the files of the model's own there" if lacking else None


def _read_config(path: str) -> dict[str, Any] | str:
    """Return the values of a checkpoint's config.json, or why there are none."""
    file = Path(path) / _CONFIG
    try:
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
        else:
            values, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        return f"its {_CONFIG} cannot be read: {first_line(error)}"
    return values if isinstance(values, dict) else f"its {_CONFIG} holds a {type(values).__name__}, no model's settings"


def _without_config(folder: Path, files: list[str]) -> str:
    if not files:
        return "it is an empty folder; put a checkpoint there"
    shown = ", ".join(files[:_SHOWN]) + (", ..." if len(files) > _SHOWN else "")
    inside = [name for name in files if (folder / name / _CONFIG).is_file()]
    hint = f"; {folder / inside[-1]} holds one" if inside else ""
    return f"it has no {_CONFIG}, so there is no model in it, only {shown}{hint}"
