"""Pruning before training in two processes over gloo: the statistics are those of all batches of both."""

import pytest
import torch
from torch.nn import functional as F

from lightning_prune.core.criteria import required_statistics
from lightning_prune.core.recipe import Recipe
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.pruning import Pruner
from tests.callbacks.initial_ddp_run import CASES
from tests.callbacks.toy import Toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory, launch):
    out = tmp_path_factory.mktemp("ddp")
    launch("initial_ddp_run.py", out)
    return out


def states(folder, case):
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree(folder, case):
    first, second = states(folder, case)
    assert not torch.equal(first["batches"][0][0], second["batches"][0][0])
    assert first["masks"].keys() == second["masks"].keys() and first["updates"] == second["updates"]
    assert all(torch.equal(mask, second["masks"][name]) for name, mask in first["masks"].items())
    weights = {name: w for name, w in first["weights"].items() if "running" not in name}
    assert all(torch.equal(w, second["weights"][name]) for name, w in weights.items())


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("case", ["snip", "fisher", "grasp", "variance"])
def test_the_masks_are_those_of_one_process_with_the_batches_of_both(folder, case):
    found = states(folder, case)
    options = {"sparsity": 0.7, **CASES[case]}
    options.pop("num_calibration_batches", None)
    model = Toy()
    pruner = Pruner(model, Recipe(**options))
    batches = [batch for state in found for batch in state["batches"]]
    has_loss = "output_variance" not in required_statistics(options["criterion"])
    calibrate(
        pruner.statistics,
        model,
        batches,
        forward=lambda m, batch: m(batch[0]),
        loss=loss if has_loss else None,
        batch_statistics=True,
    )
    pruner.update_(1.0)
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in found[0]["masks"].items())
