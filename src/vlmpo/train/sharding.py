"""Shard models and collect over ranks, beyond what accelerate does for the policy (FSDP2, DeepSpeed, DDP).

accelerate prepares one model, with its optimizer. The reference is a second one, without an optimizer; it is sharded
here in the same way. And accelerate's FSDP2 would round log-probs, which are the forward's output, and gradients summed
over ranks to the half-precision type; both stay in float32 here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    extract_model_from_parallel,
    gather_object,
)
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.errors import RecipeError, RunError
from vlmpo.log import logger


def passes_are_shared(accelerator: Any) -> bool:
    """Return whether every pass of a rank needs the other ranks: under FSDP and DeepSpeed, not under DDP."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def all_gather_object(accelerator: Any, value: Any) -> list[Any]:
    """Return the ``value`` of every rank, any object, in order of the ranks."""
    return [value] if accelerator.num_processes == 1 else gather_object([value])


def broadcast_object(accelerator: Any, value: Any) -> Any:
    """Return the first rank's ``value``, any object, on every rank."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]


def configure_fsdp(accelerator: Any, model: nn.Module, asked_for: bool) -> None:
    """Refuse FSDP1; name the layers to wrap; keep log-probs and summed gradients in float32 under mixed precision.

    A model's list of layers may name some that it lacks (of CLIP's text model, in LLaVA); accelerate would stop at the
    first of them.

    Args:
        accelerator: of the run.
        model: the policy.
        asked_for: whether ``training.fsdp`` is set; accelerate does not shard on a CPU, and says nothing.

    Raises:
        RecipeError: FSDP of version 1.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        if asked_for:
            kind = accelerator.device.type
            logger.info(f"NOT sharded: training.fsdp has no effect on {kind}, where each process holds the whole model")
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError(
            "FSDP of version 1 is not supported; set training.fsdp_config.version: 2 "
            "(fsdp_version: 2 in an accelerate config)"
        )
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & compat.layers_to_wrap(model))
    policy = plugin.mixed_precision_policy
    if policy is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


@contextlib.contextmanager
def no_gradient_sync(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Run the body, a backward pass, knowing that it is not the last one of its optimizer step's batch.

    DDP then sums gradients over ranks in the last one only. FSDP2 sums them in each: gradients kept back would take a
    whole model's memory on every rank. DeepSpeed steps the optimizer in the backward pass unless no gradients are due.
    """
    due = accelerator.gradient_state.sync_gradients
    compat.set_gradient_sync(accelerator, False)
    try:
        with contextlib.nullcontext() if passes_are_shared(accelerator) else accelerator.no_sync(model):
            yield
    finally:
        compat.set_gradient_sync(accelerator, due)


def compute_dtype(accelerator: Any) -> torch.dtype | None:
    """Return the type that a sharded model computes in, None for a model that is not sharded.

    No autocast converts the pixels that a sharded model is given.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        return None if policy is None else policy.param_dtype
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return None


def prepare_frozen(accelerator: Any, model: nn.Module) -> nn.Module:
    """Return a model that never trains, placed, converted and sharded as accelerate does it with the policy."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_engine(accelerator, model)
    if accelerator.distributed_type == DistributedType.FSDP:
        return shard(accelerator, model)
    prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    compat.forget_model(accelerator, prepared)
    return prepared


def shard(accelerator: Any, model: nn.Module) -> nn.Module:
    """Shard ``model`` in place by FSDP2, with the run's FSDP settings; a second call changes nothing."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)


def prepare_to_score(accelerator: Any, model: nn.Module) -> nn.Module:
    """Return the policy ready to be scored, before training has prepared it.

    Raises:
        RunError: under DeepSpeed, whose engine exists only once training has begun.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise RunError("DeepSpeed can score a model only once training has begun; evaluate without DeepSpeed")
    if accelerator.distributed_type == DistributedType.FSDP:
        return shard(accelerator, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextlib.contextmanager
def whole_state_dict(accelerator: Any) -> Iterator[None]:
    """Save models whole in the body, also under FSDP2 with checkpoints of one shard a rank."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    from torch.distributed.fsdp import StateDictType

    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind


def _deepspeed_engine(accelerator: Any, model: nn.Module) -> nn.Module:
    """Return ``model`` in an engine: sharded under stage 3, else whole; its weights converted as the policy's are."""
    import deepspeed

    policy = accelerator.state.deepspeed_plugin.deepspeed_config
    stage = policy.get("zero_optimization", {}).get("stage", 0)
    zero: dict[str, Any] = {"stage": 3 if stage == 3 else 0}
    if stage == 3 and "offload_param" in policy["zero_optimization"]:
        zero["offload_param"] = policy["zero_optimization"]["offload_param"]
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    config |= {name: policy[name] for name in ("bf16", "fp16") if name in policy}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def release(model: nn.Module) -> None:
    """Free the gathered weights that FSDP2 keeps after a forward for its backward pass; a reference has none."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DeepSpeed's engine or DDP; FSDP2 shards the model itself."""
    return extract_model_from_parallel(model)


def is_partitioned(model: nn.Module) -> bool:
    """Return whether ZeRO-3 partitioned the weights as they were loaded, so that a copy of the model would be empty."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole weight on every rank; all ranks must call this for the same weights in the same order."""
    detached: Any = tensor.detach()
    if hasattr(detached, "full_tensor"):  # a DTensor of FSDP2
        return detached.full_tensor()
    if hasattr(tensor, "ds_id"):  # a parameter of ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return detached
