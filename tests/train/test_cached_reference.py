"""Training against log-probs from the store: the same run, without a model behind it."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.commands.test_train import call, checkpoint, records, write_data, write_recipe  # noqa: F401  a fixture
from tests.tiny_models import model as tiny_model
from tests.tiny_models import noise_image
from tests.training import flat_weights, logged, pairs, relative, trainer
from vlmpo.data.dataset import open_pairs
from vlmpo.data.readers.spec import SourceSpec
from vlmpo.errors import RunError
from vlmpo.models.loading import load_model
from vlmpo.train.batching import lay_out, response_keys
from vlmpo.train.cached_reference import CachedReference
from vlmpo.train.host_weights import HostWeights, make_room
from vlmpo.train.logps_store import ReferenceStore, Scored
from vlmpo.train.reference import AdapterReference, CopyReference
from vlmpo.tree.layout import PromptTree

TIMING = ("step_seconds", "pairs_per_second", "tokens_per_second", "data_wait_share", "memory_gib")


def cached(folder: Path, data: Any, name: str, **settings: Any):
    kind = {"reference_kind": "cache", "reference_cache_dir": str(folder / "store")}
    return trainer(folder / name, data, **kind, **settings)


def same_lines(mine: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(logged(mine), logged(other), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - set(TIMING):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


@pytest.mark.slow
def test_a_cached_run_is_the_online_run(tmp_path: Path) -> None:
    """First run fills, second reads: bit for bit the online run, whose rows are the same."""
    settings = {"learning_rate": 1e-2, "num_train_epochs": 2, "dtype": torch.float64}
    online = trainer(tmp_path / "online", pairs(6), **settings)
    online.train()
    for name in ("first", "second"):
        run = cached(tmp_path, pairs(6), name, **settings)
        run.train()
        reference = run.reference
        assert isinstance(reference, CachedReference)
        # the second epoch has other micro-batches, but the same responses
        assert (reference.hits, reference.misses) == ((12, 12) if name == "first" else (24, 0))
        assert relative(flat_weights(run.model), flat_weights(online.model)) < 1e-9
        same_lines(tmp_path / name, tmp_path / "online", 1e-9)
    assert logged(tmp_path / "second")[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-12)
    assert logged(tmp_path / "second")[0]["loss/sigmoid"] == pytest.approx(0.6931471805599453, abs=1e-12)


@pytest.mark.slow
def test_separate_rows_keep_log_probs_of_their_own(tmp_path: Path) -> None:
    cached(tmp_path, pairs(3), "shared").train()
    separate = cached(tmp_path, pairs(3), "separate", attention="separate")
    separate.train()
    assert separate.reference.misses == 6
    again = cached(tmp_path, pairs(3), "again", attention="separate")
    again.train()
    assert (again.reference.hits, again.reference.misses) == (6, 0)
    same_lines(tmp_path / "again", tmp_path / "separate", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "response", "question", "pixel", "precision", "config"])
def test_whatever_decides_a_log_prob_is_in_its_key(tmp_path: Path, what: str) -> None:
    """One thing changes: what it touches is computed anew, and nothing else is."""
    data = pairs(3)
    cached(tmp_path, data, "before").train()
    settings: dict[str, Any] = {}
    expected = 6
    if what == "weights":
        other = tiny_model()
        with torch.no_grad():
            other.lm_head.weight[5, 3] += 1e-3
        settings["model"] = other
    elif what == "config":
        settings["model"] = tiny_model()
        settings["model"].config.text_config.rms_norm_eps = 1e-4
    elif what == "precision":
        settings["bf16"] = True
    elif what == "response":
        data[0], expected = replace(data[0], chosen=data[0].chosen + " red"), 1
    elif what == "question":
        message = replace(data[0].prompt[0], text=data[0].prompt[0].text + "?")
        data[0], expected = replace(data[0], prompt=(message,)), 2
    else:
        image = data[0].images[0].copy()
        image.putpixel((3, 3), (0, 0, 0))
        data[0], expected = replace(data[0], images=(image,)), 2
    run = cached(tmp_path, data, "after", per_device_train_batch_size=1, **settings)
    seen: list[int] = []
    put = run.reference.store.put
    run.reference.store.put = lambda keys, said: (seen.append(len(keys)), put(keys, said))  # type: ignore[method-assign]
    run.train()
    assert run.reference.misses == expected
    assert logged(tmp_path / "after")[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)


def test_keys_by_hand() -> None:
    tree = PromptTree(torch.tensor([1, 2]), (torch.tensor([3]), torch.tensor([4])), {"pixel_values": torch.zeros(1, 3)})
    first, second = response_keys(tree)
    assert first != second
    assert response_keys(replace(tree, responses=tree.responses[::-1])) == [second, first]
    others = [
        replace(tree, prompt_ids=torch.tensor([1, 3])),
        replace(tree, vision={"pixel_values": torch.tensor([[0.0, 0.0, 1e-30]])}),
        replace(tree, vision={"pixel_values": torch.zeros(3, 1)}),
        replace(tree, vision={"pixels": torch.zeros(1, 3)}),
        replace(tree, vision={}),
        replace(tree, token_types={"token_type_ids": torch.tensor([0, 1])}),
        PromptTree(torch.tensor([1, 2, 3]), (torch.tensor([3]),), tree.vision),
    ]
    assert len({first, *(response_keys(other)[0] for other in others)}) == 1 + len(others)
    assert lay_out([], keyed=True).keys == []


@pytest.mark.slow
def test_an_adapter_switched_off_is_cached_too(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-2, "num_train_epochs": 2}
    runs = []
    for name in ("online", "first", "second"):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        make = trainer if name == "online" else cached
        folder = (tmp_path / name, pairs(4)) if name == "online" else (tmp_path, pairs(4), name)
        run = make(*folder, peft_config=adapter, **settings)
        run.train()
        runs.append(run)
    assert isinstance(runs[1].reference.model, AdapterReference)  # it shares the policy's memory: it stays
    assert (runs[2].reference.hits, runs[2].reference.misses) == (16, 0)
    for run in runs[1:]:
        assert relative(flat_weights(run.model), flat_weights(runs[0].model)) < 1e-5


def test_the_number_of_tiles_in_use_is_in_the_note(tmp_path: Path) -> None:
    """Whoever set it; a set's own number that only one of two runs keeps to makes the difference."""
    write_data(tmp_path, records(3))

    def note(of_set: int | None = None, **settings: Any) -> str:
        data = open_pairs([SourceSpec(str(tmp_path / "set" / "meta.json"), max_tiles=of_set)])
        run = cached(tmp_path, data, "run", **settings)
        return run.completeness._note().name

    own = note()
    assert note(max_tiles=2) == own
    assert note(max_tiles=3) != own
    assert note(of_set=6) != note(of_set=6, max_tiles=2)
    assert note(of_set=1) == note(of_set=1, max_tiles=2)


