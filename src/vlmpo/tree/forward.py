"""Read rows with a model and return the log-probabilities of their responses.

A patched model returns for ``model(packed_rows=rows)`` the log-probs of the rows' scored tokens. The hidden states
that predict scored tokens are gathered first and then projected to the vocabulary in blocks: logits of the whole row
never exist. All of it runs inside the model's own forward, so that wrappers which shard or convert weights around a
forward (DDP, FSDP2, ZeRO-3, autocast, PEFT) do so here too.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.models.families import logit_scale_and_softcap
from vlmpo.models.kernels import was_pickled
from vlmpo.models.masters import HALF, Masters
from vlmpo.tree import products
from vlmpo.tree.attention import ATTENTION_NAME, layout_arguments, register
from vlmpo.tree.chunked_logprobs import LogitTransform, ScoringHead, token_logps, wide
from vlmpo.tree.features import vision_arguments
from vlmpo.tree.layout import PackedRow
from vlmpo.tree.ordered import ResponseSums, scored_states, sum_dtype
from vlmpo.tree.placeholders import placeholders_from_host
from vlmpo.tree.positions import layout_of, positions_of, refuse_missing_types
from vlmpo.tree.router_loss import recording_routers, response_router_losses
from vlmpo.tree.vision import refuse_bytes


def response_logps(model: Any, rows: Sequence[PackedRow]) -> Tensor:
    """Return the log-probability of each response of ``rows``, summed over its scored tokens: ``[responses]``, float64.

    Args:
        model: set up by :func:`install`, or a wrapper around such a model.
        rows: on the model's device.
    """
    return sum_by_response(model(packed_rows=rows), rows)


def response_logps_and_router_losses(model: Any, rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
    """Return what :func:`response_logps` does, and the router loss of each response, ``[responses]`` both."""
    logps, router_losses = model(packed_rows=rows, router_losses=True)
    return sum_by_response(logps, rows), router_losses


def sum_by_response(token_logps: Tensor, rows: Sequence[PackedRow]) -> Tensor:
    """Sum the log-probs of each response's scored tokens, in an order that nothing else in the rows changes.

    Args:
        token_logps: ``[scored]`` of all rows.
        rows: on the same device.

    Returns:
        ``[responses]``, float64 (float32 on a device without).
    """
    if not rows:  # the empty input itself, which still depends on the model's weights
        return token_logps.to(sum_dtype(token_logps.device))
    owners: list[Tensor] = []
    seen = 0
    for row in rows:
        owners.append(row.response_index + seen)
        seen += row.num_responses
    lengths = [length for row in rows for length in row.response_lengths]
    sums: Tensor = ResponseSums.apply(token_logps, lengths, torch.cat(owners))
    return sums


# ---- the patch ----


@dataclass
class Patch:
    """Holds everything vlmpo keeps on a model that it patched, as ``model._vlmpo``.

    Attributes:
        plain_forward: the model's forward as it was.
        shared: whether rows share prompts.
        frozen_tower: the weights that make image features, if another model shares them; see
            :mod:`vlmpo.tree.features`.
        masters: reads the model in bfloat16, its weights being float32; None: it is read as it is.
    """

    plain_forward: Any
    shared: bool
    frozen_tower: tuple[Tensor, ...] | None = None
    masters: Masters | None = None


def install(model: Any, shared: bool) -> None:
    """Patch ``model`` so that ``model(packed_rows=rows)`` returns the rows' token log-probs; nothing else changes.

    The instance is patched, not wrapped, so that saving, generating and every wrapper around the model see the model
    itself. A second call changes ``shared`` alone.

    Args:
        model: a transformers model, under no wrapper.
        shared: use the attention for responses in the text part; False: the model's own attention.
    """
    if shared:
        register()
        model.set_attn_implementation(_for_text_part(model, ATTENTION_NAME))
    _set_tower(model, "sdpa", products.TOWER_ATTENTION)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and "forward" not in vars(head):
        head.__class__ = ScoringHead
    if is_installed(model):
        model._vlmpo.shared = shared
    else:
        model._vlmpo = Patch(model.forward, shared)
        # A bound method, so that a deep copy of the model (a frozen reference) reads its own weights.
        model.forward = types.MethodType(_patched(type(model).forward), model)


def is_installed(model: Any) -> bool:
    """Return whether ``model`` is patched; one that was pickled since is not."""
    return "_vlmpo" in vars(model) and not was_pickled(model)


@contextmanager
def installed(model: Any, shared: bool) -> Iterator[bool]:
    """Patch ``model`` during the body of a ``with`` statement, and yield whether its rows share prompts.

    A model that is patched already is left as it is, whatever ``shared`` is.
    """
    if is_installed(model):
        yield uses_shared_rows(model)
        return
    forward = vars(model).get("forward")  # of the instance; None: the class's
    attention = compat.attention_implementation(model.config.get_text_config())
    install(model, shared)
    try:
        yield shared
    finally:
        del model._vlmpo, model.forward
        if forward is not None:
            model.forward = forward
        head = model.get_output_embeddings()
        if type(head) is ScoringHead:
            head.__class__ = nn.Linear  # type: ignore[assignment]
        if shared:
            model.set_attn_implementation(_for_text_part(model, attention))
        _set_tower(model, products.TOWER_ATTENTION, "sdpa")


def _set_tower(model: Any, before: str, after: str) -> None:
    """Exchange the attention of the vision tower on a CPU, if it is ``before``."""
    config = getattr(model.config, "vision_config", None)
    if config is None or model.device.type != "cpu" or compat.attention_implementation(config) != before:
        return
    products.register()
    model.set_attn_implementation({"vision_config": after})


def _for_text_part(model: Any, attention: str) -> str | dict[str, str]:
    return attention if model.config.get_text_config() is model.config else {"text_config": attention}


def _patched(plain: Any) -> Any:
    @functools.wraps(plain)  # generate() and Trainer read the signature
    def forward(
        self: Any,
        *args: Any,
        packed_rows: Sequence[PackedRow] | None = None,
        share_prompts: bool | None = None,
        router_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Without ``packed_rows``, do what the model does.

        Args:
            packed_rows: rows to score.
            share_prompts: whether the rows share prompts; None: as :func:`install` was called.
            router_losses: return ``(log-probs, router losses [responses of all rows])``.

        Returns:
            The log-probability of every scored token, ``[scored of all rows]``, row after row, response after response.
        """
        patch: Patch = self._vlmpo
        with nullcontext() if patch.masters is None else patch.masters.read():
            if packed_rows is None:
                refuse_bytes(kwargs.get("pixel_values"))
                return patch.plain_forward(*args, **as_weights_are(patch.masters, kwargs))
            return _read_rows(
                self, packed_rows, patch.shared if share_prompts is None else share_prompts, router_losses
            )

    return forward


