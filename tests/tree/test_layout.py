"""Where every token of a row stands, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmpo.tree.forward import sum_by_response
from vlmpo.tree.layout import PromptTree, TreeSpan, build_row
from vlmpo.tree.packing import pack


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_two_trees_by_hand() -> None:
    first = PromptTree(ids(10, 11, 12), (ids(20, 21), ids(30)), {"pixel_values": torch.ones(2, 3)})
    second = PromptTree(ids(40), (ids(50, 51, 52),))
    third = PromptTree(ids(60, 61), (ids(0), ids(0)), {"pixel_values": torch.zeros(1, 3)})
    row = build_row([first, second, third])
    assert row.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 40, 50, 51, 52, 60, 61, 0, 0]]
    # both responses of the first tree start at position 3, after its three prompt tokens
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 0, 1, 2, 2]]
    assert row.layout.spans == (TreeSpan(0, 3, (2, 1)), TreeSpan(6, 1, (3,)), TreeSpan(10, 2, (1, 1)))
    assert row.layout.num_tokens == 14
    # the prompt's last token (row position 2) predicts the first token of BOTH responses
    assert row.logit_positions.tolist() == [2, 3, 2, 6, 7, 8, 11, 11]
    assert row.targets.tolist() == [20, 21, 30, 50, 51, 52, 0, 0]
    assert row.response_index.tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert row.num_responses == 5
    assert row.vision["pixel_values"].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_token_types_are_those_of_the_trunks() -> None:
    """The processor speaks of the prompt only: responses are text, 0, and so is a prompt it says nothing of."""
    image = PromptTree(ids(10, 11, 12), (ids(20, 21), ids(30)), token_types={"mm_token_type_ids": ids(0, 1, 1)})
    text = PromptTree(ids(40, 41), (ids(50),))
    row = build_row([image, text])
    assert row.token_types["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert build_row([text]).token_types == {}
    assert [p.token_types for p in image.separate()] == [image.token_types] * 2


def test_mask_is_aligned_to_the_lower_right() -> None:
    row = build_row([PromptTree(ids(1, 2), (ids(3), ids(4, 5)))])
    mask = row.layout.response_mask(2, 4, None, torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert row.layout.response_mask(2, 4, None, torch.device("cpu")) is mask


def test_sums_run_through_rows() -> None:
    rows = [
        build_row([PromptTree(ids(1), (ids(2, 3), ids(4)))]),
        build_row([PromptTree(ids(1), (ids(2, 3, 4),))]),
    ]
    sums = sum_by_response(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), rows)
    assert sums.tolist() == [3.0, 4.0, 56.0]
    assert sum_by_response(torch.zeros(0), []).shape == (0,)


def tree(tokens: int) -> PromptTree:
    return PromptTree(torch.zeros(tokens - 1, dtype=torch.long), (ids(1),))


def test_packing_by_hand() -> None:
    trees = [tree(n) for n in (4, 6, 3, 20, 2)]
    # 20 is too long for any row and stands alone; 15 tokens need two rows of 10, and 6 + 2 and 4 + 3 are most even
    assert pack(trees, 10) == [[3], [1, 4], [0, 2]]
    assert pack(trees, None) == [[0, 1, 2, 3, 4]]
    assert pack(trees, 1) == [[3], [1], [0], [2], [4]]
    assert pack([], 10) == []
    assert pack([], None) == []
    # filled one after the other these were three rows: 6, 6 + 4, 4
    assert pack([tree(n) for n in (6, 6, 4, 4)], 10) == [[0, 2], [1, 3]]
    # the longest first would put 9 with 5 and need three; in the order given two rows are full
    assert pack([tree(n) for n in (9, 3, 3, 5, 5, 5)], 15) == [[0, 1, 2], [3, 4, 5]]


def in_order(sizes: list[int], max_tokens: int) -> int:
    """Rows where each is closed as soon as a tree does not fit."""
    rows, room = 0, 0
    for size in sizes:
        if not rows or size > room:
            rows, room = rows + 1, max_tokens
        room -= size
    return rows


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(2, 40), max_size=14), st.integers(1, 60))
def test_packing_loses_nothing_and_never_needs_more_rows(sizes: list[int], max_tokens: int) -> None:
    trees = [tree(size) for size in sizes]
    rows = pack(trees, max_tokens)
    tokens = [sum(sizes[index] for index in row) for row in rows]
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(total <= max_tokens or len(row) == 1 for row, total in zip(rows, tokens, strict=True))
    assert all(row == sorted(row) for row in rows)
    assert tokens == sorted(tokens, reverse=True)
    assert len(rows) <= in_order(sizes, max_tokens)
    assert rows == pack(trees, max_tokens)
    if sizes and max(sizes) <= max_tokens and len(rows) > 1:  # no row could take in another whole
        assert tokens[-1] + tokens[-2] > max_tokens


def test_separate_gives_one_branch_a_tree() -> None:
    tree = PromptTree(ids(1, 2), (ids(3), ids(4, 5)), {"pixel_values": torch.ones(1, 3)})
    parts = tree.separate()
    assert [part.responses[0].tolist() for part in parts] == [[3], [4, 5]]
    assert all(part.vision is tree.vision for part in parts)
    assert tree.num_tokens == 5


@pytest.mark.parametrize(("prompt", "responses"), [((), ((1,),)), ((1,), ()), ((1,), ((),))])
def test_empty_parts_are_refused(prompt: tuple, responses: tuple) -> None:
    with pytest.raises(ValueError, match="needs"):
        PromptTree(torch.tensor(prompt, dtype=torch.long), tuple(torch.tensor(b, dtype=torch.long) for b in responses))
