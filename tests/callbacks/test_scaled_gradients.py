"""16-bit training by a scaler of gradients, also with optimizers that take the scale off by themselves."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_prune import (
    Channel,
    Fisher,
    GroupLasso,
    MeanGradient,
    Movement,
    Saliency,
    SparseTraining,
    StraightThrough,
    TrainTimePruning,
)
from tests.callbacks.toy import Toy, data, trainer

KINDS = {
    "movement": lambda: TrainTimePruning(0.5, criterion=Movement(), report=False),
    "saliency": lambda: TrainTimePruning(0.5, criterion=Saliency(), report=False),
    "fisher": lambda: TrainTimePruning(0.5, criterion=Fisher(), report=False),
    "rigl": lambda: SparseTraining(0.5, report=False),
    "rigl_mean": lambda: SparseTraining(0.5, grow=MeanGradient(), report=False),
    "straight-through": lambda: TrainTimePruning(0.5, masking=StraightThrough(1.0), report=False),
    "lasso": lambda: TrainTimePruning(
        0.5,
        granularity=Channel(multiple_of=1),
        regularizer=GroupLasso(0.5),
        include=["body"],
        shrink="never",
        report=False,
    ),
}


def fitted(kind: str, init_scale: float, *, fused: bool):
    """Train for two epochs in float16 at a constant scale."""
    callback, module = KINDS[kind](), Toy(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
    fit = trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=2)
    fit.fit(module, data(), data())
    return callback, module


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["movement", "straight-through", "lasso"])
def test_gradients_are_read_and_added_to_without_their_scale(kind, fused):
    """Scores are ranked, but penalties, decays and movements have a size: a scale that stays in them shows."""
    (callback, module), (scaled, other) = (fitted(kind, scale, fused=fused) for scale in (2.0**8, 2.0**12))
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    totals, found = (cb.pruner.statistics.from_gradients.totals for cb in (callback, scaled))
    assert kind != "movement" or totals["movement"]
    for name, total in totals.get("movement", {}).items():
        torch.testing.assert_close(found["movement"][name], total, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_overflow_are_no_steps(kind):
    """torch calls fused optimizers in any case, which change nothing then; infinite gradients tell nothing."""
    callback, module = KINDS[kind](), Toy(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    fit = trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=4)
    fit.fit(module, data(), data())
    assert scaler.get_scale() < 2.0**24
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert callback.pruner.sparsity == pytest.approx(0.5, abs=0.01)
    for name, mask in callback.masks.items():
        assert not bool(module.get_parameter(name)[~mask].any())
