"""The names a setting may take and the defaults that several packages share. Imports nothing but the standard library.

The recipe, the loss and MPOConfig read them here, so that parsing a recipe needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

# The loss terms in their fixed order, with the weights of the paper (arXiv 2411.10442).
MPO_WEIGHTS: Mapping[str, float] = {"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}
LOSS_TERMS = tuple(MPO_WEIGHTS)
ShiftMode = Literal["previous", "running", "none"]
NllReduction = Literal["sequence", "token"]
ReferenceKind = Literal["auto", "copy", "adapter", "cache"]
Attention = Literal["auto", "separate"]
OverLong = Literal["drop", "cut"]
OnBadRecord = Literal["skip", "fail"]
# The keys of the tables that implement them: vlmpo.data.formats.detect.FORMATS, vlmpo.verifiers.verifiers.VERIFIERS.
DataFormat = Literal["auto", "mmpr", "rlaif_v", "rlhf_v", "trl", "trl_implicit", "sharegpt", "alpaca", "swift"]
Verifier = Literal["auto", "exact", "option", "number", "anls", "vqa", "math"]
# Ways to ask a question; any other prompt is a template that contains QUESTION_FIELD. vlmpo.generate.prompts has the
# texts of these three.
PROMPT_STYLES = ("direct", "cot", "boxed")
QUESTION_FIELD = "{question}"
