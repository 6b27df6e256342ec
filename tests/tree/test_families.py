"""Every family of the zoo, as training reads it, against the model's own forward; then trained, saved and reloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import random_pair
from tests.training import config, flat_weights, logged, relative
from tests.zoo import FAMILIES, Family, encoded_pairs, sample_pairs
from vlmpo import MPOTrainer, PreferencePair
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.models import families
from vlmpo.models.families import support_for
from vlmpo.train.batching import MicroBatch, lay_out
from vlmpo.tree.forward import install
from vlmpo.tree.layout import PromptTree, build_row
from vlmpo.tree.self_check import check_rows

every_family = pytest.mark.parametrize("name", list(FAMILIES))


def rows_of(family: Family, kinds: Sequence[str]) -> MicroBatch:
    pairs = encoded_pairs(family.name)
    return lay_out([pairs[kind] for kind in kinds], family.shared)


def plain_logps(model: torch.nn.Module, name: str, kinds: Sequence[str]) -> torch.Tensor:
    """One forward a response through the model's own logits, with what its processor gave: no code of ours."""
    parts = []
    for kind in kinds:
        pair = encoded_pairs(name)[kind]
        for response in (pair.chosen_ids, pair.rejected_ids):
            types = {
                key: torch.cat([value, torch.zeros_like(response)])[None] for key, value in pair.token_types.items()
            }
            ids = torch.cat([pair.prompt_ids, response])[None]
            logps = model(input_ids=ids, **types, **pair.vision).logits[0].log_softmax(-1)
            parts.append(logps[pair.prompt_ids.numel() - 1 : -1].gather(1, response[:, None]).squeeze(1))
    return torch.cat(parts)


def vision_gradient(model: Any) -> torch.Tensor:
    """Gradients of everything but the text tower and the head, concatenated."""
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    return torch.cat([p.grad.flatten() for p in model.parameters() if id(p) not in text and p.grad is not None])


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@every_family
def test_the_table_says_what_the_code_does(name: str) -> None:
    family = FAMILIES[name]
    support = support_for(family.model(0).config)
    assert support.shared == family.shared
    assert support.reason


def test_whatever_may_share_is_in_the_zoo() -> None:
    """No family is put on the list, or forgotten here, without being held to parity."""
    configs = [family.model(0).config for family in FAMILIES.values() if family.shared]
    tested = {config.model_type for config in configs} | {config.get_text_config().model_type for config in configs}
    assert tested == {row.model_type for row in families.FAMILIES.values() if row.shared or row.causal_text}


@every_family
def test_log_probs_and_gradients_are_those_of_the_model_itself(name: str) -> None:
    """Trees with one image, two images and none in one row (separate rows where not shared); float32."""
    family = FAMILIES[name]
    kinds = list(encoded_pairs(name))
    plain, ours = family.model(0), family.model(0)
    install(ours, family.shared)
    part = rows_of(family, kinds)
    assert len(part.rows) == (1 if family.shared else 2 * len(kinds))
    got, expected = ours(packed_rows=part.rows), plain_logps(plain, name, kinds)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    mine, theirs = flat_gradient(ours), flat_gradient(plain)
    assert theirs.norm() > 1e-2
    assert relative(mine, theirs) < 1e-5
    if family.images:  # alone as well, so that a large text gradient hides nothing
        mine, theirs = vision_gradient(ours), vision_gradient(plain)
        assert theirs.norm() > 1e-3
        assert relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.images])