def recipe(tmp_path: Path, checkpoint: Path, **settings: Any) -> str:  # noqa: F811
    reference = {"kind": "cache", "cache_dir": str(tmp_path / "store")}
    return write_recipe(tmp_path, checkpoint, reference=reference, **settings)


def lets_go(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CopyReferences are made of from now on."""
    made: list[str] = []
    plain = CopyReference.__init__

    def counted(self: CopyReference, model: Any, known_hash: str | None = None) -> None:
        made.append(type(model).__name__)
        plain(self, model, known_hash)

    monkeypatch.setattr(CopyReference, "__init__", counted)
    return made


@pytest.mark.slow
def test_ahead_by_one_command_and_then_no_model(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`vlmpo cache`, then `vlmpo train`: the run makes no reference model, and is the one that had it."""
    write_data(tmp_path, records(8))
    made = lets_go(monkeypatch)
    plain = call("train", write_recipe(tmp_path, checkpoint, training={"output_dir": str(tmp_path / "online")}))
    assert plain.exit_code == 0, plain.output
    assert len(made) == 1
    filled = call("cache", recipe(tmp_path, checkpoint))
    assert filled.exit_code == 0, filled.output
    assert "reference: 16 responses computed, 0 known before; in" in filled.output
    assert len(made) == 2
    trained = call("train", recipe(tmp_path, checkpoint))
    assert trained.exit_code == 0, trained.output
    assert len(made) == 2
    assert "no model is loaded" in trained.output
    same_lines(tmp_path / "run", tmp_path / "online", 1e-5)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("run", "online")]
    assert manifests[0]["reference_hash"] == manifests[1]["reference_hash"]


