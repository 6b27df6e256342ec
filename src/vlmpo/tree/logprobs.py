"""Rows to log-probabilities: the one piece of code that answers "how likely is each branch of this tree".

The hidden states that predict scored tokens are gathered first and then projected to the vocabulary in chunks, with
recomputation in the backward pass: logits of the whole row never exist. All of it runs inside the model's own forward,
so that wrappers which shard or convert weights around a forward (DDP, FSDP2, ZeRO-3, autocast, PEFT) do so here too.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmpo.tree.attention import ATTENTION_NAME, LAYOUT_ARGUMENT, reading_a_row, register
from vlmpo.tree.features import vision_arguments
from vlmpo.tree.heads import PLAIN, LogitMap, logit_map
from vlmpo.tree.layout import Row
from vlmpo.tree.positions import layout_of, positions_of, refuse_missing_types
from vlmpo.tree.vision import refuse_bytes

CHUNK_ELEMENTS = 16 * 1024 * 1024  # logits alive at once: 64 MiB in float32
ROWS_ARGUMENT = "branch_rows"  # keyword of the model's forward that asks for log-probs instead of logits


class _TokenLogProbs(torch.autograd.Function):
    """``log softmax(map(h W^T + b))[target]`` for ``[scored]`` rows, chunk by chunk, in float32 or better."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        logit_map: LogitMap,
    ) -> Tensor:
        parts = []
        for at in range(0, hidden.shape[0], rows):
            logits = logit_map.of(_project(hidden[at : at + rows], weight, bias))  # [chunk, vocabulary]
            picked = logits.gather(1, targets[at : at + rows, None]).squeeze(1)
            parts.append(picked - torch.logsumexp(logits, dim=1))
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.rows, ctx.logit_map = rows, logit_map
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, weight, bias, targets = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Accumulated in float32 or better: many chunks add up, and bfloat16 would lose the later ones.
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if wants_bias else None
        for at in range(0, hidden.shape[0], ctx.rows):
            part = slice(at, at + ctx.rows)
            logits = ctx.logit_map.of(_project(hidden[part], weight, bias))
            # d log p[t] / d logits = onehot(t) - softmax(logits)
            grad_logits = logits.softmax(dim=1).neg_()
            grad_logits.scatter_add_(1, targets[part, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits *= grad[part, None]
            grad_logits = ctx.logit_map.backward(grad_logits, logits)
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = narrow @ weight.to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, narrow.t(), hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    projected = (hidden @ weight.to(hidden.dtype).t()).to(_wide(hidden.dtype))
    return projected if bias is None else projected + bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def token_logps(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    chunk_elements: int = CHUNK_ELEMENTS,
    logit_map: LogitMap = PLAIN,
) -> Tensor:
    """Log-probability of each target under the vocabulary head.

    Args:
        hidden: ``[scored, hidden]``, the states that predict the targets.
        head: the model's output embedding. A plain ``nn.Linear`` takes the chunked path with its own backward; any
            other module (a head under LoRA, a quantised one) is called chunk by chunk under checkpointing.
        targets: ``[scored]`` token ids.
        chunk_elements: logits alive at once.
        logit_map: what the family does to the head's output.

    Returns:
        ``[scored]``, float32, or float64 for float64 models.
    """
    if hidden.shape[0] == 0:
        return hidden.sum(dim=1).to(_wide(hidden.dtype))
    if type(head) is not nn.Linear:
        return _token_logps_through(hidden, head, targets, chunk_elements, logit_map)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    else:
        hidden = hidden.to(head.weight.dtype)
    rows = max(1, chunk_elements // head.weight.shape[0])
    with torch.autocast(kind, enabled=False):
        return _TokenLogProbs.apply(hidden, head.weight, head.bias, targets, rows, logit_map)


def _token_logps_through(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk_elements: int, logit_map: LogitMap
) -> Tensor:
    def score(states: Tensor, wanted: Tensor) -> Tensor:
        projected = head(states)
        logits = logit_map.of(projected.to(_wide(projected.dtype)))
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


def _score_row(model: Any, row: Row, shared: bool) -> Tensor:
    refuse_missing_types(model, row)
    refuse_bytes(row.vision.get("pixel_values"))
    arguments: dict[str, Any] = {"input_ids": row.input_ids, "use_cache": False, **vision_arguments(model, row)}
    arguments |= accepted(model.base_model, row.token_types)
    if shared:
        # Positions are said only here: a separate row is an ordinary prompt, the model counts it as it always does.
        arguments |= {"position_ids": positions_of(model, row), LAYOUT_ARGUMENT: layout_of(model, row)}
        with reading_a_row():
            hidden = model.base_model(**arguments).last_hidden_state[0]  # [tokens, hidden]
    else:
        hidden = model.base_model(**arguments).last_hidden_state[0]
    head = model.get_output_embeddings()
    return token_logps(hidden[row.predictors], head, row.targets, logit_map=logit_map(model.config))


def score_rows(model: Any, rows: Sequence[Row], shared: bool) -> Tensor:
    """Log-probability of every scored token of ``rows``, ``[scored of all rows]``, row after row, in order of branches.

    Without rows it returns an empty tensor that still hangs on a weight: a rank that has nothing to read must join
    the backward pass of the others.
    """
    if not rows:
        weight = model.get_output_embeddings().weight
        return weight.flatten()[:0].to(_wide(weight.dtype))
    return torch.cat([_score_row(model, row, shared) for row in rows])


def install(model: Any, shared: bool) -> None:
    """Teach ``model`` to answer ``model(branch_rows=rows)`` with the rows' token log-probs; all else stays as it was.

    Done on the instance, not by a wrapper, so that saving, generating and every wrapper around the model see the
    model itself. ``shared`` chooses the attention for branches (text part only) or the model's own. Harmless when
    done twice.
    """
    if shared:
        register()
        text_only = model.config.get_text_config() is model.config
        model.set_attn_implementation(ATTENTION_NAME if text_only else {"text_config": ATTENTION_NAME})
    model._vlmpo_shared = shared
    if "_vlmpo_plain_forward" not in model.__dict__:
        model._vlmpo_plain_forward = model.forward
        # A bound method, so that a deep copy of the model (a frozen reference) answers from its own weights.
        model.forward = types.MethodType(_dispatching(type(model).forward), model)


def _dispatching(plain: Any) -> Any:
    @functools.wraps(plain)  # generate() and Trainer read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop(ROWS_ARGUMENT, None)
        if rows is None:
            refuse_bytes(kwargs.get("pixel_values"))
            return self._vlmpo_plain_forward(*args, **kwargs)
        return score_rows(self, rows, self._vlmpo_shared)

    return forward


def uses_shared_rows(model: Any) -> bool:
    """Whether :func:`install` set this model up to share trunks."""
    return bool(model._vlmpo_shared)
