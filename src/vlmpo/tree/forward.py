"""Rows to log-probabilities: the one piece of code that answers "how likely is each response of this tree".

The hidden states that predict scored tokens are gathered first and then projected to the vocabulary in
blocks, which
the backward pass computes again: logits of the whole row never exist. All of it runs inside the model's own forward,
so that wrappers which shard or convert weights around a forward (DDP, FSDP2, ZeRO-3, autocast, PEFT) do so here too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmpo.models.families import logit_scale_and_softcap
from vlmpo.tree.attention import ATTENTION_NAME, LAYOUT_ARGUMENT, reading_a_row, register
from vlmpo.tree.chunked_logprobs import PLAIN, LogitTransform, chunk_elements_for, linear_token_logps, wide
from vlmpo.tree.features import vision_arguments
from vlmpo.tree.layout import PackedRow
from vlmpo.tree.positions import layout_of, positions_of, refuse_missing_types
from vlmpo.tree.router_loss import with_router_losses
from vlmpo.tree.vision import refuse_bytes

ROWS_ARGUMENT = "packed_rows"  # keyword of the model's forward that asks for log-probs instead of logits
ROUTER_ARGUMENT = "router_losses"  # goes with it: answer with ResponseScores
SHARED_ARGUMENT = "share_prompts"  # goes with it: read the rows with shared prompts, or not, whatever install() said
TARGETS_ARGUMENT = "head_labels"  # the same of the vocabulary head's forward


def token_logps(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    chunk_elements: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> Tensor:
    """Log-probability of each target under the vocabulary head.

    Args:
        hidden: ``[scored, hidden]``, the states that predict the targets.
        head: the model's output embedding. A plain ``nn.Linear`` takes the chunked path with its own backward, and is
            called for it where :func:`install` taught it to answer: FSDP2 and ZeRO-3 hang the gathering of its weight
            on that call. Any other module (a head under LoRA, a quantised one) is called chunk by chunk under
            checkpointing.
        targets: ``[scored]`` token ids.
        chunk_elements: logits alive at once; None: what suits the device (see vlmpo.tree.chunked_logprobs).
        logit_transform: what the family does to the head's output.

    Returns:
        ``[scored]``, float32, or float64 for float64 models.
    """
    if hidden.shape[0] == 0:
        return hidden.sum(dim=1).to(wide(hidden.dtype))
    chunk_elements = chunk_elements or chunk_elements_for(hidden.device)
    if getattr(head, "_vlmpo_scores", False):
        return head(
            hidden, **{TARGETS_ARGUMENT: targets}, chunk_elements=chunk_elements, logit_transform=logit_transform
        )
    if type(head) is nn.Linear:
        return _linear_token_logps(head, hidden, targets, chunk_elements, logit_transform)
    return _token_logps_through(hidden, head, targets, chunk_elements, logit_transform)


def _linear_token_logps(
    head: nn.Linear, hidden: Tensor, targets: Tensor, chunk_elements: int, logit_transform: LogitTransform
) -> Tensor:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    else:
        hidden = hidden.to(head.weight.dtype)
    with torch.autocast(kind, enabled=False):
        return linear_token_logps(hidden, head.weight, head.bias, targets, chunk_elements, logit_transform)


def _token_logps_through(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk_elements: int, logit_transform: LogitTransform
) -> Tensor:
    def score(states: Tensor, wanted: Tensor) -> Tensor:
        projected = head(states)
        logits = logit_transform.apply(projected.to(wide(projected.dtype)))
        return logits.gather(1, wanted[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)

    rows = max(1, chunk_elements // int(getattr(head, "out_features", 32768)))
    parts = [
        checkpoint(score, hidden[at : at + rows], targets[at : at + rows], use_reentrant=False)
        for at in range(0, hidden.shape[0], rows)
    ]
    return torch.cat(parts)


def accepted(model: Any, token_types: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the processor's token types, those that ``model``'s forward names: others would reach layers as strangers."""
    named = inspect.signature(type(model).forward).parameters
    return {name: types for name, types in token_types.items() if name in named}


