"""Writes docs/families.md from the families the tests build: ``python -m tests.families_table``."""

from __future__ import annotations

from tests.paths import REPO
from tests.zoo import FAMILIES, Family
from vlmpo.data.encode.processors import tile_kind
from vlmpo.models.families import support_for

FILE = REPO / "docs" / "families.md"

HEAD = """# Model families

<!-- Written by `python -m tests.families_table`; a test compares it with the code. -->

A prompt is read once for all its responses ("shared") if that is exact, and otherwise once for each response
("separate"). The run and `vlmpo inspect` print which. Either way the numbers are the model's own: at the start of a run
one pair of the data is read both ways and by the model's own forward. If shared and separate rows differ by more than
rounding, the run falls back to separate rows and prints one line; if separate rows differ from the model's own logits,
it stops. A family that is not in the table is read in separate rows, under the same check.

Each line is tested as follows, with a tiny model of its own class and its real processor, on the CPU in float32
(`tests/tree/test_families.py`, `tests/data/encode/test_encode_families.py`, `tests/tree/test_vision.py`,
`tests/generate/test_generate_families.py`):

- token ids, vision tensors and token types are those of its processor; counts of tiles and image tokens by hand;
- log-probabilities of every response within 1e-5 of a plain forward, gradients within 1e-5 relative, for prompts with
  each number of images in the table, several such prompts in one row;
- three optimizer steps start at rewards of exactly 0, and shared rows end at the same weights as separate rows;
- saved and reloaded through transformers' own classes, it gives the same log-probabilities and answers; greedy answers
  in this process are those of `generate`.

"""

FOOT = """
`data.max_tiles`: *tiles* if images are cut into them; *pixels* if an image is read whole at its own shape and a tile
means 448 x 448 of them; *none* if the family's processor leaves no choice, which the run prints. Each image takes at
most its share, `max(1, max_tiles // images)`. By default it is what the processor allows ONE image (for *pixels* 12 at
most, which the run prints), so that a prompt of one image has exactly the processor's own tensors
(`tests/data/encode/test_tiles.py`). A data set's own number rules in its place, above it too; if both the recipe and
the data set give one, the lower rules. Images that are split or read whole are never enlarged by a number. The
processor saved with the model takes the recipe's number, never a data set's; one that splits by the longer edge takes
the longest at which a square image keeps within it.

Images and text may be interleaved if the model's chat template accepts it; a record that the template refuses is
counted as `template_refused`. Some templates (LLaVA-1.5, LLaVA-OneVision) write a message's images before its text,
which the run prints too. A text-only model counts pairs with images as `images_unsupported`.

Not covered by these tests: published weights and GPUs. Checkpoints whose code does not ship with transformers are
refused.
"""

_TILES = {"grid": "tiles", "split": "tiles", "pixels": "pixels", None: "none"}


def text() -> str:
    """The whole file."""
    head = ["family", "model class", "text tower", "prompt", "images tested", "`max_tiles`", "remarks"]
    rows = [head, ["---"] * len(head), *(_row(family) for family in FAMILIES.values())]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows) + FOOT


def _row(family: Family) -> list[str]:
    model = family.model(0)
    support = support_for(model.config)
    tower = model.config.get_text_config().model_type
    return [
        family.name,
        f"`{type(model).__name__}`",
        f"`{tower}`",
        "shared" if support.shared else "separate",
        ", ".join(str(count) for count in range(family.images + 1)),
        _TILES[tile_kind(family.processor())] if family.images else "",
        family.note if support.shared else f"{family.note} (the run prints: {support.reason})",
    ]


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")
