"""The Qwen-VL families count positions in three dimensions, by token types their processor gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny_models import noise_image
from tests.zoo import FAMILIES, encoded_pairs
from vlmpo import Message, PreferencePair
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.errors import ModelError
from vlmpo.generate.base import GenerationRequest, Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.train.batching import lay_out
from vlmpo.tree.forward import install
from vlmpo.tree.layout import PromptTree, build_row
from vlmpo.tree.positions import positions_of

PROMPT = (Message("user", "<image>\nwhat colour is it?"),)
PAIR = PreferencePair(PROMPT, (noise_image(112, 168, 1),), "the answer is 3", "there are two red circles")
every_qwen = pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])


@every_qwen
def test_positions_by_hand(name: str) -> None:
    """An image of 2 x 3 merged patches between two words, a text-only tree, and an image of 1 x 2 at the front."""
    first = PromptTree(
        prompt_ids=torch.tensor([5, *[9] * 6, 5]),
        responses=(torch.tensor([1, 2]), torch.tensor([3, 4, 5])),
        vision={"image_grid_thw": torch.tensor([[1, 4, 6]])},  # patches; 2 x 2 of them make a token
        token_types={"mm_token_type_ids": torch.tensor([0, *[1] * 6, 0])},
    )
    second = PromptTree(torch.tensor([5, 6]), (torch.tensor([7]), torch.tensor([8, 9])))
    third = PromptTree(
        prompt_ids=torch.tensor([9, 9]),
        responses=(torch.tensor([1]), torch.tensor([2, 3])),
        vision={"image_grid_thw": torch.tensor([[1, 2, 4]])},
        token_types={"mm_token_type_ids": torch.tensor([1, 1])},
    )
    positions = positions_of(FAMILIES[name].model(0), build_row([first, second, third]))
    assert positions.shape == (3, 1, 13 + 5 + 5)
    # The image starts at 1 and takes as many positions as its longer side, 3: the next word stands at 4.
    after = [4, 5, 6, 5, 6, 7]  # the word, the first response, and the second, which restarts where the first did
    time = [0, 1, 1, 1, 1, 1, 1, *after]
    height = [0, 1, 1, 1, 2, 2, 2, *after]
    width = [0, 1, 2, 3, 1, 2, 3, *after]
    text = [0, 1, 2, 2, 3]
    assert positions[0, 0].tolist() == time + text + [0, 0, 2, 2, 3]
    assert positions[1, 0].tolist() == height + text + [0, 0, 2, 2, 3]
    assert positions[2, 0].tolist() == width + text + [0, 1, 2, 2, 3]


@every_qwen
@pytest.mark.parametrize("shared", [True, False])
def test_images_without_token_types_are_refused(name: str, shared: bool) -> None:
    """Qwen2.5-VL itself would read them in one dimension."""
    model = FAMILIES[name].model(0)
    install(model, shared)
    pair = replace(encoded_pairs(name)["one image"], token_types={})
    with pytest.raises(ModelError, match="needs mm_token_type_ids"):
        model(packed_rows=lay_out([pair], shared).rows)
    text = replace(encoded_pairs(name)["text only"], token_types={})
    assert model(packed_rows=lay_out([text], shared).rows).isfinite().all()


def test_greedy_answers_are_those_of_plain_generate() -> None:
    processor, model = FAMILIES["qwen2.5-vl"].processor(), FAMILIES["qwen2.5-vl"].model(0)
    engine = LocalEngine(model, processor, Sampling(temperature=0.0, max_new_tokens=6))
    ((answer,),) = engine.generate([GenerationRequest(PROMPT, PAIR.images, n=1, seed=0)])
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[list(PAIR.images)], return_tensors="pt")
    media = sorted(PairEncoder(processor).media_ids)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=media)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.text == expected