def test_each_layout_alone_and_in_another_order(name: str) -> None:
    """A row of one tree, and rows whose first tree has no image: each family finds its images again."""
    family = FAMILIES[name]
    plain, ours = family.model(0), family.model(0)
    install(ours, family.shared)
    kinds = list(encoded_pairs(name))
    with torch.no_grad():
        for order in ([kind] for kind in kinds):
            got = ours(packed_rows=rows_of(family, order).rows)
            torch.testing.assert_close(got, plain_logps(plain, name, order), atol=1e-5, rtol=0)
        got = ours(packed_rows=rows_of(family, kinds[::-1]).rows)
        torch.testing.assert_close(got, plain_logps(plain, name, kinds[::-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.shared])
def test_many_branches_share_one_trunk(name: str) -> None:
    """Six responses, one of a single token, one longer than any window: as six forwards."""
    family = FAMILIES[name]
    pair = encoded_pairs(name)["one image" if family.images else "text only"]
    generator = torch.Generator().manual_seed(3)
    responses = tuple(torch.randint(5, 250, (length,), generator=generator) for length in (3, 1, 40, 2, 5, 4))
    tree = PromptTree(pair.prompt_ids, responses, pair.vision, pair.token_types)
    ours = family.model(0)
    install(ours, True)
    shared = [build_row([tree, tree])]
    separate = [build_row([part]) for part in tree.separate()]
    with torch.no_grad():
        got = ours(packed_rows=shared)
        install(ours, False)
        expected = ours(packed_rows=separate)  # held to the model's own forward above
    torch.testing.assert_close(got, expected.repeat(2), atol=1e-5, rtol=0)


@every_family
def test_gradients_are_the_same_in_training_with_activations_recomputed(name: str) -> None:
    family = FAMILIES[name]
    rows = rows_of(family, list(encoded_pairs(name))).rows
    models = [family.model(0), family.model(0).train()]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in models:
        install(model, family.shared)
        model(packed_rows=rows).sum().backward()
    assert models[1].is_gradient_checkpointing
    assert relative(flat_gradient(models[1]), flat_gradient(models[0])) < 1e-6


@every_family
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_the_start_up_check_passes(name: str, kind: str) -> None:
    family = FAMILIES[name]
    model = family.model(0)
    pairs = list(encoded_pairs(name).values())[:1]
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    install(model, family.shared)
    shared = lay_out(pairs, True).rows if family.shared else None
    assert check_rows(model, shared, lay_out(pairs, False).rows, half=kind == "autocast") is None


@dataclass
class Trained:
    """A family after three optimizer steps as it is trained by default, saved; and after the same in separate rows."""

    family: Family
    folder: Path
    before: torch.Tensor
    model: Any
    log: list[dict[str, Any]]
    separate_model: Any
    separate_log: list[dict[str, Any]]


def pairs_for(family: Family) -> list[PreferencePair]:
    return [random_pair(seed, images=min((1, 2, 0)[seed % 3], family.images)) for seed in range(6)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    family = FAMILIES[request.param]
    runs, logs = [], []
    folder = tmp_path_factory.mktemp("family")
    for attention in ("auto", "separate"):
        # Plain SGD: Adam divides by its gradient's size, rounding included. Clipped, for the towers are not scaled.
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0, "attention": attention}
        run = MPOTrainer(
            model=family.model(0),
            args=config(folder / attention, **settings),
            train_dataset=pairs_for(family),
            processing_class=family.processor(),
        )
        run.train()
        assert run.shared == (family.shared and attention == "auto")
        runs.append(run)
        logs.append(logged(folder / attention))
    runs[0].save_model(str(folder / "model"))
    before = flat_weights(family.model(0))
    yield Trained(family, folder / "model", before, runs[0].model, logs[0], runs[1].model, logs[1])
    shutil.rmtree(folder)


@pytest.mark.slow
def test_three_steps_start_from_zero_rewards_and_end_as_in_separate_rows(trained: Trained) -> None:
    assert len(trained.log) == 3
    for first in (trained.log[0], trained.separate_log[0]):
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
        assert first["loss"] == pytest.approx(0.8317766 + first["loss/nll"], rel=1e-6)
    assert trained.log[2]["rewards/chosen"] != 0.0
    after, other = flat_weights(trained.model), flat_weights(trained.separate_model)
    assert relative(after, trained.before) > 1e-3
    assert relative(after, other) < 1e-5
    assert relative(after - trained.before, other - trained.before) < 1e-4
    losses = [[line["loss"] for line in log] for log in (trained.log, trained.separate_log)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_saved_and_reloaded_it_answers_as_before(trained: Trained) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    family = trained.family
    auto = AutoModelForImageTextToText if family.images else AutoModelForCausalLM
    reloaded = auto.from_pretrained(trained.folder).eval()
    assert type(reloaded) is type(trained.model)
    again = PairEncoder(AutoProcessor.from_pretrained(trained.folder))
    for kind, pair in sample_pairs(family).items():
        one, other = again.encode(pair), encoded_pairs(family.name)[kind]
        for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert getattr(one, field).tolist() == getattr(other, field).tolist()
        assert one.vision.keys() == other.vision.keys()
        assert all(torch.equal(one.vision[key], other.vision[key]) for key in one.vision)
    with torch.no_grad():
        kind = next(iter(encoded_pairs(family.name)))
        torch.testing.assert_close(
            plain_logps(reloaded, family.name, [kind]),
            plain_logps(family_with(trained), family.name, [kind]),
            atol=1e-6,
            rtol=0,
        )
    answers = [greedy(model, family.name) for model in (trained.model.eval(), reloaded)]
    assert answers[0] == answers[1]


def family_with(trained: Trained) -> Any:
    """A fresh model with the trained weights: never touched by our attention or forward."""
    fresh = trained.family.model(1)
    fresh.load_state_dict(trained.model.state_dict())
    return fresh


def greedy(model: Any, name: str) -> list[int]:
    pair = next(iter(encoded_pairs(name).values()))
    types = {key: value[None] for key, value in pair.token_types.items()}
    bad = [token for token in (getattr(model.config, "image_token_id", None),) if token is not None]
    output = model.generate(
        input_ids=pair.prompt_ids[None],
        attention_mask=torch.ones_like(pair.prompt_ids)[None],
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=bad or None,
        **types,
        **pair.vision,
    )
    return output[0, pair.prompt_ids.numel() :].tolist()
