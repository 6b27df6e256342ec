"""What the tests over ranks share: pairs that load ranks unevenly, and FSDP2 on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig

from tests.tiny_models import SIZE, noise_image, random_pair
from tests.tiny_models import model as tiny_model
from tests.training import config, pairs, trainer
from vlmpo.train.sharding import full_tensor
from vlmpo.train.trainer import MPOTrainer

SEQUENTIAL = {"train_sampling_strategy": "sequential", "optim": "sgd", "optim_args": "momentum=0.9"}

SHUFFLED = {**SEQUENTIAL, "train_sampling_strategy": "random"}


def skewed_pairs(count: int) -> list:
    """Of every four pairs the first two have images, the others none; pairs 8 to 11 have none; pair 4 is far too long.

    Read in order by two ranks, two pairs each, rank 1 never has an image, rank 0 loses a pair in the second step, and
    in the third nobody has an image.
    """
    images = [(1, 2, 0, 0)[i % 4] if not 8 <= i < 12 else 0 for i in range(count)]
    made = [random_pair(i, images=images[i], longest=4 + 6 * (i % 5)) for i in range(count)]
    return [replace(pair, chosen="red " * 400) if i == 4 else pair for i, pair in enumerate(made)]


def uneven_pairs(count: int) -> list:
    """Of every five pairs the first has an image of many tiles, the second long responses, the last no image."""
    made = [random_pair(i, images=i % 5 != 4, longest=60 if i % 5 == 1 else 6) for i in range(count)]
    return [replace(pair, images=(noise_image(660, 440, i),)) if i % 5 == 0 else pair for i, pair in enumerate(made)]


def full_weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters concatenated, also of a sharded model."""
    return torch.cat([full_tensor(parameter).flatten() for parameter in model.parameters()])


def sharded_on_cpu() -> None:
    """From now on trainers of this process that ask for FSDP get it.

    On the CPU accelerate silently makes DDP of it; here the state is set right after the accelerator is made, before
    anything is prepared.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer

    plain = Trainer.create_accelerator_and_postprocess

    @functools.wraps(plain)
    def with_fsdp(self: Any) -> None:
        AcceleratorState._shared_state.clear()  # of an earlier trainer
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        plain(self)
        if self.args.fsdp_plugin_args is None:
            return
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        state = self.accelerator.state
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every AcceleratorState() reads it anew
        self.accelerator.native_amp = False
        self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = with_fsdp


def spoil(made: MPOTrainer, what: str, step: int, origin: str | None = None) -> None:
    """Make a number NaN in optimizer step ``step`` of this rank.

    ``policy`` or ``reference``: the log-prob of the chosen response of the pair of ``origin``, or of every pair;
    ``loss``: the sigmoid term; ``gradient``: of one weight.
    """
    due = lambda: made.state.global_step + 1 == step  # noqa: E731
    if what == "gradient":
        weight = [p for p in made.model.parameters() if p.requires_grad][-1]
        weight.register_hook(lambda grad: grad * float("nan") if due() else grad)
    elif what == "loss":
        plain_loss = made._loss

        def loss(*args: Any) -> Any:
            output = plain_loss(*args)
            nan = output.loss * float("nan")
            return replace(output, loss=nan, terms={**output.terms, "sigmoid": nan.detach()}) if due() else output

        made._loss = loss  # type: ignore[method-assign]
    else:
        plain_logps = made._response_logps

        def logps(model: Any, part: Any, with_router: bool = False) -> Any:
            policy, reference, router = plain_logps(model, part, with_router)
            hit = [origin in (None, other) for other in part.origins]
            at = part.chosen[torch.tensor(hit, dtype=torch.bool)]
            mask = torch.zeros_like(policy).index_fill(0, at, float("nan") if due() else 0.0)
            return (policy + mask, reference, router) if what == "policy" else (policy, reference + mask, router)

        made._response_logps = logps  # type: ignore[method-assign]


def make_trainer(
    folder: Any,
    count: int,
    *,
    mixed: bool = False,
    uneven: bool = False,
    tied: bool = False,
    bits: int = 64,
    lora: bool = False,
    evaluate: int = 0,
    unfit: Sequence[int] = (),
    model_seed: int = 0,
    **settings: Any,
) -> MPOTrainer:
    """A trainer on ``count`` pairs; skewed ones are read in order, in short rows, by SGD with momentum."""
    if uneven:
        settings = {**SHUFFLED, "max_tokens_per_row": 160, "learning_rate": 1e-2, **settings}
    elif not mixed:
        settings = {**SEQUENTIAL, "max_length": 400, "max_tokens_per_row": 160, "learning_rate": 1e-2, **settings}
    if evaluate:
        settings["eval_dataset"] = skewed_pairs(evaluate + 5)[5:]
    if lora:
        settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    dtype = {64: torch.float64, 32: torch.float32}[bits]
    model = tiny_model(model_seed, size=replace(SIZE, tie_word_embeddings=tied), dtype=dtype)
    torch.manual_seed(3)  # the adapter's random half
    make = pairs if mixed else uneven_pairs if uneven else skewed_pairs
    made = [replace(pair, rejected=pair.chosen) if at in unfit else pair for at, pair in enumerate(make(count))]
    return trainer(folder, made, model=model, **settings)


def family_trainer(folder: Any, name: str, **settings: Any) -> MPOTrainer:
    """A trainer of a family of the zoo on eight pairs in order, of which every third and fourth have no image.

    In float64, but for mixtures of experts, whose grouped products know no float64.
    """
    from tests.zoo import FAMILIES

    family = FAMILIES[name]
    images = [min(family.images, (1, 2, 0, 0)[i % 4]) for i in range(8)]
    made = family.model(0)
    if not hasattr(made.config.get_text_config(), "num_experts_per_tok"):
        made = made.double()
    settings = {"max_tokens_per_row": None, "learning_rate": 1e-2, **SEQUENTIAL, **settings}
    return MPOTrainer(
        model=made,
        args=config(folder, **settings),
        train_dataset=[random_pair(i, images=count) for i, count in enumerate(images)],
        processing_class=family.processor(),
    )
