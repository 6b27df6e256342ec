"""The names that ``import vlmpo`` gives: each is what it says, whatever else was imported before."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import vlmpo

# Parameters a caller relies on; a name that is not here only has to be a class or a function.
SIGNATURES = {
    "verify": ["response", "truth", "verifier"],
    "mpo_loss": [
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
        "chosen_lengths",
        "weights",
        "beta",
        "reward_shift",
        "nll_reduction",
        "label_smoothing",
        "num_pairs",
        "num_chosen_tokens",
    ],
    "MPOTrainer": [
        "model",
        "ref_model",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "peft_config",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def every_submodule() -> None:
    """Import them all: one with the name of a public function would take its place."""
    for module in pkgutil.walk_packages(vlmpo.__path__, "vlmpo."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.mark.parametrize("name", vlmpo.__all__)
def test_a_public_name_is_a_class_or_a_function(name: str) -> None:
    value = getattr(vlmpo, name)
    assert inspect.isclass(value) if name[0].isupper() else inspect.isfunction(value)
    assert value.__name__ == name
    assert value.__module__.startswith("vlmpo.")
    assert inspect.getdoc(value)
    assert name in dir(vlmpo)


@pytest.mark.parametrize("name", SIGNATURES)
def test_it_takes_what_is_documented(name: str) -> None:
    parameters = list(inspect.signature(getattr(vlmpo, name)).parameters)
    assert [parameter for parameter in parameters if parameter in SIGNATURES[name]] == SIGNATURES[name]


def test_the_names_others_build_on_are_there() -> None:
    assert {"MPOConfig", "MPOTrainer", "RewardShift", "mpo_loss", "verify", "Verdict"} <= set(vlmpo.__all__)


def test_verify() -> None:
    assert vlmpo.verify("Two and one.\nFinal answer: 3", "3") == vlmpo.Verdict("correct", "3", "math")
    assert vlmpo.verify("Final answer: red.", "blue", verifier="exact") == vlmpo.Verdict("wrong", "red", "exact")
    assert vlmpo.verify("I cannot say.", truth="b") == vlmpo.Verdict("unparsed", None, "option")
