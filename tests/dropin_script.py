"""The same training script with TRL or with vlmpo: ``dropin_script.py trl|vlmpo FOLDER``.

The two differ in what is imported and in how the objective is named; everything else is shared. FOLDER holds a model
(``model``) and a data set in TRL's format (``data``); the losses go into ``FOLDER/<which>.json``.
"""

from __future__ import annotations

import json
import sys

import datasets

import tests.conftest  # noqa: F401  torchvision and threads, before anything else

which, folder = sys.argv[1:]
if which == "trl":
    from trl import DPOConfig as Config
    from trl import DPOTrainer as Trainer

    objective = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    objective |= {"max_length": None, "bf16": False, "gradient_checkpointing": False}
else:
    from vlmpo import MPOConfig as Config
    from vlmpo import MPOTrainer as Trainer

    # MPO is the default. TRL has no reward shift, and one NLL mean over all tokens of a micro-batch.
    objective = {"reward_shift": "none", "nll_reduction": "token"}

from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

data = datasets.load_from_disk(f"{folder}/data")
args = Config(
    output_dir=f"{folder}/{which}",
    beta=0.2,
    learning_rate=1e-2,
    optim="sgd",
    lr_scheduler_type="constant",
    per_device_train_batch_size=1,
    num_train_epochs=1,
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    max_grad_norm=0.0,
    seed=7,
    **objective,
)
trainer = Trainer(
    model=AutoModelForImageTextToText.from_pretrained(f"{folder}/model", dtype="float32"),
    args=args,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=AutoProcessor.from_pretrained(f"{folder}/model"),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", lora_dropout=0.0),
)
trainer.train()
evaluation = trainer.evaluate()
trainer.save_model(f"{folder}/{which}/final")
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
accuracy = evaluation["eval_rewards/accuracies"]
with open(f"{folder}/{which}.json", "w") as out:
    json.dump({"losses": losses, "eval_loss": evaluation["eval_loss"], "eval_accuracy": accuracy}, out)