def test_the_store_is_filled_with_what_an_epoch_would_leave_out(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    """Nine pairs in steps of four: which one `drop_last` leaves out depends on seed and epoch. One more is no good."""
    write_data(tmp_path, [*records(9), {**records(10)[9], "image": "broken.png"}])
    (tmp_path / "set" / "images" / "broken.png").write_bytes(b"no picture")
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 4}
    filled = call("cache", recipe(tmp_path, checkpoint, training=settings))
    assert filled.exit_code == 0, filled.output
    assert "reference: 18 responses computed, 0 known before; in" in filled.output
    assert "undecodable_image: " in filled.output  # accounted for as `vlmpo train` does
    (line,) = [line for line in filled.output.splitlines() if line.startswith("  noise ")]
    assert line.split() == ["noise", "10", "9", "0", "1", "0"]  # read, used, held out, undecodable, not reached


@pytest.mark.slow
def test_the_first_epoch_fills_and_the_second_needs_no_model(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_data(tmp_path, records(8))
    made = lets_go(monkeypatch)
    result = call("train", recipe(tmp_path, checkpoint, training={"num_train_epochs": 2}))
    assert result.exit_code == 0, result.output
    assert "log-probs of all pairs are in" in result.output
    assert "the model is freed" in result.output
    assert len(made) == 1
    again = call("train", recipe(tmp_path, checkpoint, training={"output_dir": str(tmp_path / "again")}))
    assert again.exit_code == 0, again.output
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_a_model_that_is_let_go_is_not_in_memory(tmp_path: Path, checkpoint: Path, given: bool) -> None:  # noqa: F811
    reference = {"ref_model": load_model(str(checkpoint))} if given else {}
    run = cached(tmp_path, pairs(4), "run", model=load_model(str(checkpoint)), **reference)
    reference.clear()
    first = weakref.ref(run.reference.model.model)
    run.train()
    assert run.reference.model is None
    assert first() is None
    again = weakref.ref(run.reference.load().model)  # for pairs that were not among them
    assert again() is not None
    run.reference.free()
    assert again() is None


@pytest.mark.slow
def test_an_evaluation_leaves_no_model_in_the_next_epoch(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    seen: list[tuple[float, bool]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.epoch, run.reference.model is not None))

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.epoch, run.reference.model is not None))

    settings: dict[str, Any] = {"num_train_epochs": 2, "eval_strategy": "epoch", "eval_dataset": pairs(2, first=50)}
    run = cached(tmp_path, pairs(4), "run", model=load_model(str(checkpoint)), callbacks=[Watch()], **settings)
    run.train()
    assert seen == [(0.5, True), (1.0, True), (1.0, True), (1.5, False), (2.0, False), (2.0, False)]


