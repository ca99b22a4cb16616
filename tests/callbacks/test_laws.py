"""Laws of a run, over training of all sorts."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import (
    ERK,
    Channel,
    Constant,
    Cosine,
    Global,
    Local,
    Polynomial,
    Slice,
    TrainTimePruning,
    Weight,
    Window,
)
from lightning_prune.model.pruning import Pruner
from tests.callbacks.toy import Toy, Witness, data, pruned_weights, trainer

OPTIMIZERS = st.sampled_from(
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
        ("Adam", {"lr": 0.01, "fused": True}),
        ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
        ("Rprop", {"lr": 0.01}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
        ("NAdam", {"lr": 0.01}),
    ]
)
TRAINERS = st.fixed_dictionaries(
    {
        "accumulate_grad_batches": st.sampled_from([1, 2, 4]),
        "gradient_clip_val": st.sampled_from([None, 0.1]),
        "precision": st.sampled_from(["32-true", "bf16-mixed", "64-true"]),
        "max_epochs": st.integers(1, 3),
    }
)
NOUNS = st.fixed_dictionaries(
    {
        "sparsity": st.floats(0.1, 0.8),
        "granularity": st.sampled_from([Weight(), Slice(0), Channel(multiple_of=1)]),
        "scope": st.sampled_from([Global(), Local(), ERK()]),
        "schedule": st.sampled_from([Polynomial(), Cosine(), Constant()]),
        "window": st.builds(Window, end=st.floats(0.3, 1.0), every=st.sampled_from([0.05, 0.3])),
    }
)


@pytest.mark.filterwarnings(
    "ignore"
)  # of the learning rate, of rounding, of precision: none of them is what this is about
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(optimizer=OPTIMIZERS, how=TRAINERS, nouns=NOUNS)
def test_pruned_weights_stay_zero_under_any_training(optimizer, how, nouns):
    """And the target is reached: up to what groups come to, which is said if it is more than a little."""
    if not isinstance(nouns["granularity"], Weight) and isinstance(nouns["scope"], ERK):
        nouns = {**nouns, "scope": Local()}
    shrink = "never" if isinstance(nouns["granularity"], Channel) else None
    callback = TrainTimePruning(**nouns, shrink=shrink, report=False)
    kind, options = optimizer
    if options.get("fused"):  # which cannot clip under mixed precision
        how = {**how, "gradient_clip_val": None}
    module = Toy(kind, **options)
    witness = Witness(callback)
    trainer(callback, witness, **how).fit(module, data(shuffle=True), data())
    assert witness.violations == 0
    assert all(not weight.count_nonzero() for weight in pruned_weights(module, callback))
    assert (
        removed(callback.pruner) == pytest.approx(callback.pruner.final_sparsity, abs=0.12)
        or callback.warnings
    )


def removed(pruner):
    """The fraction of the groups that are gone: rows of several layers are of several sizes."""
    if not isinstance(pruner, Pruner):
        return pruner.sparsity
    counts = [pruner.count_groups(n) or (m.numel(), int(m.sum())) for n, m in pruner.masks.items()]
    return 1.0 - sum(kept for _, kept in counts) / sum(total for total, _ in counts)
