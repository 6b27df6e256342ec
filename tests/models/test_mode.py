"""A model goes back to the mode it was in, each module for itself, also after an error."""

from __future__ import annotations

import pytest
from torch import nn

from vlmpo.models.mode import in_mode


@pytest.mark.parametrize("training", [True, False])
def test_each_module_goes_back_to_its_own_mode(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    model[1].eval()  # as a frozen tower is left
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False, False]
    with in_mode(model, training=training):
        assert {module.training for module in model.modules()} == {training}
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), in_mode(model, training=training):
        1 / 0  # noqa: B018 - the error is the test
    assert [module.training for module in model.modules()] == before
