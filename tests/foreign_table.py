"""Writes docs/other_tools.md from the table of other tools' keys: ``python -m tests.foreign_table``."""

from __future__ import annotations

from tests.paths import REPO
from vlmpo.foreign_table import ROWS, Row

FILE = REPO / "docs" / "other_tools.md"

HEAD = """# Keys of other tools

<!-- Written by `python -m tests.foreign_table`; a test compares it with the code. -->

Settings of TRL, LLaMA-Factory, ms-swift, NeMo-RL, InternVL's scripts and transformers 4 that are found in a recipe, in
an override, as an option of the command line, or as a keyword of `MPOConfig`, are answered with what to write here;
nothing is converted silently. A whole configuration of such a tool may be given to `vlmpo train`: one message has all
answers. Fields of `transformers.TrainingArguments` and the recipe's own keys are answered by the section they stand in:

```text
$ vlmpo train recipe.yaml --learning_rate 1e-6 --pref_beta 0.1
error: --learning_rate 1e-6: write training.learning_rate=1e-6
--pref_beta 0.1: an option of LLaMA-Factory; write loss.beta=0.1
```

Those of the objective are read together: `loss_type: [sigmoid, bco_pair, sft]` with `loss_weights: [0.8, 0.2, 1.0]` is
`loss.weights: {sigmoid: 0.8, bco_pair: 0.2, nll: 1.0}`, and so is `pref_loss: sigmoid` with `pref_ftx` and
`pref_bco_weight`. A script for TRL's `DPOTrainer`: [coming from TRL](from_trl.md).

| theirs | of | here | remark |
|---|---|---|---|
"""


def _line(row: Row) -> str:
    ours = f"`{row.ours}`" if row.ours else "-"
    return f"| `{row.key}` | {row.tools} | {ours} | {row.say} |"


def text() -> str:
    """The page."""
    return HEAD + "\n".join(_line(row) for row in sorted(ROWS, key=lambda row: row.key)) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
