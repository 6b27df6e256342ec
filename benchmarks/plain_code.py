"""What both benchmarks compare vlmpo to: plain code, as in InternVL's trainer, a floor, and the inputs of TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlmpo import PreferencePair, mpo_loss
from vlmpo.data.encode.encoder import EncodedPair

# The MPO setting of TRL's DPOTrainer, which leaves the reward shift out.
TRL_OBJECTIVE: dict[str, Any] = {
    "max_length": None,
    "loss_type": ["sigmoid", "bco_pair", "sft"],
    "loss_weights": [0.8, 0.2, 1.0],
}


def trl_dataset(pairs: Sequence[PreferencePair]) -> Any:
    """Return the pairs as the ``datasets.Dataset`` that TRL's DPOTrainer takes."""
    import datasets

    text = datasets.Value("string")
    turns = [{"role": text, "content": text}]
    features = {"prompt": turns, "chosen": turns, "rejected": turns}
    if pairs[0].images:
        features["images"] = datasets.List(datasets.Image())
    records = []
    for pair in pairs:
        record: dict[str, Any] = {
            "prompt": [{"role": "user", "content": pair.prompt[0].text.removeprefix("<image>\n")}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        if pair.images:
            record["images"] = list(pair.images)
        records.append(record)
    return datasets.Dataset.from_list(records, features=datasets.Features(features))


def responses_of(pair: EncodedPair) -> list[Tensor]:
    """Return the token ids of the chosen and, if there is one, of the rejected response."""
    return [ids for ids in (pair.chosen_ids, pair.rejected_ids) if ids is not None]


def padded_logps(model: Any, pairs: list[EncodedPair]) -> Tensor:
    """Return each response's log-prob, ``[2 * pairs]``, chosen ones first, from a padded row each and all logits."""
    rows = [(pair, responses_of(pair)[number]) for number in range(2) for pair in pairs]
    length = max(pair.prompt_ids.numel() + response.numel() for pair, response in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (pair, response) in enumerate(rows):
        prompt = pair.prompt_ids.numel()
        ids[row, : prompt + response.numel()] = torch.cat([pair.prompt_ids, response])
        mask[row, : prompt + response.numel()] = 1
        scored[row, prompt : prompt + response.numel()] = True
    vision = {name: torch.cat([pair.vision[name] for pair, _ in rows]).to(model.device) for name in rows[0][0].vision}
    ids, scored = ids.to(model.device), scored.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask.to(model.device), **vision).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * scored[:, 1:]).sum(1)


def two_rows_loss(model: Any, reference: Any, pairs: list[EncodedPair]) -> Tensor:
    """Return the loss from two padded rows a pair, through policy and reference."""
    count = len(pairs)
    policy = padded_logps(model, pairs)
    with torch.no_grad():
        frozen = padded_logps(reference, pairs)
    lengths = torch.tensor([pair.chosen_ids.numel() for pair in pairs], device=model.device)
    return mpo_loss(policy[:count], policy[count:], frozen[:count], frozen[count:], lengths, nll_reduction="token").loss


def floor_loss(model: Any, reference: Any, pairs: list[EncodedPair]) -> Tensor:
    """Return the loss of the model's own forward over the unique tokens, with logits for response tokens only."""
    total = torch.zeros((), device=model.device)
    for pair in pairs:
        ids = torch.cat([pair.prompt_ids, *responses_of(pair)]).to(model.device)
        at = torch.arange(pair.prompt_ids.numel() - 1, ids.numel() - 1, device=model.device)
        vision = {name: values.to(model.device) for name, values in pair.vision.items()}
        logits = model(input_ids=ids[None], logits_to_keep=at, **vision).logits[0]
        total = total + cross_entropy(logits.float(), ids[at + 1]) / len(pairs)
    return total
