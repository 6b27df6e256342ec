"""The names a setting may take and the defaults that several packages share. Imports nothing but the standard library.

The recipe, the loss and MPOConfig read them here, so that parsing a recipe needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

# The loss terms in their fixed order, with the weights of the paper (arXiv 2411.10442).
MPO_WEIGHTS: Mapping[str, float] = {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}
LOSS_TERMS = tuple(MPO_WEIGHTS)
ShiftMode = Literal["previous", "running", "none"]
NllReduction = Literal["sequence", "token"]
ReferenceKind = Literal["auto", "copy", "adapter", "cache"]
Attention = Literal["auto", "separate"]
Kernels = Literal["auto", "off"]
Precision = Literal["auto", "float32", "bf16", "autocast"]
VisionMemory = Literal["auto", "keep", "recompute"]
OverLong = Literal["drop", "cut"]
OnBadRecord = Literal["skip", "fail"]
# The keys of the tables that implement them: vlmpo.data.formats.detect.FORMATS, vlmpo.verifiers.verifiers.VERIFIERS.
DataFormat = Literal[
    "auto", "mmpr", "rlaif_v", "rlhf_v", "trl", "trl_implicit", "sharegpt", "alpaca", "swift", "questions"
]
Verifier = Literal["auto", "exact", "option", "number", "anls", "vqa", "math"]
# Ways to ask a question; any other prompt is a template that contains QUESTION_FIELD. vlmpo.generate.prompts has the
# texts of these three.
PROMPT_STYLES = ("direct", "cot", "boxed")
QUESTION_FIELD = "{question}"

API_KEY_VARIABLE = "VLMPO_API_KEY"  # environment variable whose key a chat server is sent
_URL = re.compile(r"https?://[!-~]+")


def check_server_url(url: str) -> None:
    """Raise ValueError if ``url`` is no http(s) address of a server, or holds a name and password, which are not shown.

    A URL is written into records and messages.
    """
    if "@" in url:
        raise ValueError(
            "the URL holds a name or password (what stands before `@`), which would be written into records and "
            f"messages; leave it out, and put the server's key into the environment variable {API_KEY_VARIABLE}"
        )
    if "?" in url or "#" in url:
        raise ValueError(
            "the URL holds a query (what stands behind `?` or `#`); leave it out, and put the server's key into the "
            f"environment variable {API_KEY_VARIABLE}"
        )
    try:
        parts = urlsplit(url)
        is_good = bool(_URL.fullmatch(url)) and bool(parts.hostname) and parts.port != 0  # a port may raise ValueError
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError(f"expected local or the http(s) URL of a chat server, got {url!r:.80}")
