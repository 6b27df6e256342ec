"""Valid input of every reader, small; what is broken is made of it."""

from __future__ import annotations

from typing import Any

IMAGE = "a.png"

_TURNS = [{"role": "user", "content": "what is it?"}]
_ANSWER = [{"role": "assistant", "content": "red"}]
_OTHER = [{"role": "assistant", "content": "blue"}]
_ITEMS = [{"type": "image"}, {"type": "text", "text": "what is it?"}]

# Records by the name of their format.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "mmpr": [
        {"image": IMAGE, "question": "<image>\nwhat is it?", "chosen": "red", "rejected": "blue"},
        {"image": [IMAGE, IMAGE], "question": "<image> or <image>?", "chosen": "one", "rejected": "two", "id": 7},
        {"question": "how many?", "chosen": "3", "rejected": "4", "system": "be brief", "meta": {"score": [1, 2.5]}},
        {"video": "v.mp4", "question": "<video>\nwhat moves?", "chosen": "a ball", "rejected": "a cat"},
    ],
    "rlaif_v": [{"image": {"bytes": None, "path": IMAGE}, "question": "what?", "chosen": "red", "rejected": "blue"}],
    "rlhf_v": [
        {"image": IMAGE, "text": '{"question": "what?", "chosen": "red", "rejected": "blue"}', "image_size": "[8, 8]"},
        {"image": IMAGE, "text": {"question": "what?", "chosen": "red", "rejected": "blue"}},
    ],
    "trl": [
        {"prompt": _TURNS, "chosen": _ANSWER, "rejected": _OTHER, "images": [IMAGE]},
        {"prompt": [{"role": "user", "content": _ITEMS}], "chosen": "red", "rejected": "blue", "images": [IMAGE]},
        {"prompt": "how many?", "completion": "3", "rejected": "4"},
    ],
    "trl_implicit": [
        {"chosen": [*_TURNS, *_ANSWER], "rejected": [*_TURNS, *_OTHER], "images": [IMAGE]},
        {"chosen": "say a colour: red", "rejected": "say a colour: blue"},
    ],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "<image>what?"}],
            "chosen": {"from": "gpt", "value": "red"},
            "rejected": {"from": "gpt", "value": "blue"},
            "images": [IMAGE],
        }
    ],
    "alpaca": [
        {
            "instruction": "add",
            "input": "1 and 2",
            "chosen": "3",
            "rejected": "4",
            "history": [["add 1 and 1", "2"]],
            "system": "be brief",
            "images": [IMAGE],
        }
    ],
    "swift": [
        {"messages": [*_TURNS, *_ANSWER], "rejected_response": "blue", "images": [IMAGE]},
        {"messages": [*_TURNS, *_ANSWER], "rejected_messages": [*_TURNS, *_OTHER], "images": [{"path": IMAGE}]},
    ],
}

RECORDS["questions"] = [{"image": IMAGE, "question": "what is it?", "answer": "red", "choices": ["red", "blue"]}]

QUESTIONS: list[dict[str, Any]] = [
    {"id": "q1", "image": IMAGE, "question": "what colour?", "answer": "red", "verifier": "vqa", "split": "train"},
    {"id": 2, "image": [IMAGE, IMAGE], "question": "<image> or <image>?", "answer": 3, "split": "test"},
    {"question": "how many?", "answer": "2.50"},
]

RESPONSES: list[dict[str, Any]] = [
    {
        "question_id": f"q{number}",
        "sample_index": number,
        "text": "It is red.\nFinal answer: red",
        "finish_reason": "stop",
        "model": "some/model",
        "settings": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64, "seed": 0, "prompt": "cot"},
    }
    for number in range(3)
]

META: dict[str, Any] = {
    "drawn": {
        "root": ".",
        "annotation": "pairs.jsonl",
        "data_augment": False,
        "max_dynamic_patch": 6,
        "repeat_time": 1,
        "length": 2,
    },
    "again": {"annotation": "pairs.jsonl", "repeat_time": 0.5},
}

SOURCE: dict[str, Any] = {
    "path": "pairs.jsonl",
    "image_root": ".",
    "name": "drawn",
    "format": "auto",
    "split": None,
    "subset": None,
}

RECIPE = """\
model:
  path: some/model
  freeze: [vision_tower]
  lora: {r: 8, target_modules: all-linear}
data:
  train:
    - {path: pairs.jsonl, repeat: 2, name: drawn}
    - more.jsonl
  max_tiles: 6
loss:
  beta: 0.1
  weights: {sigmoid: 0.8, bco_pair: 0.2, nll: 1.0}
build:
  questions: questions.jsonl
  temperature: 0.7
training:
  learning_rate: 1e-6
  save_strategy: no
"""

OVERRIDES = (
    *("loss.beta=0.2", "loss.weights.nll=0.5", "training.learning_rate=1e-5", "data.train=[a.jsonl, b.jsonl]"),
    *("model.lora={r: 4}", "build.prompt='Q: {question}'", "training.output_dir=runs/a", "reference.kind=cache"),
    *("data.train.0.repeat=2", "model.path=other/model", "evaluate.questions=q.jsonl", "model.freeze=[]"),
)

# Response, truth, verifier.
ANSWERS = (
    ("It is red.\nFinal answer: red", "red", "auto"),
    ("The answer is (b).", "b", "option"),
    ("So we get \\boxed{\\frac{3}{4}}", "3/4", "math"),
    ("**Answer:** $x^2 + 2x + 1$", "(x+1)^2", "math"),
    ("Final answer: 1,250.5 km", "1250.5", "number"),
    ("about 45%, that is nine twentieths", "45%", "auto"),
    ("The sign says STOP", "stop", "anls"),
    ("Answer: B) a cat; C) a dog", "b, c", "option"),
    ("\\boxed{\\sqrt{2} + \\pi}", "\\sqrt{2}+\\pi", "math"),
    ("No, there are not three.", "no", "vqa"),
    ("Final answer: [1, 2, 3]", "\\{1,2,3\\}", "math"),
    ("It is exactly that", "that", "exact"),
)

STATE: dict[str, Any] = {
    "reward_shift": {"mode": "previous", "sum": 1.3679390251636505, "count": 12},
    "reference_hash": "ab" * 16,
    "accounts": {"used": {"drawn": 6}, "dropped": {"drawn": {"bad_json": 1}}, "examples": {"bad_json": ["a:1: x"]}},
    "learning_rates": {"vision": 5e-4},
}
