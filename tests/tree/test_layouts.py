"""Conversations of every shape: what is scored is the last assistant turn, nothing before it."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import model, noise_image, processor, tokenizer
from vlmpo import Message, PreferencePair
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.train.batching import lay_out
from vlmpo.tree.forward import install

A, B, C = (noise_image(60, 60, seed) for seed in range(3))
SYSTEM = Message("system", "Be brief.")
CONVERSATIONS = {
    "system prompt": ((SYSTEM, Message("user", "<image>\nhow many?")), (A,)),
    "several turns": (
        (
            Message("user", "<image>\nhow many?"),
            Message("assistant", "the answer is 3!"),
            Message("user", "what colour?"),
        ),
        (A,),
    ),
    "an image in a later turn": (
        (
            SYSTEM,
            Message("user", "is it red?"),
            Message("assistant", "the picture is missing"),
            Message("user", "here: <image> and <image>\nboth?"),
        ),
        (A, B),
    ),
    "images in between": ((Message("user", "first <image>then <image>\nand last <image>"),), (A, B, C)),
    "images in several turns": (
        (Message("user", "<image>\nred?"), Message("assistant", "not red"), Message("user", "<image>\nand this?")),
        (A, B),
    ),
    "text only": ((SYSTEM, Message("user", "one, two?"), Message("assistant", "three"), Message("user", "next?")), ()),
}


def as_chat(messages: tuple[Message, ...]) -> list[dict]:
    """The same conversation as items, written here by hand of a split at ``<image>`` (its newline goes with it)."""
    turns = []
    for message in messages:
        items: list[dict] = []
        for index, part in enumerate(message.text.split("<image>")):
            if index:
                items.append({"type": "image"})
                part = part.removeprefix("\n")
            if part:
                items.append({"type": "text", "text": part})
        turns.append({"role": message.role, "content": items})
    return turns


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_the_last_turn_alone_is_scored(name: str) -> None:
    """Prompt and responses against the processor's own reading of the conversation; log-probs and gradients too."""
    messages, images = CONVERSATIONS[name]
    responses = ("two red circles", "a blue square!")
    encoded = PairEncoder(processor()).encode(PreferencePair(messages, images, *responses))
    plain, ours = model(), model()
    install(ours, shared=True)
    part = lay_out([encoded])
    got = ours(packed_rows=part.rows)
    expected = []
    for text, response in zip(responses, (encoded.chosen_ids, encoded.rejected_ids), strict=True):
        chat = [
            *as_chat(messages),
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        rendered = processor().apply_chat_template(chat)
        whole = processor()(images=[list(images)] if images else None, text=[rendered], return_tensors="pt")
        ids = whole.input_ids[0]
        at = len(encoded.prompt_ids)
        assert ids[:at].tolist() == encoded.prompt_ids.tolist()
        assert ids[at : at + len(response)].tolist() == response.tolist()
        assert tokenizer().decode(ids[at + len(response) :]) == "\n"  # what the template writes after the turn
        vision = {"pixel_values": whole.pixel_values} if images else {}
        logps = plain(input_ids=ids[None], **vision).logits[0].log_softmax(-1)
        expected.append(logps[at - 1 : at - 1 + len(response)].gather(1, response[:, None]).squeeze(1))
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=0)
    got.sum().backward()
    torch.cat(expected).sum().backward()
    mine, theirs = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (ours, plain))
    assert (mine - theirs).norm() / theirs.norm() < 1e-5


def test_an_earlier_answer_is_not_scored() -> None:
    """Another earlier answer is another prompt: the scored tokens stay the same."""
    pairs = [
        PreferencePair((Message("user", "red?"), Message("assistant", said), Message("user", "sure?")), (), "two", "no")
        for said in ("yes", "not at all")
    ]
    first, second = (PairEncoder(processor()).encode(pair) for pair in pairs)
    assert first.prompt_ids.tolist() != second.prompt_ids.tolist()
    assert first.chosen_ids.tolist() == second.chosen_ids.tolist() == tokenizer()("two<|im_end|>").input_ids
