"""Each recipe of `conf/pruning`, found in the folder: a run that goes on from its middle ends as the whole one does."""

from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from lightning_prune.examples.networks import _Block
from lightning_prune.model import latency
from lightning_prune.model.history import plans_of
from tests.callbacks.toy import Toy, data, trainer
from tests.hydra_runs import composed, options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:`blocks.*stays whole"),
]
RECIPES = [name for name in options("pruning") if name != "none"]
FEWER = {"num_rounds": 3, "num_calibration_batches": 2, "num_levels": 2}
"""What would take long: smaller numbers of it."""
FITTING = {
    "network_slimming": ["pruning.include=[network.body]"],  # the channels with a batch norm behind them
    "latency_budget": ["pruning.budget.tolerance=0.9"],  # so small a network hardly gets faster
}


class Network(nn.Module):
    """Something for every recipe: batch norm, residual blocks one after the other, attention heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
        self.first, self.second = nn.Linear(32, 16), nn.Linear(32, 16)
        self.blocks = nn.Sequential(*(_Block(16, num_heads=4) for _ in range(4)))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.body(x)
        return self.head(self.blocks(torch.stack([self.first(hidden), self.second(hidden)], 1)).mean(1))


class Module(Toy):
    def __init__(self):
        super().__init__()
        del self.body, self.head
        self.network = Network()

    def forward(self, x):
        return self.network(x)


@cache
def settings_of(recipe):
    pruning = composed(f"pruning={recipe}", *FITTING.get(recipe, [])).callbacks.pruning
    pruning.report = False
    for name, number in FEWER.items():
        if name in pruning:
            pruning[name] = min(number, pruning[name])
    return pruning


def build(recipe):
    return instantiate(settings_of(recipe))


def fit(recipe, folder, ckpt_path=None, seed=7):
    callback, saving = build(recipe), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    fitted = trainer(callback, saving, max_epochs=2 if hasattr(callback, "levels") else 4)
    torch.manual_seed(0)
    module = Module()
    torch.manual_seed(seed)
    fitted.fit(module, data(shuffle=True), data(), ckpt_path=ckpt_path, weights_only=True)
    return everything(fitted, module, callback)


def everything(fitted, module, callback):
    """All that a run has become: weights, buffers, optimizers, what was cut, and the whole state of the callback."""
    found = {
        "module": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in fitted.optimizers],
        "callback": callback.state_dict(),
        "plans": [(plan.shapes, plan.slices) for plan in plans_of(module)],
        "metrics": {name: float(value) for name, value in fitted.callback_metrics.items()},
        "random": torch.get_rng_state(),
    }
    for pruner in [state for key, state in found["callback"].items() if key == "pruner"]:
        pruner.pop(
            "plans", None
        )  # they are there already, and their error is that of the batch that measured it
    leaves, _ = tree_flatten_with_path(found)
    return {str(path): leaf for path, leaf in leaves}


def is_same(first, second):
    return torch.equal(first, second) if torch.is_tensor(first) else first == second


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_goes_on_bit_for_bit(recipe, tmp_path, monkeypatch):
    """Within an epoch, in the middle of the run; with another seed, so that nothing comes out equal by chance."""
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    whole = fit(recipe, tmp_path)
    last = max(int(path.stem.split("=")[1]) for path in tmp_path.glob("step=*.ckpt"))
    resumed = fit(recipe, tmp_path / "resumed", tmp_path / f"step={last // 2 + 3}.ckpt", seed=8)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not is_same(whole[name], resumed[name])] == []
