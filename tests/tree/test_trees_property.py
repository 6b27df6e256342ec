"""Whatever the trees and however they are split into rows: the log-probs of one plain forward a response."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.tiny_models import image_tree, model, noise_image
from tests.tree.test_forward import separate_logps
from vlmpo.tree.forward import install, sum_by_response
from vlmpo.tree.layout import PromptTree, build_row

SHAPES = [(60, 60), (120, 56), (40, 90)]  # one tile; two beside each other and a thumbnail; two below each other


@functools.cache
def both() -> tuple[Any, Any]:
    """The same weights in float64, plain and set up for rows."""
    plain, ours = model(dtype=torch.float64), model(dtype=torch.float64)
    install(ours, shared=True)
    return plain, ours


@st.composite
def trees(draw: Any) -> PromptTree:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    seed = draw(st.integers(0, 10**6))
    shapes = draw(st.lists(st.sampled_from(SHAPES), max_size=3))
    images = [noise_image(width, height, seed + index) for index, (width, height) in enumerate(shapes)]
    return image_tree(images, lengths, seed, dtype=torch.float64)


@st.composite
def split_trees(draw: Any) -> list[list[PromptTree]]:
    """One to four trees in order, cut into rows at random places."""
    found = draw(st.lists(trees(), min_size=1, max_size=4))
    cuts = [0, *(at for at in range(1, len(found)) if draw(st.booleans())), len(found)]
    return [found[one:other] for one, other in itertools.pairwise(cuts)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(split_trees())
def test_any_trees_in_any_rows(groups: Sequence[list[PromptTree]]) -> None:
    plain, ours = both()
    flat = [tree for group in groups for tree in group]
    rows = [build_row(group) for group in groups]
    event(f"{len(rows)} rows of {len(flat)} trees")
    with torch.no_grad():
        got, expected = ours(packed_rows=rows), separate_logps(plain, flat)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    lengths = [response.numel() for tree in flat for response in tree.responses]
    sums = torch.stack([part.sum() for part in expected.split(lengths)])
    torch.testing.assert_close(sum_by_response(got, rows), sums, atol=1e-8, rtol=0)