@pytest.mark.slow
def test_a_note_that_cannot_be_written_stops_no_run(
    tmp_path: Path,
    checkpoint: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    write_data(tmp_path, records(4))
    monkeypatch.setattr("vlmpo.train.cached_reference.replace_json", full)
    result = call("train", recipe(tmp_path, checkpoint))
    assert result.exit_code == 0, result.output
    assert "No space left" in result.output


@pytest.mark.slow
def test_an_image_that_changed_is_read_anew(tmp_path: Path, checkpoint: Path, monkeypatch: Any) -> None:  # noqa: F811
    """The annotations say the set is complete, an image says otherwise: the model is loaded after all."""
    write_data(tmp_path, records(8))
    assert call("cache", recipe(tmp_path, checkpoint)).exit_code == 0
    noise_image(60, 60, 99).save(tmp_path / "set" / "images" / "0.png")
    made = lets_go(monkeypatch)
    result = call("train", recipe(tmp_path, checkpoint))
    assert result.exit_code == 0, result.output
    assert len(made) == 1
    assert "its model is loaded for them" in result.output
    lines = logged(tmp_path / "run")
    assert lines[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    online = write_recipe(tmp_path, checkpoint, training={"output_dir": str(tmp_path / "online")})
    assert call("train", online).exit_code == 0
    same_lines(tmp_path / "run", tmp_path / "online", 1e-5)


def test_weights_that_moved_are_refused(tmp_path: Path) -> None:
    run = cached(tmp_path, pairs(2), "run")
    reference = run.reference
    assert isinstance(reference, CachedReference)
    other = trainer(tmp_path / "other", pairs(2), model=tiny_model(seed=1)).reference
    moved = CachedReference(reference.store, reference.weights_hash(), lambda: "", lambda: other, bool)
    with pytest.raises(RunError, match="have changed since"):
        moved.load()


def test_only_a_recipe_with_a_cache_is_filled(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    write_data(tmp_path, records(4))
    result = call("cache", write_recipe(tmp_path, checkpoint))
    assert result.exit_code == 2
    assert "reference.kind: set it to cache" in result.output


def without_sense(monkeypatch: pytest.MonkeyPatch, value: float, at: int = 0) -> None:
    """From now on the reference model gives ``value`` for response ``at`` of every micro-batch."""
    plain = CopyReference.response_logps

    def spoilt(self: CopyReference, micro_batch: Any) -> torch.Tensor:
        logps = plain(self, micro_batch).clone()
        logps[at] = value
        return logps

    monkeypatch.setattr(CopyReference, "response_logps", spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_is_never_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    with monkeypatch.context() as spoilt:
        without_sense(spoilt, value)
        with pytest.raises(RunError, match=r"log-probs of the reference are not finite in [12] of its 2 pairs"):
            cached(tmp_path, pairs(2), "one").train()
        filling = cached(tmp_path, pairs(2), "filled")
        with pytest.raises(RunError, match=r"reference's log-probs are not finite for memory:\d.*they are not stored"):
            filling.precompute_reference()
    again = cached(tmp_path, pairs(2), "again")
    again.train()
    assert again.reference.misses > 0
    assert all(math.isfinite(score.logp) for score in again.reference.store._written.values())
    same_lines(tmp_path / "again", online_run(tmp_path), 1e-5)


def online_run(folder: Path) -> Path:
    trainer(folder / "online", pairs(2)).train()
    return folder / "online"


def nothing() -> Any:
    raise AssertionError("no model is needed")


# ---- where the model is ----


class Uses(TrainerCallback):
    """Notes at the end of every step whether the run's reference has a model, and whether it rests in host memory."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.run.reference.model
        self.seen.append((model is not None, getattr(model, "_host", None) is not None))


@pytest.fixture
def device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weights on the CPU count as on a device; every tensor that is brought to it is noted."""
    brought: list[Any] = []
    plain = HostWeights.__init__

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        brought.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(HostWeights, "__init__", lambda self, model: plain(self, model, bring))
    monkeypatch.setattr("vlmpo.train.reference.can_rest", lambda model: True)
    return brought


def in_memory(folder: Path, name: str, **settings: Any) -> tuple[Any, Uses]:
    """A run of two epochs whose model has no name, on pairs of a file."""
    uses = Uses()
    data = open_pairs([SourceSpec(str(folder / "set" / "meta.json"))])
    settings = {"num_train_epochs": 2, "learning_rate": 1e-2, "callbacks": [uses], **settings}
    uses.run = cached(folder, data, name, **settings)
    return uses.run, uses


@pytest.mark.slow
def test_a_model_made_in_memory_leaves_the_device_once_the_store_is_full(
    tmp_path: Path, device_of_its_own: list[Any]
) -> None:
    """The first run keeps it in host memory, the second makes none; the numbers are the online run's."""
    write_data(tmp_path, records(4))
    first, uses = in_memory(tmp_path, "first")
    first.train()
    assert uses.seen == [(True, False)] * 2 + [(True, True)] * 2
    assert not device_of_its_own  # not once needed
    second, uses = in_memory(tmp_path, "second")
    assert second.reference.model is None
    second.train()
    assert uses.seen == [(False, False)] * 4
    same_lines(tmp_path / "second", tmp_path / "first", 1e-5)


@pytest.mark.slow
def test_what_is_at_rest_is_read_where_it_is_needed(tmp_path: Path, device_of_its_own: list[Any]) -> None:
    """Held-out pairs that no store has: the model comes to the device for them, and leaves it."""
    write_data(tmp_path, records(4))
    in_memory(tmp_path, "fill")[0].train()
    held_out = pairs(2, first=50)
    online = trainer(tmp_path / "online", pairs(4))
    run, _ = in_memory(tmp_path, "run", eval_dataset=held_out)
    assert run.reference.model._host is not None
    weights = [weight.data_ptr() for weight in run.reference.model.model.parameters()]
    found = run.evaluate()
    assert len(device_of_its_own) >= len(weights)
    assert [weight.data_ptr() for weight in run.reference.model.model.parameters()] == weights
    expected = online.evaluate(held_out)
    for key in ("eval_rewards/chosen", "eval_loss", "eval_logps/rejected"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key


@pytest.mark.slow
def test_a_missing_log_prob_of_a_model_that_was_trained_is_an_error(tmp_path: Path) -> None:
    write_data(tmp_path, records(4))
    in_memory(tmp_path, "fill")[0].train()
    run, _ = in_memory(tmp_path, "run")
    assert run.evaluate(pairs(1, first=50))["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-5)  # as yet untrained
    run.train()
    assert run.reference.model is not None  # it lasts no longer than this run: it is kept
    untouched, _ = in_memory(tmp_path, "untouched")
    untouched.train()
    with pytest.raises(RunError, match="made in memory, has been trained since; start again with another"):
        untouched.evaluate(pairs(1, first=60))


def test_an_online_reference_that_rests_gives_the_same_numbers(tmp_path: Path, device_of_its_own: list[Any]) -> None:
    run = trainer(tmp_path, pairs(2))
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())).micro_batches[0])
    before = run.reference.response_logps(batch)
    assert run.reference.rest_on_host()
    assert not run.reference.rest_on_host()  # it does already
    assert torch.equal(run.reference.response_logps(batch), before)
    tensors = [*run.reference.model.parameters(), *run.reference.model.buffers()]
    assert len(device_of_its_own) == len(tensors)
    assert all(tensor.data_ptr() == host.data_ptr() for tensor, host in zip(tensors, device_of_its_own, strict=True))


def test_a_reference_makes_room_only_if_rows_lack_it() -> None:
    """By hand: of 80 bytes an eighth, 10, must be left for rows."""

    class Resting:
        rests = 0

        def rest_on_host(self) -> bool:
            self.rests += 1
            return True

    one = Resting()
    assert not make_room(one, None, 100)  # no device with memory of its own
    assert not make_room(one, (40, 80), 30)
    assert one.rests == 0
    assert make_room(one, (40, 80), 31)
    assert one.rests == 1


def test_what_an_older_store_holds_that_is_not_finite_is_computed_anew(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    store.put([b"a" * 16, b"b" * 16], [Scored(math.nan, 3), Scored(-2.0, 4)])
    reference = CachedReference(store, "", lambda: "", nothing, bool)
    assert reference._stored(b"a" * 16) is None
    assert reference._stored(b"b" * 16) == Scored(-2.0, 4)
    assert reference._stored(b"c" * 16) is None
