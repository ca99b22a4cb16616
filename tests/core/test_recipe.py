"""A recipe is checked as a whole; single mistakes are in tests/model/test_pruning.py."""

import numpy as np
import pytest
import torch

from lightning_prune import ERK, Channel, Fixed, Global, Local, NofM
from lightning_prune.core.recipe import Recipe


def test_the_scope_may_prescribe_the_final_sparsity():
    shapes = {"a": (4, 8), "b": (2, 8)}
    assert Recipe(0.9).final_sparsity(shapes) == 0.9
    assert Recipe(scope=NofM(n=1, m=4)).final_sparsity(shapes) == 0.75
    assert Recipe(scope=Fixed({"a": 0.6})).final_sparsity(shapes) == pytest.approx(0.6 * 32 / 48)


def test_numbers_by_pattern_are_short_for_fixed():
    assert Recipe({"a": 0.5}) == Recipe(scope=Fixed({"a": 0.5}))
    with pytest.raises(ValueError, match="sets the scope, so none can be given"):
        Recipe({"a": 0.5}, scope=Local())


def test_text_is_the_same_in_every_process():
    """An address in it would look like a changed recipe after each resume."""

    def criterion(*, weight):
        return weight

    text = Recipe(0.5, criterion=criterion, scope=ERK()).describe()
    assert (
        "0x" not in text["criterion"]
        and "criterion" in text["criterion"]
        and text["scope"] == "ERK(kernel=True)"
    )
    assert Recipe(0.5).describe()["scope"] == str(Global())


@pytest.mark.parametrize("value", [np.float32(0.9), torch.tensor(0.9)], ids=["numpy", "torch"])
def test_numbers_of_other_libraries_are_refused_with_what_makes_them_python_s(value):
    """Checkpoints and records hold Python's numbers alone."""
    with pytest.raises(
        ValueError, match=r"`sparsity` is a sparsity.*Numbers are Python's: write float\(\.\.\.\)"
    ):
        Recipe(value)
    with pytest.raises(ValueError, match=r"`min_keep` is a whole number.*write int\(\.\.\.\)"):
        Channel(min_keep=np.int64(4))
    with pytest.raises(ValueError, match=r"got '0\.9'\.$"):
        Recipe("0.9")
