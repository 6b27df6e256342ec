"""torch_compile: the text layers of policy and reference are compiled, training is as without, or one line says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import logged, pairs, trainer
from vlmpo.errors import RecipeError
from vlmpo.train import compiling

CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in (CHECKPOINTING, {"reference_kind": "cache"}, {"precision": "autocast"}, {"precision": "bf16"})
        ),
    ],
)
def test_training_is_as_without(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.compiler.reset()
    losses = []
    for backend in (None, "aot_eager"):
        folder = tmp_path / str(backend)
        if settings.get("reference_kind") == "cache":
            settings = {**settings, "reference_cache_dir": str(folder / "store")}
        compiled = {} if backend is None else {"torch_compile": True, "torch_compile_backend": backend}
        trainer(folder, pairs(8), **settings, **compiled).train()
        losses.append([(line["loss"], line["rewards/chosen"], line["grad_norm"]) for line in logged(folder)])
    assert len(losses[0]) == 4
    assert losses[0][0][1] == losses[1][0][1] == 0.0  # the reference is compiled as the policy is
    # A compiled layer converts by autocast elsewhere than torch does from call to call.
    tolerance = {"rel": 0.01, "abs": 0.05} if settings.get("precision") == "autocast" else {"rel": 1e-5, "abs": 1e-6}
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, **tolerance)


def test_the_layers_of_the_text_part_are_compiled_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: Any = torch.compiler.config
    monkeypatch.setattr(limits, "recompile_limit", 8)
    run = trainer(tmp_path, pairs(2), torch_compile=True, torch_compile_backend="eager")
    for model in (run.model, run.reference.model):
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
        assert compiled == list(model.get_decoder().layers)
    assert limits.recompile_limit == 64  # more graphs than a run has: past the limit torch would stop in silence
    assert run.accelerator.prepare_model(torch.nn.Linear(1, 1))._compiled_call_impl is None


def test_an_unknown_compiler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"training.torch_compile_backend: there is no 'nonsense'; there are aot_eager"
    ):
        trainer(tmp_path, pairs(2), torch_compile=True, torch_compile_backend="nonsense")


def test_a_machine_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(compiling.torch, "compile", compile)
    with pytest.raises(RecipeError, match=r"nothing can be compiled here \(no C\+\+ compiler\); leave it out"):
        trainer(tmp_path, pairs(2), torch_compile=True, torch_compile_backend="eager")
