"""When policy and reference of a run share image features: the vision tower does not train, and both have the same."""

from __future__ import annotations

from typing import Any

from vlmpo.log import logger
from vlmpo.models.adapters import unwrap_peft
from vlmpo.train.reference import AdapterReference, CopyReference
from vlmpo.tree.features import share_features


def share_if_frozen(trainer: Any) -> bool:
    """Let the policy of ``trainer`` take image features from its reference, where that changes no number.

    Asked again when other weights were loaded. Not under FSDP or DeepSpeed, whose hooks would miss a tower that is
    called outside of its model's forward, nor with log-probs from a store, which reads no images.

    Returns:
        Whether it does now.
    """
    policy, reference = unwrap_peft(trainer.model), trainer.reference
    if isinstance(reference, AdapterReference):
        other = policy
    elif isinstance(reference, CopyReference):
        other = unwrap_peft(trainer.accelerator.unwrap_model(reference.model))
    else:
        return False
    before = getattr(policy, "_vlmpo_tower", None) is not None
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    shared = share_features(policy, other, share=not sharded)
    if shared and not before:
        logger.info("the vision tower is frozen: image features are computed once a step, for policy and reference")
    return shared
