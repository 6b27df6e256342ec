"""Small models under vlmpo on a device, beside their own forward on the CPU: log-probs and gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vlmpo.tree import attention
from vlmpo.tree.forward import install


def flat_gradient(model: Any) -> Tensor:
    """Return all gradients, concatenated, float32 on the CPU."""
    return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])


def reading(model: Any, rows: list[Any], weights: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the log-probs, and the gradient of their weighted sum."""
    model.zero_grad()
    logps = model(packed_rows=[row.to(device) for row in rows])
    (logps * weights.to(device)).sum().backward()
    return logps.detach().float().cpu(), flat_gradient(model)


def own_forward(model: Any, pairs: list[Any], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probs and gradient from the model's own forward, one response at a time, on the CPU."""
    parts = []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            types = {name: torch.cat([t, torch.zeros_like(response)])[None] for name, t in pair.token_types.items()}
            ids = torch.cat([pair.prompt_ids, response])[None]
            logps = model(input_ids=ids, **types, **pair.vision).logits[0].log_softmax(-1)
            parts.append(logps[pair.prompt_ids.numel() - 1 : -1].gather(1, response[:, None]).squeeze(1))
    all_logps = torch.cat(parts)
    (all_logps * weights).sum().backward()
    return all_logps.detach(), flat_gradient(model)


def compare(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the largest and mean difference of log-probs in nats, and the relative difference of gradients."""
    difference = (one[0] - other[0]).abs()
    gradient = float((one[1] - other[1]).norm() / other[1].norm())
    return {"largest": float(difference.max()), "mean": float(difference.mean()), "gradient": gradient}


def parity_of(name: str, device: torch.device) -> dict[str, dict[str, float]]:
    """Compare vlmpo on the device to the family's own forward on the CPU; in bf16 also without the one-call kernel."""
    from tests.zoo import FAMILIES, encoded_pairs

    from vlmpo.train.batching import lay_out

    pairs = list(encoded_pairs(name).values())
    rows = list(lay_out(pairs, True).rows)
    scored = sum(row.targets.numel() for row in rows)
    weights = torch.randn(scored, generator=torch.Generator().manual_seed(0))
    expected = own_forward(FAMILIES[name].model(0), pairs, weights)
    figures: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = FAMILIES[name].model(0).to(device, dtype)
        install(model, shared=True)
        label = str(dtype).removeprefix("torch.")
        figures[label] = compare(reading(model, rows, weights, device), expected)
    with mock.patch.object(attention, "kernel_for", return_value=None):
        figures["bfloat16, SDPA"] = compare(reading(model, rows, weights, device), expected)
    return figures
