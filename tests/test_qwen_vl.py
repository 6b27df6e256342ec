"""A family off the list, with its real processor: what the fallback reads is what the model reads by itself.

Qwen2.5-VL counts positions in three dimensions, by token types its processor gives. Without them it counts in one, and
says nothing of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import CORPUS, noise_image
from tests.training import config, logged
from vlmpo import Message, MPOTrainer, PreferencePair
from vlmpo.build.engines import GenerationRequest, LocalEngine, Sampling
from vlmpo.data.encode import PairEncoder
from vlmpo.demo.tiny import train_tokenizer
from vlmpo.train.batching import lay_out
from vlmpo.tree.families import support_for
from vlmpo.tree.logprobs import install

SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% for i in m['content'] %}{% if i['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ i['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPT = (Message("user", "<image>\nwhat colour is it?"),)
PAIR = PreferencePair(PROMPT, (noise_image(112, 168, 1),), "the answer is 3", "there are two red circles")


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = train_tokenizer(CORPUS, 384)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    image_processor = Qwen2VLImageProcessor(patch_size=14, min_pixels=56 * 56, max_pixels=4 * 56 * 56)
    return Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def qwen(processor: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    image, video, start, end = processor.tokenizer.convert_tokens_to_ids(SPECIAL)
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": processor.tokenizer.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [0],
    }
    tokens = {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    torch.manual_seed(0)
    configuration = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return Qwen2_5_VLForConditionalGeneration(configuration).eval()


def test_separate_rows_read_what_the_processor_says(processor: Any) -> None:
    plain, ours = qwen(processor), qwen(processor)
    assert not support_for(ours.config).shared
    install(ours, shared=False)
    encoded = PairEncoder(processor).encode(PAIR)
    with torch.no_grad():
        got = ours(branch_rows=lay_out([encoded], shared=False).rows)
        blind = ours(branch_rows=lay_out([replace(encoded, token_types={})], shared=False).rows)
        parts = []
        for branch in (encoded.chosen_ids, encoded.rejected_ids):
            ids = torch.cat([encoded.trunk_ids, branch])[None]
            types = (ids == plain.config.image_token_id).long()
            logps = plain(input_ids=ids, mm_token_type_ids=types, **encoded.vision).logits[0].log_softmax(-1)
            at = encoded.trunk_ids.numel() - 1
            parts.append(logps[at:-1].gather(1, branch[:, None]).squeeze(1))
    torch.testing.assert_close(got, torch.cat(parts), atol=1e-5, rtol=0)
    assert (blind - got).abs().max() > 0.1  # negative control: one-dimensional positions are another model


def test_training_starts_at_zero_rewards(processor: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = [PAIR, replace(PAIR, chosen="blue", origin="memory:1")]
    run = MPOTrainer(model=qwen(processor), args=config(tmp_path), train_dataset=data, processing_class=processor)
    run.train()
    assert "NOT sharing the prompt" in capsys.readouterr().err
    (line,) = logged(tmp_path)
    assert line["rewards/chosen"] == 0.0
    assert line["loss"] == pytest.approx(0.8317766 + line["loss/nll"], rel=1e-6)


def test_greedy_answers_are_those_of_plain_generate(processor: Any) -> None:
    model = qwen(processor)
    engine = LocalEngine(model, processor, Sampling(temperature=0.0, max_new_tokens=6))
    ((answer,),) = engine.generate([GenerationRequest(PROMPT, PAIR.images, n=1, seed=0)])
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[list(PAIR.images)], return_tensors="pt")
    media = sorted(PairEncoder(processor).media_ids)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=media)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.text == expected
