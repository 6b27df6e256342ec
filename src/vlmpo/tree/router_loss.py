"""Compute the load-balancing loss of mixture-of-experts routers, per response, whatever row it was read in.

transformers takes this loss over all tokens of a forward: the same pairs give other numbers as other batches. Here it
is taken over one response's sequence, its prompt and itself, as a forward of that response alone would. So shared rows,
separate rows and every split of the batch agree, and a mean over responses has one global denominator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.errors import ModelError
from vlmpo.loss import LossOutput
from vlmpo.models.families import family_of
from vlmpo.tree.chunked_logprobs import wide
from vlmpo.tree.layout import RowLayout
from vlmpo.tree.ordered import Select

TERM = "router_aux"  # its name among the terms of the loss


def router_coefficient(config: Any) -> float | None:
    """Return the weight of the router loss if a model's config switches it on (``output_router_logits``), else None.

    Raises:
        ModelError: it is on for a text tower whose routers are not supported.
    """
    text = config.get_text_config()
    coefficient = float(getattr(text, "router_aux_loss_coef", None) or 0.0)
    if not getattr(text, "output_router_logits", False) or not coefficient:
        return None
    if not family_of(text).routed:
        raise ModelError(
            f"the model's config switches on the router loss of a {text.model_type!r} text tower, which vlmpo does not "
            "support; set output_router_logits to false in its config.json to train without it"
        )
    return coefficient


def add_router_loss(
    output: LossOutput,
    losses: Tensor,
    chosen: Tensor,
    rejected: Tensor | None,
    coefficient: float,
    num_pairs: float | None = None,
) -> LossOutput:
    """Add a micro-batch's share of the router loss: ``coefficient`` times the mean over all responses.

    Args:
        output: the terms of MPO.
        losses: ``[responses]`` of the micro-batch.
        chosen, rejected: ``[pairs]``, the responses that count; whatever else was read does not.
        coefficient: the config's ``router_aux_loss_coef``.
        num_pairs: of the global batch; None: this micro-batch's own.
    """
    counted = [chosen] if rejected is None else [chosen, rejected]
    responses = len(counted) * (len(chosen) if num_pairs is None else num_pairs)
    share = Select.apply(losses, torch.cat(counted)).sum() / max(responses, 1.0)
    return replace(output, loss=output.loss + coefficient * share, terms={**output.terms, TERM: share.detach()})


def response_router_losses(layers: Sequence[Tensor], layout: RowLayout, top_k: int) -> Tensor:
    """Return the load-balancing loss of each response's sequence (prompt and response).

    Switch Transformer, eqs. 4-6 (arXiv 2101.03961): with N experts, ``f_i`` the share of a sequence's tokens sent to
    expert i and ``P_i`` its mean routing probability, ``N sum_i f_i P_i``. As in transformers'
    ``load_balancing_loss_func`` a token counts once for each of its k experts and once for each layer.

    Args:
        layers: the routers' logits, ``[tokens, experts]`` a layer.
        layout: the row's spans.
        top_k: experts a token is sent to.

    Returns:
        ``[responses of the layout]``, float32 or better; the gradient goes through the probabilities alone.
    """
    device, experts = layers[0].device, layers[0].shape[1]
    sent = torch.zeros(layout.num_tokens, experts, dtype=wide(layers[0].dtype), device=device)
    probabilities = torch.zeros_like(sent)
    for logits in layers:
        routed = logits.softmax(dim=-1)
        probabilities = probabilities + routed.to(sent.dtype)
        sent = sent + torch.zeros_like(sent).scatter_(1, routed.topk(top_k, dim=-1).indices, 1.0)
    # Summed part by part, prompts and responses: index_add would add by atomics.
    sizes = [size for span in layout.spans for size in (span.prompt, *span.responses)]
    parts = iter([part.sum(dim=0) for part in torch.cat([sent, probabilities], dim=1).split(sizes)])
    sums: list[Tensor] = []  # of each response and its prompt, [2 x experts]
    tokens: list[int] = []
    for span in layout.spans:
        prompt = next(parts)
        sums += [prompt + next(parts) for _ in span.responses]
        tokens += [span.prompt + length for length in span.responses]
    means = torch.stack(sums) / (len(layers) * torch.tensor(tokens, device=device)[:, None])
    return experts * (means[:, :experts] * means[:, experts:]).sum(dim=1)


# ---- the routers of a model ----


@contextmanager
def recording_routers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the routers' logits of the forward inside, ``[tokens, experts]`` a layer.

    What a later backward pass computes again is not collected.

    Raises:
        ModelError: the model has no router, or its router would get no gradient.
    """
    logits: list[Tensor] = []
    routers = routers_of(model)

    def collect(module: nn.Module, arguments: Any, output: Any) -> None:
        logits.append(output[0])  # transformers' routers return logits, weights and indices

    hooks = [router.register_forward_hook(collect) for router in routers]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()
    trained = any(parameter.requires_grad for router in routers for parameter in router.parameters())
    if torch.is_grad_enabled() and trained and not all(layer.requires_grad for layer in logits):
        # Re-entrant checkpointing runs a layer without gradient first: what was collected would train nothing.
        raise ModelError(
            "the router loss gets no gradient under re-entrant checkpointing; set "
            "training.gradient_checkpointing_kwargs: {use_reentrant: false}"
        )


def routers_of(model: nn.Module) -> list[nn.Module]:
    """Return the routers of a model: the modules that transformers records as ``router_logits``.

    Raises:
        ModelError: it has none.
    """
    kinds = tuple({kind for module in model.modules() if (kind := compat.router_class(module)) is not None})
    routers = [module for module in model.modules() if isinstance(module, kinds)]
    if not routers:
        raise ModelError("the model's config switches on a router loss (output_router_logits), but it has no router")
    return routers
