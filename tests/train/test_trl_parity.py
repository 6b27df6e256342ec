"""Parity with TRL's DPOTrainer (1.16): an independent implementation of the same objective, delta left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import SIZE, noise_image, pairs_like_trl, tokenizer
from tests.tiny_models import model as tiny_model
from tests.training import Gradients, config, flat_weights, logged, relative
from vlmpo import Message, MPOTrainer, PreferencePair
from vlmpo.testing.tiny import CHAT_TEMPLATE, build_processor

trl = pytest.importorskip("trl", reason="TRL is a development dependency")

# TRL also scores what a template writes after the end-of-turn token. Here that newline opens the next turn instead,
# so that both score the same token ids.
TEMPLATE = CHAT_TEMPLATE
for written, instead in (
    ("{{ '<|im_end|>\n' }}", "{{ '<|im_end|>' }}"),
    ("{{ '<|im_start|>assistant\n' }}", "{{ '\n<|im_start|>assistant\n' }}"),
    ("{{ '<|im_start|>' + ", "{{ ('' if loop.first else '\n') + '<|im_start|>' + "),
):
    assert written in TEMPLATE
    TEMPLATE = TEMPLATE.replace(written, instead)
RESPONSES = [
    ("there are two red circles", "a blue square!"),
    ("the answer is 3!", "the answer is 7: look again at the first row"),
    ("green, not blue", "green"),
]


def template_processor():
    processor = build_processor(tokenizer(), SIZE)
    processor.chat_template = TEMPLATE
    return processor


@pytest.mark.slow
def test_three_steps_agree(tmp_path: Path) -> None:
    """One pair a micro-batch, three optimizer steps: loss and gradient to 1e-5 relative, float32."""
    images = [noise_image(60, 60, 0), noise_image(120, 56, 1), noise_image(40, 80, 2)]
    # Plain SGD: Adam would turn the rounding of gradients that are truly zero (vision k_proj.bias) into whole steps.
    settings = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "optim": "sgd"}
    settings |= {"learning_rate": 1e-2}

    ours_gradients, ours_model = Gradients(), tiny_model()
    ours = MPOTrainer(
        model=ours_model,
        args=config(tmp_path / "ours", reward_shift="none", **settings),
        train_dataset=[
            PreferencePair((Message("user", "<image>\nhow many?"),), (image,), chosen, rejected)
            for image, (chosen, rejected) in zip(images, RESPONSES, strict=True)
        ],
        processing_class=template_processor(),
        callbacks=[ours_gradients],
    )
    ours.train()

    theirs_gradients, theirs_model = Gradients(), tiny_model()
    theirs = trl.DPOTrainer(
        model=theirs_model,
        ref_model=tiny_model(),  # given: without one TRL reloads it from a path, and this model has none
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "theirs"),
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=7,
            **settings,
        ),
        train_dataset=pairs_like_trl(images, RESPONSES),
        processing_class=template_processor(),
        callbacks=[theirs_gradients],
    )
    theirs.train()

    assert len(ours_gradients.steps) == len(theirs_gradients.steps) == 3
    theirs_losses = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    for mine, other in zip(logged(tmp_path / "ours"), theirs_losses, strict=True):
        assert mine["loss"] == pytest.approx(other, rel=1e-5)
    for mine, other in zip(ours_gradients.steps, theirs_gradients.steps, strict=True):
        assert relative(mine, other) < 1e-5
    assert relative(flat_weights(ours_model), flat_weights(tiny_model())) > 1e-3  # they did move
