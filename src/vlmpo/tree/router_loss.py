"""The load-balancing loss of mixture-of-experts routers, per response, whatever row it was read in.

transformers takes this loss over all tokens of a forward: the same pairs give other numbers as other batches. Here it
is taken over one response's sequence, its prompt and itself, as a forward of that response alone would. So shared rows,
separate rows and every split of the batch agree, and a mean over responses has one global denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.errors import ModelError
from vlmpo.models.families import family_of
from vlmpo.tree.layout import PackedRow, RowLayout


class ResponseScores(NamedTuple):
    """What a model answers when it is asked for its router losses too.

    Attributes:
        token_logps: ``[scored of all rows]``, as without them.
        router_losses: ``[responses of all rows]``, float32 or better.
    """

    token_logps: Tensor
    router_losses: Tensor


def router_coefficient(config: Any) -> float | None:
    """The weight of the router loss, where a model's config switches it on (``output_router_logits``); else None.

    Raises:
        ModelError: it is on for a text tower whose routers are not known here.
    """
    text = config.get_text_config()
    coefficient = float(getattr(text, "router_aux_loss_coef", None) or 0.0)
    if not getattr(text, "output_router_logits", False) or not coefficient:
        return None
    if not family_of(text).routed:
        raise ModelError(
            f"the model's config asks for the router loss of a {text.model_type!r} text tower, which is not known "
            "here; set output_router_logits to false in its config.json to train without it"
        )
    return coefficient


def with_router_losses(
    model: Any, rows: Sequence[PackedRow], score: Callable[[Sequence[PackedRow]], Tensor]
) -> ResponseScores:
    """``score`` (rows to token log-probs) run row by row, and the router loss of every response beside it."""
    logps, losses = [], []
    top_k = int(model.config.get_text_config().num_experts_per_tok)
    for row in rows:
        with _recording(model) as layers:
            logps.append(score([row]))
        _refuse_dead_gradients(model, layers)
        losses.append(response_router_losses(layers, row.layout, top_k)[: row.num_responses])
    if not rows:
        empty = score([])
        return ResponseScores(empty, empty)
    return ResponseScores(torch.cat(logps), torch.cat(losses))


def response_router_losses(layers: Sequence[Tensor], layout: RowLayout, top_k: int) -> Tensor:
    """Load-balancing loss of each response's sequence (prompt and response), Switch Transformer eqs. 4-6 (arXiv
    2101.03961).

    With N experts, ``f_i`` the share of a sequence's tokens sent to expert i and ``P_i`` its mean routing probability,
    ``N sum_i f_i P_i``; as in transformers' ``load_balancing_loss_func`` a token counts once for each of its k experts
    and once for each layer.

    Args:
        layers: the routers' logits, ``[tokens, experts]`` a layer.
        layout: the row's spans.
        top_k: experts a token is sent to.

    Returns:
        ``[responses of the layout]``, float32 or better; the gradient goes through the probabilities alone.
    """
    device, experts = layers[0].device, layers[0].shape[1]
    segments, prompt_of, response_index = _segments(layout)
    sizes = torch.tensor(segments, device=device)
    wide = torch.promote_types(layers[0].dtype, torch.float32)
    sent = torch.zeros(layout.num_tokens, experts, dtype=wide, device=device)
    probabilities = torch.zeros_like(sent)
    for logits in layers:
        routed = logits.softmax(dim=-1)
        probabilities = probabilities + routed.to(wide)
        sent = sent + torch.zeros_like(sent).scatter_(1, routed.topk(top_k, dim=-1).indices, 1.0)
    owner = torch.repeat_interleave(torch.arange(len(segments), device=device), sizes, output_size=layout.num_tokens)

    def by_response(
        values: Tensor,
    ) -> Tensor:  # [tokens, experts] -> sums over prompt and response, [responses, experts]
        sums = values.new_zeros(len(segments), experts).index_add(0, owner, values)
        return sums[prompt_of] + sums[response_index]

    rows = len(layers) * (sizes[prompt_of] + sizes[response_index])[:, None]
    return experts * ((by_response(sent) / rows) * (by_response(probabilities) / rows)).sum(dim=1)


def _segments(layout: RowLayout) -> tuple[list[int], list[int], list[int]]:
    """Lengths of prompts and responses in order of the row; for each response the index of its prompt, and its own."""
    lengths: list[int] = []
    prompt_of: list[int] = []
    response_index: list[int] = []
    for span in layout.spans:
        prompt = len(lengths)
        lengths += [span.prompt, *span.responses]
        prompt_of += [prompt] * len(span.responses)
        response_index += range(prompt + 1, len(lengths))
    return lengths, prompt_of, response_index


# ---- the routers of a model ----


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[Tensor]]:
    """The routers' logits of the forwards inside, ``[tokens, experts]`` a layer. Recomputation later is not heard."""
    logits: list[Tensor] = []

    def listen(module: nn.Module, arguments: Any, output: Any) -> None:
        logits.append(output[0])  # transformers' routers return logits, weights and indices

    hooks = [router.register_forward_hook(listen) for router in routers_of(model)]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The routers of a model: the modules that transformers records as ``router_logits``.

    Raises:
        ModelError: it has none.
    """
    kinds = tuple({kind for module in model.modules() if (kind := compat.router_class(module)) is not None})
    routers = [module for module in model.modules() if isinstance(module, kinds)]
    if not routers:
        raise ModelError("the model's config asks for a router loss (output_router_logits), but it has no router")
    return routers


def _refuse_dead_gradients(model: nn.Module, layers: Sequence[Tensor]) -> None:
    """Re-entrant checkpointing runs a layer without gradient first: what is heard of it then would train nothing."""
    if not torch.is_grad_enabled():
        return
    trained = any(parameter.requires_grad for router in routers_of(model) for parameter in router.parameters())
    if trained and not all(logits.requires_grad for logits in layers):
        raise ModelError(
            "the router loss gets no gradient under re-entrant checkpointing; set "
            "training.gradient_checkpointing_kwargs: {use_reentrant: false}"
        )
