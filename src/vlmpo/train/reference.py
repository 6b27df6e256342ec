"""The frozen reference: a copy of the initial policy, or the policy with its adapter switched off."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmpo.errors import ModelError, RecipeError
from vlmpo.train.sharding import is_partitioned, release, unwrapped, whole
from vlmpo.tree.layout import Row
from vlmpo.tree.logprobs import install, uses_shared_rows

# Attributes under which transformers' attention layers keep a dropout rate that is no module.
_DROPOUT_RATES = ("attention_dropout", "dropout", "dropout_p", "dropout_prob", "hidden_dropout", "activation_dropout")


class Reference(Protocol):
    """Whatever knows the reference's token log-probs of rows."""

    def token_logps(self, rows: Sequence[Row]) -> Tensor:
        """``[scored of all rows]``, without gradient."""

    def weights_hash(self) -> str:
        """Tells one reference's weights from another's."""


class CopyReference:
    """A frozen model of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hash: str | None = None

    def token_logps(self, rows: Sequence[Row]) -> Tensor:
        """``[scored of all rows]``, without gradient."""
        with torch.no_grad():
            logps = self.model(branch_rows=rows)
        release(self.model)
        return logps

    def weights_hash(self) -> str:
        """Tells one reference's weights from another's."""
        self._hash = self._hash or weights_hash(unwrapped(self.model), with_adapter=True)
        return self._hash


class AdapterReference:
    """The policy itself, read with its LoRA adapter switched off: no second copy of the weights."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._hash: str | None = None

    def token_logps(self, rows: Sequence[Row]) -> Tensor:
        """``[scored of all rows]``, without gradient."""
        with torch.no_grad(), self.policy.disable_adapter():
            return self.policy(branch_rows=rows)

    def weights_hash(self) -> str:
        """Tells one reference's weights from another's."""
        self._hash = self._hash or weights_hash(self.policy, with_adapter=False)
        return self._hash


def is_peft(model: Any) -> bool:
    """Whether ``model`` is a PEFT model, without importing peft for those that are not."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if is_peft(model) else model


def choose_kind(kind: str, policy: Any, given: Any | None, fresh_adapter: bool) -> str:
    """``copy`` or ``adapter``, as asked or as fits.

    ``auto`` switches the adapter off only where it is ``fresh_adapter``, put on for this run: one that came with the
    policy is part of what was trained before, so the reference keeps a frozen copy of it.

    Raises:
        RecipeError: ``adapter`` without an adapter, or beside a reference model.
    """
    if kind == "adapter" and not is_peft(policy):
        raise RecipeError("reference.kind is 'adapter', but the policy carries none; set model.lora or kind: copy")
    if kind == "adapter" and given is not None:
        raise RecipeError("reference.kind is 'adapter', but a reference model was given too; leave one of them out")
    if kind != "auto":
        return kind
    return "adapter" if fresh_adapter and given is None else "copy"


def frozen_copy(policy: Any) -> nn.Module:
    """A deep copy of the policy (its adapter included) that never learns.

    Raises:
        ModelError: ZeRO-3 has taken the policy's weights apart already.
    """
    if is_partitioned(policy):
        raise ModelError(
            "under DeepSpeed ZeRO-3 the policy cannot be copied for the reference; pass the initial model a second "
            "time as ref_model, or train with model.lora"
        )
    return freeze(copy.deepcopy(policy), uses_shared_rows(base_of(policy)))


def freeze(model: Any, shared: bool) -> nn.Module:
    """Make ``model`` a reference: no gradients, no dropout, answering rows the same way as the policy."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    switch_dropout_off(model)
    install(base_of(model), shared)
    return model.eval()


def switch_dropout_off(model: nn.Module) -> list[str]:
    """Set every dropout rate in ``model`` to 0; the names of the modules where one was on.

    With dropout on, policy and reference of the same weights would differ and the first rewards not be 0. The saved
    config is left as it is.
    """
    found = []
    for name, module in model.named_modules():
        rates = [r for r in _DROPOUT_RATES if isinstance(getattr(module, r, None), float) and getattr(module, r) > 0]
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            rates.append("p")
        for rate in rates:
            setattr(module, rate, 0.0)
        if rates:
            found.append(name)
    return found


def weights_hash(model: Any, with_adapter: bool) -> str:
    """BLAKE2 of a reference's weights by name, with the adapter's or without. Hex, 32 digits.

    The same for a model whose weights are sharded over ranks, each of which must then ask.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(base_of(model).state_dict(keep_vars=True).items()):
        if not with_adapter and "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        tensor = whole(weight)
        digest.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
