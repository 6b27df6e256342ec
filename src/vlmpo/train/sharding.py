"""What the wrappers that shard a model (FSDP2, DeepSpeed) need beyond what accelerate does for the policy.

accelerate prepares one model, with its optimizer. The reference is a second one, without; it is sharded here likewise.
And accelerate's FSDP2 would round the forward's output, our log-probs, and the sum of gradients over ranks to the
half-precision type; both stay in float32 here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from vlmpo import compat
from vlmpo.errors import RecipeError, RunError


def passes_are_shared(accelerator: Any) -> bool:
    """Whether every pass of a rank needs the other ranks: FSDP and DeepSpeed, not DDP."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def all_gather_object(accelerator: Any, mine: Any) -> list[Any]:
    """``mine``, any object, of every rank, in order of the ranks."""
    if accelerator.num_processes == 1:
        return [mine]
    from accelerate.utils import gather_object

    return gather_object([mine])


def broadcast_object(accelerator: Any, mine: Any) -> Any:
    """The first rank's object, whatever the others have."""
    if accelerator.num_processes == 1:
        return mine
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([mine])[0]


def configure_fsdp(accelerator: Any, model: nn.Module) -> None:
    """Refuse FSDP1; keep FSDP2's mixed precision from rounding log-probs and summed gradients; name the layers to wrap.

    A model's own list of layers also names some of its towers' other halves (CLIP's text model in LLaVA), which it has
    not; accelerate would stop at the first of them.

    Raises:
        RecipeError: FSDP of version 1.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
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
    """Around a backward pass after which the same micro-batch has others.

    DDP sums gradients over ranks in the last one only. FSDP2 does so in each: kept back, they would be whole on every
    rank. DeepSpeed steps the optimizer in the backward pass unless told that no gradients are due yet.
    """
    due = accelerator.gradient_state.sync_gradients
    compat.set_gradient_sync(accelerator, False)
    try:
        with contextlib.nullcontext() if passes_are_shared(accelerator) else accelerator.no_sync(model):
            yield
    finally:
        compat.set_gradient_sync(accelerator, due)


def compute_dtype(accelerator: Any) -> torch.dtype | None:
    """Return the type that a sharded model computes in: no autocast around it converts pixels. None: not sharded."""
    if accelerator.distributed_type == DistributedType.FSDP:
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        return None if policy is None else policy.param_dtype
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return None


def prepare_frozen(accelerator: Any, model: nn.Module) -> nn.Module:
    """A model that only answers, placed, converted and sharded as accelerate does it with the policy."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_engine(accelerator, model)
    if accelerator.distributed_type == DistributedType.FSDP:
        return shard(accelerator, model)
    prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    compat.forget_model(accelerator, prepared)
    return prepared


def shard(accelerator: Any, model: nn.Module) -> nn.Module:
    """``model`` under FSDP2, in place, as accelerate's plugin says; harmless when done twice."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)


def prepare_to_score(accelerator: Any, model: nn.Module) -> nn.Module:
    """A policy that is scored before training has prepared it.

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
    """While a model is saved: under FSDP2 all of it, even where checkpoints hold a shard a rank."""
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
    """Stage 3 shards the reference as well; below it each rank holds the weights, converted as the policy's are."""
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
    """Give up the gathered weights that FSDP2 keeps after a forward, for a backward that does not come here."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under DeepSpeed's engine or DDP; what FSDP2 shards is the model itself."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 took the weights apart when they were loaded, so that a copy of the model would hold nothing."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """A weight in full, on every rank; all ranks must ask for the same ones in the same order."""
    detached: Any = tensor.detach()
    if hasattr(detached, "full_tensor"):  # a DTensor of FSDP2
        return detached.full_tensor()
    if hasattr(tensor, "ds_id"):  # a parameter of ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return detached


def leave_process_group(*, destroy: bool) -> None:
    """Give gloo's threads time to finish, if there is a process group, and then destroy it if ``destroy`` is set.

    A thread that frees the last collective's tensors while the interpreter shuts down aborts the process: the exit code
    is lost, and the launcher kills the first rank, which may still be writing the model. The thread needs the
    interpreter's lock, and gets it while this one sleeps. (Joining the threads by dropping every reference to the group
    can deadlock: torch holds the lock there.)
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.5)
        if destroy:
            torch.distributed.destroy_process_group()
