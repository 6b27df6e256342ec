"""Align a model with MPO from Python: python examples/train.py MODEL PAIRS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

from vlmpo import MPOConfig, MPOTrainer


def main(model: str, pairs_file: str, output: str) -> None:
    pairs = [json.loads(line) for line in Path(pairs_file).read_text(encoding="utf-8").splitlines()]
    for pair in pairs:
        pair["image"] = str(Path(pairs_file).parent / pair["image"])
    args = MPOConfig(output_dir=output, per_device_train_batch_size=4, learning_rate=1e-6, warmup_steps=0.03)
    trainer = MPOTrainer(model=model, args=args, train_dataset=pairs)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
