"""Build and read the frozen reference: a copy of the initial policy, or its base model under other adapter weights."""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.errors import ModelError
from vlmpo.models.adapters import (
    active_adapter,
    adapter_places,
    add_frozen_adapter,
    choose_kind,
    is_peft,
    split_name,
    unwrap_peft,
    use_adapter,
)
from vlmpo.models.kernels import Kernels
from vlmpo.models.masters import round_weights, rounded_copy
from vlmpo.train.batching import MicroBatch
from vlmpo.train.host_weights import HostWeights, can_rest
from vlmpo.train.sharding import full_tensor, is_partitioned, prepare_frozen, release, unwrapped
from vlmpo.tree.forward import install, sum_by_response, uses_shared_rows
from vlmpo.tree.vision_blocks import read_in_blocks

# Attributes under which transformers' attention layers keep a dropout rate that is no module.
_DROPOUT_RATES = (
    "attention_dropout",
    "dropout",
    "dropout_p",
    "dropout_prob",
    "hidden_dropout",
    "activation_dropout",
    "jitter_noise",  # of Mixtral's routers
)


class Reference(Protocol):
    """Gives the log-probs of the frozen reference."""

    def response_logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return each response's log-prob summed over its scored tokens, ``[responses]``, without gradient."""

    def token_logps(self, micro_batch: MicroBatch) -> Tensor | None:
        """Return each scored token's log-prob, ``[scored]``, without gradient; None if only their sums are known."""

    def stop_sharing(self) -> None:
        """Read every response in a row of its own from now on."""

    def read_in_blocks(self, on: bool) -> None:
        """Read images in blocks of tiles, as the policy does; or not."""

    def tower_owner(self) -> Any | None:
        """Return the model whose image features the policy may take; None if the reference reads no images here."""

    def weights_hash(self) -> str:
        """Return a hash of the reference's weights."""

    def rest_on_host(self) -> bool:
        """Keep a model of its own in host memory between uses from now on; return whether that frees any memory."""


class CopyReference:
    """Reads a frozen model that is not the policy.

    Args:
        model: the model, prepared.
        known_hash: of its weights as they were given, if it holds others; None: it holds those.
    """

    def __init__(self, model: nn.Module, known_hash: str | None = None) -> None:
        self.model = model
        self._hash = known_hash
        self._host: HostWeights | None = None  # its weights, if they are in host memory between uses

    def response_logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return ``[responses]``, without gradient."""
        return sum_by_response(self.token_logps(micro_batch), micro_batch.rows)

    def token_logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return ``[scored]``, without gradient."""
        with torch.no_grad(), nullcontext() if self._host is None else self._host.on_device():
            logps: Tensor = self.model(packed_rows=micro_batch.rows)
        release(self.model)
        return logps

    def rest_on_host(self) -> bool:
        """Keep the weights in host memory between uses; a model that other ranks hold parts of stays as it is."""
        if self._host is not None or not can_rest(self.model) or unwrapped(self.model) is not self.model:
            return False
        self._host = HostWeights(self.model)
        return True

    def stop_sharing(self) -> None:
        """Read every response in a row of its own from now on."""
        install(self.tower_owner(), shared=False)

    def read_in_blocks(self, on: bool) -> None:
        """Read images in blocks of tiles, as the policy does; or not."""
        read_in_blocks(self.tower_owner(), on)

    def tower_owner(self) -> Any | None:
        """Return the model, under no wrapper."""
        return unwrap_peft(unwrapped(self.model))

    def weights_hash(self) -> str:
        """Return a hash of the weights, and of the adapter if there is one."""
        if self._hash is None:
            self._hash = _hash_of(unwrapped(self.model))
        return self._hash


def copy_reference(model: nn.Module, accelerator: Any, rounded: bool) -> CopyReference:
    """Return a reference that reads ``model``, which is frozen; ``rounded``: as masters are read.

    The model is then held in bfloat16: its float32 weights are gone, and only their hash is kept.
    """
    known_hash = _hash_of(model) if rounded else None
    if rounded:
        round_weights(model)
    return CopyReference(prepare_frozen(accelerator, model), known_hash)


def _hash_of(model: Any) -> str:
    return weights_hash(model, active_adapter(model) if is_peft(model) else None)


