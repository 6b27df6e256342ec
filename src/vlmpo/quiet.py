"""Hold back what libraries print and no user can do anything about: each message by its text, with the reason.

Nothing is silenced as a whole: whatever is not in the table below is shown, and with ``VLMPO_LOG_LEVEL=debug`` all is.
"""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from typing import Any, NamedTuple

from vlmpo.log import logger, on_terminal, stderr


class Noise(NamedTuple):
    """Names a message.

    Attributes:
        origin: the category of a warning, or the name of a logger.
        text: a regular expression that its beginning matches.
        reason: why no user can do anything about it.
    """

    origin: type[Warning] | str
    text: str
    reason: str


NOISE = (
    Noise(
        FutureWarning,
        r"`(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))` is deprecated",
        "transformers' new name; PEFT and the Trainer still use the old one",
    ),
    Noise(
        "transformers.trainer_utils",
        r"The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",
        "the Trainer puts them right by itself; the package's own check of the chat template names the end token",
    ),
    Noise(
        "transformers.trainer_utils",
        r"mtime may not be reliable on this filesystem",
        "checkpoints are then sorted by their steps, as they should be; those written in one second look so",
    ),
    Noise(
        "transformers.tokenization_utils_base",
        r"Token indices sequence length is longer than the specified maximum sequence length",
        "texts are measured before they are cut or dropped: data.max_length and the model's own limit are checked",
    ),
    Noise(
        "transformers.generation.configuration_utils",
        r"The following generation flags are not valid and may be ignored",
        "what a checkpoint's generation_config.json sets for sampling, beside a greedy answer",
    ),
    Noise(
        UserWarning,
        r"'pin_memory' argument is set as true but no accelerator is found",
        "transformers' default; without an accelerator it has no effect",
    ),
    Noise(
        UserWarning,
        r"Setting `save_embedding_layers` to `True` as embedding layers found",
        "PEFT does what is right; whether they are in the adapter is seen in its files",
    ),
    Noise(
        UserWarning,
        r"Input and output embeddings are no longer tied after merging",
        "vlmpo merge says so itself",
    ),
    Noise(
        UserWarning,
        r"Could not find a config file in .* - will assume that the vocabulary was not modified",
        "PEFT asks the Hub for a base model that is a local folder, or there is no network; no vocabulary is resized",
    ),
)


def hold_back_noise(training: bool = False) -> None:
    """Hold back the messages of the table; before ``training`` also what :func:`hide_bars` hides.

    Does nothing at the level ``debug``. May be called again: whatever resets Python's warnings undoes it.
    """
    if logger.isEnabledFor(logging.DEBUG):
        return
    if training:
        hide_bars(training=True)
    for noise in NOISE:
        if isinstance(noise.origin, str):
            of_library = logging.getLogger(noise.origin)
            if _is_wanted not in of_library.filters:
                of_library.addFilter(_is_wanted)
        else:
            warnings.filterwarnings("ignore", noise.text, noise.origin)


def _is_wanted(record: logging.LogRecord) -> bool:
    texts = [noise.text for noise in NOISE if noise.origin == record.name]
    return not any(re.match(text, record.getMessage()) for text in texts)


def hide_bars(training: bool = False) -> None:
    """Hide transformers' bars of reading and writing weights, but not those of downloads, which a log does not get.

    In a log they leave carriage returns. On a terminal a bar says how far reading a large model has come: there they
    are hidden only while ``training``, as they tear its line. Does nothing at the level ``debug``.
    """
    hub: Any = importlib.import_module("huggingface_hub.utils")
    from transformers.utils.logging import disable_progress_bar, is_progress_bar_enabled

    if logger.isEnabledFor(logging.DEBUG) or (on_terminal(stderr) and not training):
        return
    if is_progress_bar_enabled() and not hub.are_progress_bars_disabled():
        disable_progress_bar()  # those of downloads too
        hub.enable_progress_bars()