def _score_row(model: Any, row: PackedRow, shared: bool) -> Tensor:
    refuse_missing_types(model, row)
    refuse_bytes(row.vision.get("pixel_values"))
    arguments: dict[str, Any] = {"input_ids": row.input_ids, "use_cache": False, **vision_arguments(model, row)}
    arguments |= accepted(model.base_model, row.token_types)
    if shared:
        # Positions are said only here: a separate row is an ordinary prompt, the model counts it as it always does.
        arguments |= {"position_ids": positions_of(model, row), LAYOUT_ARGUMENT: layout_of(model, row)}
    with reading_a_row(row.input_ids.device) if shared else contextlib.nullcontext():
        hidden = model.base_model(**arguments).last_hidden_state[0]  # [tokens, hidden]
    head = model.get_output_embeddings()
    transform = LogitTransform(*logit_scale_and_softcap(model.config))
    return token_logps(hidden[row.logit_positions], head, row.targets, logit_transform=transform)


def score_rows(model: Any, rows: Sequence[PackedRow], shared: bool) -> Tensor:
    """Log-probability of every scored token of ``rows``, ``[scored of all rows]``, row after row, in order of
    responses.

    Without rows it returns an empty tensor that still hangs on a weight: a rank that has nothing to read must join
    the backward pass of the others.
    """
    if not rows:
        weight = model.get_output_embeddings().weight
        if not weight.requires_grad:  # under LoRA, for one
            weight = next((other for other in model.parameters() if other.requires_grad), weight)
        return weight.flatten()[:0].to(wide(weight.dtype))
    return torch.cat([_score_row(model, row, shared) for row in rows])


def install(model: Any, shared: bool) -> None:
    """Teach ``model`` to answer ``model(packed_rows=rows)`` with the rows' token log-probs; all else stays as it was.

    Done on the instance, not by a wrapper, so that saving, generating and every wrapper around the model see the
    model itself. ``shared`` chooses the attention for responses (text part only) or the model's own. Harmless when
    done twice.
    """
    if shared:
        register()
        text_only = model.config.get_text_config() is model.config
        model.set_attn_implementation(ATTENTION_NAME if text_only else {"text_config": ATTENTION_NAME})
    model._vlmpo_shared = shared
    _install_on_head(model.get_output_embeddings())
    if "_vlmpo_plain_forward" not in model.__dict__:
        model._vlmpo_plain_forward = model.forward
        # A bound method, so that a deep copy of the model (a frozen reference) answers from its own weights.
        model.forward = types.MethodType(_dispatching(type(model).forward), model)


def _install_on_head(head: Any) -> None:
    """Teach a plain linear head to answer with log-probs from within its own call."""
    plain: Any = type(head) is nn.Linear
    if plain and not hasattr(head, "_vlmpo_scores"):
        head._vlmpo_scores = True
        head.forward = types.MethodType(_head_forward, head)


def _head_forward(
    self: nn.Linear,
    input: Tensor,
    head_labels: Tensor | None = None,
    chunk_elements: int | None = None,
    logit_transform: LogitTransform = PLAIN,
) -> Tensor:
    if head_labels is None:
        return nn.functional.linear(input, self.weight, self.bias)
    chunk_elements = chunk_elements or chunk_elements_for(input.device)
    return _linear_token_logps(self, input, head_labels, chunk_elements, logit_transform)


def _dispatching(plain: Any) -> Any:
    @functools.wraps(plain)  # generate() and Trainer read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop(ROWS_ARGUMENT, None)
        if rows is None:
            refuse_bytes(kwargs.get("pixel_values"))
            return self._vlmpo_plain_forward(*args, **kwargs)
        score = functools.partial(score_rows, self, shared=kwargs.pop(SHARED_ARGUMENT, self._vlmpo_shared))
        return with_router_losses(self, rows, score) if kwargs.pop(ROUTER_ARGUMENT, False) else score(rows)

    return forward


def uses_shared_rows(model: Any) -> bool:
    """Whether :func:`install` set this model up to share prompts."""
    return bool(model._vlmpo_shared)
