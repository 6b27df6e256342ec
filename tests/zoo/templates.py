"""Chat templates of the kinds there are, and one tokenizer with the special tokens of all of them and of answers."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from tests.tiny_models import CORPUS, SIZE
from vlmpo.testing.tiny import build_processor, train_tokenizer

# Special tokens that answers hold: of thoughts, tools and grounding (InternVL, Qwen-VL, Molmo and others).
ANSWER_TOKENS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<|box_start|>",
    "<|box_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<point>",
    "</point>",
]
TURN_TOKENS = [
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
PLAIN_TURN_TOKENS = ["<|User|>", "<|Assistant|>"]  # added, but not special: as DeepSeek's

ITEMS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
GENERATION = "{% if add_generation_prompt %}@{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + ITEMS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + GENERATION.replace("@", "<|im_start|>assistant\n")
)
TEXT = "{% set text = m['content'] | map(attribute='text') | select('string') | join('') %}"
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{{ 'On 26 Jul 2024. ' if loop.first }}"
    + ITEMS.replace("c['text'] }}", "c['text'] | trim }}")
    + "<|eot_id|>{% endfor %}"
    + GENERATION.replace("@", "<|start_header_id|>assistant<|end_header_id|>\n\n")
)
# Writes the system's text into the first user's turn and trims.
GEMMA = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'][0]['text'] + '\n\n' }}"
    "{% endif %}"
    + ITEMS.replace("c['text'] }}", "c['text'] | trim }}")
    + "<end_of_turn>\n{% endif %}{% endfor %}"
    + GENERATION.replace("@", "<start_of_turn>model\n")
)
# Writes the system's text into the last user's turn; its marks of turns are plain text.
MISTRAL = (
    "<s>{% set system = messages[0]['content'][0]['text'] if messages[0]['role'] == 'system' else none %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and system %}{{ system + '\n\n' }}"
    "{% endif %}" + ITEMS + " [/INST]{% elif m['role'] == 'assistant' %} " + ITEMS + "</s>{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}" + ITEMS + " {% else %}{{ m['role'].upper() + ': ' }}"
    + ITEMS + "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endif %}{% endfor %}"
    + GENERATION.replace("@", "ASSISTANT:")
)  # fmt: skip
ALPACA = (
    "Below is an instruction.\n\n{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:\n" + ITEMS
    + "</s>\n{% else %}### Instruction:\n" + ITEMS + "\n\n{% endif %}{% endfor %}"
    + GENERATION.replace("@", "### Response:\n")
)  # fmt: skip
LAST_TURN = CHATML.replace(
    "in messages %}", "in (messages[-2:] if messages[-1]['role'] == 'assistant' else messages[-1:]) %}"
)
_FIRST = (
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% endfor %}"
    "{{ m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | first }}"
)
FIRST_TEXT = CHATML.replace(ITEMS, _FIRST)
NO_SYSTEM = CHATML.replace("in messages %}", "in messages if m['role'] != 'system' %}")
NO_HISTORY = CHATML.replace("in messages %}", "in messages if m['role'] != 'assistant' or m == messages[-1] %}")
# Of an answer it keeps what follows the thought, as Qwen3's and DeepSeek's do with earlier turns.
_ANSWER = (
    "{% if m['role'] == 'assistant' %}"
    "{{ (m['content'] | map(attribute='text') | join('')).split('</think>')[-1] }}{% else %}"
)
STRIPS_THOUGHTS = CHATML.replace(ITEMS, _ANSWER + ITEMS + "{% endif %}")
OPENS_THOUGHT = STRIPS_THOUGHTS.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
R1 = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}<|Assistant|>" + _ANSWER + "{% endif %}</s>"
    "{% else %}{{ '<|User|>' if m['role'] == 'user' }}" + ITEMS + "{% endif %}{% endfor %}"
    + GENERATION.replace("@", "<|Assistant|><think>\n")
)  # fmt: skip
IMAGES_FIRST = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}<IMG_CONTEXT>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    + GENERATION.replace("@", "<|im_start|>assistant\n")
)


@dataclass(frozen=True)
class Style:
    """A chat template with the tokens it needs: ``end`` ends a turn, ``opening`` asks for an answer."""

    template: str
    opening: str
    end: str = "<|im_end|>"
    bos: str | None = None


_CHATML_OPENING = "<|im_start|>assistant\n"
STYLES = {
    "chatml": Style(CHATML, _CHATML_OPENING),
    "llama3": Style(LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "<|begin_of_text|>"),
    "gemma": Style(GEMMA, "<start_of_turn>model\n", "<end_of_turn>", "<s>"),
    "mistral": Style(MISTRAL, " [/INST]", "</s>", "<s>"),
    "vicuna": Style(VICUNA, "ASSISTANT:", "</s>"),
    "alpaca": Style(ALPACA, "### Response:\n", "</s>"),
    "images first": Style(IMAGES_FIRST, _CHATML_OPENING),
    "last turn": Style(LAST_TURN, _CHATML_OPENING),
    "first text": Style(FIRST_TEXT, _CHATML_OPENING),
    "no system": Style(NO_SYSTEM, _CHATML_OPENING),
    "no history": Style(NO_HISTORY, _CHATML_OPENING),
    "strips thoughts": Style(STRIPS_THOUGHTS, _CHATML_OPENING),
    "opens a thought": Style(OPENS_THOUGHT, _CHATML_OPENING + "<think>\n"),
    "r1": Style(R1, "<|Assistant|><think>\n", "</s>", "<s>"),
}
OPENING = ["opens a thought", "r1"]  # those whose generation prompt opens a thought


@functools.cache
def _tokens() -> Any:
    built = train_tokenizer(CORPUS, vocab_size=384)
    built.add_special_tokens({"additional_special_tokens": [*TURN_TOKENS, *ANSWER_TOKENS]})
    built.add_tokens([AddedToken(token, special=False, normalized=False) for token in [*PLAIN_TURN_TOKENS, "\n\n"]])
    return built


@functools.cache
def processor(style: str) -> Any:
    """The tiny InternVL processor under the template of ``style``. Cached: nobody may change it."""
    tokens = copy.deepcopy(_tokens())
    tokens.bos_token, tokens.eos_token = STYLES[style].bos, STYLES[style].end
    built = build_processor(tokens, SIZE)
    built.chat_template = STYLES[style].template
    return built
