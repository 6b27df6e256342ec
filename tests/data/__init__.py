from __future__ import annotations

from vlmpo.data.dataset import PairDataset
from vlmpo.data.index.filter import screen


def drop_reasons(dataset: PairDataset) -> list[str]:
    """Return why each dropped pair of a data set was dropped, in order."""
    return [pair.reason for pair in screen(dataset).dropped]