class AdapterReference:
    """Reads the policy itself, with its adapter off or a frozen one in its place: no second copy of the base.

    Args:
        policy: a PEFT model.
        frozen: name of the adapter that is read instead of the policy's; None: the base model alone.
    """

    def __init__(self, policy: Any, frozen: str | None = None) -> None:
        self.policy = policy
        self.frozen = frozen
        self._hash: str | None = None

    @property
    def words(self) -> str:
        """What is read, in words."""
        return "the model with its adapter off" if self.frozen is None else "the model under its first adapter"

    def response_logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return ``[responses]``, without gradient."""
        return sum_by_response(self.token_logps(micro_batch), micro_batch.rows)

    def token_logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return ``[scored]``, without gradient."""
        with torch.no_grad(), use_adapter(self.policy, self.frozen):
            logps: Tensor = self.policy(packed_rows=micro_batch.rows)
        return logps

    def rest_on_host(self) -> bool:
        """Return False: the weights are the policy's own."""
        return False

    def stop_sharing(self) -> None:
        """Do nothing: the policy, which is the model that is read here, is set up by the trainer."""

    def read_in_blocks(self, on: bool) -> None:
        """Do nothing: the policy is the model that is read here."""

    def tower_owner(self) -> Any | None:
        """Return the policy's own base model."""
        return unwrap_peft(self.policy)

    def weights_hash(self) -> str:
        """Return a hash of the base model's weights, and of the frozen adapter's if there is one."""
        self._hash = self._hash or weights_hash(self.policy, self.frozen)
        return self._hash


def online_reference(
    kind: str,
    *,
    policy: Any,
    given: Any | None,
    fresh_adapter: bool,
    shared: bool,
    kernels: Kernels,
    accelerator: Any,
    rounded: bool,
) -> Reference:
    """Build the reference that is read in this process.

    Args:
        kind: ``auto``, ``copy`` or ``adapter``, see :func:`choose_kind`.
        policy: the initial policy.
        given: a reference model of the user's, or None.
        fresh_adapter: whether the policy's adapter was put on for this run.
        shared: whether rows share prompts.
        kernels: of the run.
        accelerator: of the run.
        rounded: whether the policy's weights are masters, of which roundings are read; a copy is rounded then.
    """
    kind = choose_kind(kind, policy, given, fresh_adapter)
    if kind != "copy":
        return AdapterReference(policy, add_frozen_adapter(policy) if kind == "frozen_adapter" else None)
    if given is None:
        return copy_reference(frozen_copy(policy, kernels), accelerator, rounded)
    if not rounded:
        return copy_reference(freeze(given, shared, kernels), accelerator, rounded)
    # Rounded in place it would be lost to its owner, who may give it to another run or share its tower with the policy.
    model = freeze(rounded_copy(given), shared, kernels)
    return CopyReference(prepare_frozen(accelerator, model), _hash_of(given))


def frozen_copy(policy: Any, kernels: Kernels) -> nn.Module:
    """Return a deep copy of the policy, its adapter included, that never learns.

    Raises:
        ModelError: ZeRO-3 has taken the policy's weights apart already.
    """
    if is_partitioned(policy):
        raise ModelError(
            "under DeepSpeed ZeRO-3 the policy cannot be copied for the reference; pass the initial model a second "
            "time as ref_model, or train with model.lora"
        )
    return freeze(copy.deepcopy(policy), uses_shared_rows(unwrap_peft(policy)), kernels)


def freeze(model: Any, shared: bool, kernels: Kernels) -> nn.Module:
    """Make ``model`` a reference: without gradients or dropout, reading rows as the policy does."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    switch_dropout_off(model)
    install(unwrap_peft(model), shared)
    kernels.bind(model)
    unwrap_peft(model)._vlmpo.masters = None  # of the policy that it is a copy of
    return model.eval()


def switch_dropout_off(model: nn.Module) -> list[str]:
    """Set every dropout rate in ``model`` to 0; return the names of the modules in which one was on.

    With dropout on, policy and reference would differ although their weights are equal, and the first rewards would
    not be 0. The saved config stays as it is.
    """
    switched_off = []
    for name, module in model.named_modules():
        rates = [r for r in _DROPOUT_RATES if isinstance(getattr(module, r, None), float) and getattr(module, r) > 0]
        if compat.is_dropout(module) and module.p > 0:
            rates.append("p")
        for rate in rates:
            setattr(module, rate, 0.0)
        if rates:
            switched_off.append(name)
    return switched_off


def weights_hash(model: Any, adapter: str | None) -> str:
    """Hash a reference's weights and their names to 32 hexadecimal digits (BLAKE2b).

    A model whose weights are sharded over ranks has the same hash; all ranks must call this together.

    Args:
        model: a transformers or PEFT model.
        adapter: the adapter whose weights count, whatever its name; None: the base model's alone.
    """
    base = unwrap_peft(model)
    places = adapter_places(base) if is_peft(model) else set()
    weights = {}
    for name, weight in base.state_dict(keep_vars=True).items():
        adapted = split_name(name, places)
        if adapted is None:
            weights[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = weight
        elif adapted.adapter == adapter:
            weights[f"{adapted.place}.{adapted.rest}"] = weight
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = full_tensor(weights[name])
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
