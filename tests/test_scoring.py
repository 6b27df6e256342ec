"""vlmpo.response_logps: the numbers of plain forwards, in order, and a model that is left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_models import model as tiny_model
from tests.tiny_models import noise_image, pairs_like_trl, processor, random_pair
from tests.training import pairs, trainer
from tests.zoo import FAMILIES
from vlmpo import PreferencePair, response_logps, scoring
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.errors import DataError, RecordError


def by_plain_forwards(model: Any, processor: Any, data: list[PreferencePair]) -> list[tuple[float, float]]:
    """One forward a response, through the model's own attention, head and logits."""
    encoder, scores = PairEncoder(processor), []
    for pair in data:
        encoded = encoder.encode(pair)
        sums = []
        for response in (encoded.chosen_ids, encoded.rejected_ids):
            ids = torch.cat([encoded.prompt_ids, response])[None]
            types = {k: torch.cat([v, torch.zeros_like(response)])[None] for k, v in encoded.token_types.items()}
            with torch.no_grad():
                logps = model(input_ids=ids, **types, **encoded.vision).logits[0].log_softmax(-1)
            first = encoded.prompt_ids.numel() - 1
            sums.append(float(logps[first:-1].gather(1, response[:, None]).sum()))
        scores.append((sums[0], sums[1]))
    return scores


def assert_equal(got: list[tuple[float, float]], expected: list[tuple[float, float]], atol: float = 1e-9) -> None:
    torch.testing.assert_close(torch.tensor(got).double(), torch.tensor(expected).double(), atol=atol, rtol=0)


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "patched": ["forward" in vars(module) or "_vlmpo" in vars(module) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "weights": list(model.state_dict()),
        "attention": model.config.get_text_config()._attn_implementation,
        "flags": [parameter.requires_grad for parameter in model.parameters()],
    }


@pytest.mark.parametrize("bound", [1, 1536])
def test_the_numbers_of_plain_forwards_in_order(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs with one image, two and none, in one row together or each alone."""
    monkeypatch.setattr(scoring, "row_tokens", lambda device: bound)
    data = pairs(5)
    got = response_logps(tiny_model(dtype=torch.float64), processor(), data)
    expected = by_plain_forwards(tiny_model(dtype=torch.float64), processor(), data)
    assert len({score for scores in expected for score in scores}) == 10
    assert_equal(got, expected)


@pytest.mark.parametrize("name", ["llama-text", "gemma2-text", "qwen2.5-vl"])
def test_other_families(name: str) -> None:
    """A tokenizer in the processor's place, rows that share nothing, positions of three dimensions."""
    family = FAMILIES[name]
    data = [random_pair(seed, images=min(family.images, seed)) for seed in range(3)]
    got = response_logps(family.model(0).double(), family.processor(), data)
    assert_equal(got, by_plain_forwards(family.model(0).double(), family.processor(), data))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    model.model.vision_tower.eval()
    before = state_of(model)
    first = response_logps(model, processor(), pairs(2))
    assert state_of(model) == before
    assert response_logps(model, processor(), pairs(2)) == first
    broken = [*pairs(1), replace(random_pair(1), rejected=None)]
    with pytest.raises(RecordError):
        response_logps(model, processor(), broken)
    assert state_of(model) == before


def test_a_model_of_a_trainer_stays_set_up(tmp_path: Path) -> None:
    data = pairs(4)
    run = trainer(tmp_path, data, dtype=torch.float64)
    before = state_of(run.model)
    expected = by_plain_forwards(tiny_model(dtype=torch.float64), processor(), data)
    assert_equal(response_logps(run.model, processor(), data), expected)
    assert state_of(run.model) == before
    separate = trainer(tmp_path, data, dtype=torch.float64, attention="separate")
    assert_equal(response_logps(separate.model, processor(), data), expected)
    assert not separate.model._vlmpo.shared


def test_an_adapter_takes_part() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(dtype=torch.float64), config).double().eval()
    data = pairs(3)
    expected = by_plain_forwards(model, processor(), data)
    got = response_logps(model, processor(), data)
    assert_equal(got, expected)
    with model.disable_adapter():
        assert abs(got[0][0] - response_logps(model, processor(), data)[0][0]) > 1e-3


def test_records_of_a_known_format() -> None:
    images = [noise_image(60, 60, 1), noise_image(70, 60, 2)]
    data = pairs_like_trl(images, [("two", "three red"), ("one", "the blue row")])
    got = response_logps(tiny_model(), processor(), data)
    assert len(got) == 2
    assert all(score < 0 for scores in got for score in scores)
    assert response_logps(tiny_model(), processor(), []) == []


def test_a_pair_without_a_rejected_response_is_named() -> None:
    model, data = tiny_model(), [random_pair(0), replace(random_pair(1), rejected=None)]
    with pytest.raises(RecordError, match="memory:1: `rejected` is empty"):
        response_logps(model, processor(), data)
    with pytest.raises(RecordError, match=r"pairs\[1\]: `rejected` is empty"):
        response_logps(model, processor(), [data[0], replace(data[1], origin="")])
    with pytest.raises(DataError, match="pairs: generator has no length"):
        response_logps(model, processor(), (pair for pair in data))
