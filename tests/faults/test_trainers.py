"""Every way in which Lightning runs a Trainer: the sparsity is reached, or it is said that it is not."""

import pytest

from lightning_prune import (
    APoZ,
    Channel,
    Dormant,
    GroupLasso,
    InitialPruning,
    LeastSquares,
    Movement,
    PostTrainingPruning,
    Saliency,
    Slice,
    SparseGPT,
    SparseTraining,
    StraightThrough,
    TopKAST,
    TrainTimePruning,
    Wanda,
    WeightRewinding,
)
from tests.callbacks.toy import Toy, data, pruned_weights, trainer

MAKE = {
    "train_time": lambda: TrainTimePruning(0.5),
    "sparse": lambda: SparseTraining(0.5),
    "initial": lambda: InitialPruning(0.5),
    "rewinding": lambda: WeightRewinding(0.5, num_levels=1),
    "post": lambda: PostTrainingPruning(0.5),
    "structured": lambda: TrainTimePruning(0.5, granularity=Channel()),
    "at each update": lambda: TrainTimePruning(0.5, granularity=Channel(), shrink="update"),
    "lasso": lambda: TrainTimePruning(0.5, granularity=Channel(), regularizer=GroupLasso(1e-3)),
    "movement": lambda: TrainTimePruning(0.5, criterion=Movement()),
    "activations": lambda: TrainTimePruning(
        0.5, criterion=APoZ(), granularity=Slice(dim=0), exclude=["head"]
    ),
    "straight-through": lambda: TrainTimePruning(0.5, masking=StraightThrough()),
    "dormant": lambda: TrainTimePruning(0.5, masking=Dormant()),
    "top-kast": lambda: TrainTimePruning(0.5, masking=TopKAST()),
    "snip": lambda: InitialPruning(0.5, criterion=Saliency()),
    "wanda": lambda: PostTrainingPruning(0.5, criterion=Wanda()),
    "sparsegpt": lambda: PostTrainingPruning(0.5, solver=SparseGPT()),
    "one-shot": lambda: PostTrainingPruning(0.5, granularity=Channel(), solver=LeastSquares()),
}
FIRST = ("train_time", "sparse", "initial", "rewinding", "post", "structured")
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in MAKE]
WAYS = {
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run=3": {"fast_dev_run": 3},
    "overfit_batches": {"overfit_batches": 1},
    "limit_train_batches": {"limit_train_batches": 1},
    "limit_train_batches=0.3": {"limit_train_batches": 0.3},
    "limit_val_batches=0": {"limit_val_batches": 0},
    "detect_anomaly": {"detect_anomaly": True},
    "barebones": {"barebones": True},
    "no inference mode": {"inference_mode": False},
    "no sanity check": {"num_sanity_val_steps": 0},
    "accumulate": {"accumulate_grad_batches": 7},
    "val_check_interval": {"val_check_interval": 2},
    "64-true": {"precision": "64-true"},
    "bf16-true": {"precision": "bf16-true"},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*learning rate had fallen"),
    pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly"),
    pytest.mark.filterwarnings("ignore:Training stopped"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
    pytest.mark.filterwarnings("ignore:.*barebones"),
]


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch):
    """What a report says is not at stake here; measuring it takes a second."""
    from lightning_prune.callbacks import monitor

    monkeypatch.setattr(monitor, "to_rich", lambda report: "")
    init = monitor.SparsityMonitor.__init__
    monkeypatch.setattr(monitor.SparsityMonitor, "__init__", lambda self: init(self, latency=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_what_was_asked_for_is_reached_or_warned_of(way, name, tmp_path):
    module, callback = Toy(), MAKE[name]()
    options = {"max_epochs": 2, "enable_checkpointing": False, "default_root_dir": tmp_path} | WAYS[way]
    run = trainer(callback, **options)
    run.fit(module, data(), data())
    reached = callback.pruner.sparsity
    assert reached == pytest.approx(0.5, abs=0.1) or callback.warnings
    assert not any(bool(w.any()) for w in pruned_weights(module, callback))
    if not WAYS[way].get("fast_dev_run") and name != "rewinding":
        assert reached > 0.4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"max_steps": 0}], ids=str
)
def test_a_run_without_a_step_changes_nothing(name, options, tmp_path):
    module, callback = Toy(), MAKE[name]()
    before = [p.clone() for p in module.parameters()]
    run = trainer(callback, **{"enable_checkpointing": False, "default_root_dir": tmp_path} | options)
    try:
        run.fit(module, data(), data())
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    assert said == "" or "`max_epochs`" in said or "`window`" in said
    assert all((a == b).all() for a, b in zip(before, module.parameters(), strict=True))