def as_weights_are(masters: Masters | None, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return keywords of a forward, floating tensors among them in the type that the model is read in."""
    if masters is None:
        return tensors
    return {name: t.to(HALF) if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in tensors.items()}


def _read_rows(model: Any, rows: Sequence[PackedRow], shared: bool, router_losses: bool) -> Any:
    logps: list[Tensor] = []
    losses: list[Tensor] = []
    for number, row in enumerate(rows):
        if number and model._vlmpo.masters is not None:
            model._vlmpo.masters.renew()
        with recording_routers(model) if router_losses else nullcontext() as router_logits:
            logps.append(_read_row(model, row, shared))
        if router_logits is not None:
            top_k = int(model.config.get_text_config().num_experts_per_tok)
            losses.append(response_router_losses(router_logits, row.layout, top_k)[: row.num_responses])
    if not rows:
        logps = losses = [_empty_on_weights(model)]
    return (torch.cat(logps), torch.cat(losses)) if router_losses else torch.cat(logps)


def _read_row(model: Any, row: PackedRow, shared: bool) -> Tensor:
    """Return the log-probs of one row's scored tokens, ``[scored]``."""
    refuse_missing_types(model, row)
    refuse_bytes(row.vision.get("pixel_values"))
    vision = row.vision if model._vlmpo.frozen_tower is None else vision_arguments(model, row)
    vision = as_weights_are(model._vlmpo.masters, vision)
    arguments: dict[str, Any] = {"input_ids": row.input_ids, "use_cache": False, **vision}
    arguments |= accepted(model.base_model, row.token_types)
    if shared:
        # A separate row is an ordinary prompt: the model counts its positions as it always does.
        arguments |= layout_arguments(layout_of(model, row), row.input_ids)
        arguments["position_ids"] = positions_of(model, row)
    with placeholders_from_host(model.base_model, row):
        hidden = model.base_model(**arguments).last_hidden_state[0]  # [tokens, hidden]
    transform = LogitTransform(*logit_scale_and_softcap(model.config))
    head = model.get_output_embeddings()
    return token_logps(scored_states(hidden, row), head, row.targets, logit_transform=transform)


def _empty_on_weights(model: Any) -> Tensor:
    """Return an empty tensor that depends on a weight, so that a rank without rows joins the others' backward pass."""
    weight = model.get_output_embeddings().weight
    if not weight.requires_grad:  # under LoRA, for one
        weight = next((other for other in model.parameters() if other.requires_grad), weight)
    empty: Tensor = weight.flatten()[:0].to(wide(weight.dtype))
    return empty


def accepted(model: Any, token_types: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of ``token_types`` that ``model``'s forward accepts; it would pass the others on to its layers."""
    named = inspect.signature(type(model).forward).parameters
    return {name: types for name, types in token_types.items() if name in named}


def uses_shared_rows(model: Any) -> bool:
    """Return whether :func:`install` set this model up to share prompts."""
    return bool(model._vlmpo.shared)
