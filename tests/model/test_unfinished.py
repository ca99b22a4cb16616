"""What is done outlives an interrupt: what was cut off goes on, and ends as the whole would."""

from __future__ import annotations

import json
import signal
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import lightning_prune.model.unfinished as unfinished_module
from lightning_prune import (
    OBD,
    ActivationVariance,
    BatchNormScale,
    Budget,
    Fisher,
    GraSP,
    Local,
    Magnitude,
    NofM,
    Saliency,
    SecondOrderTaylor,
    SparseGPT,
    Wanda,
    WoodFisher,
)
from lightning_prune.core.recipe import Recipe
from lightning_prune.graph import trace
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.calls import call_of
from lightning_prune.model.layerwise import solve_
from lightning_prune.model.prices import Measured, cost_function
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.rounds import prune_in_rounds_
from lightning_prune.model.unfinished import Unfinished, key_of

SIZES = (6, 8, 8, 8, 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(SIZES) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers)


BATCHES = [torch.rand(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def pruner_of(net: nn.Module, sparsity: float = 0.5, scope=None) -> Pruner:
    scope = scope or Local()
    pruner = Pruner(net, Recipe(None if isinstance(scope, NofM) else sparsity, Magnitude(), scope=scope))
    pruner.choose_(1.0)
    return pruner


def solve(net, folder=None, *, stop_after=None, solver=None, wanted=False, batches=BATCHES, pruner=None):
    pruner = pruner or pruner_of(net)
    done = (
        Unfinished(
            folder,
            key_of(pruner.model, pruner.masks, {"solver": str(solver)}, batches),
            is_wanted=wanted,
        )
        if folder
        else None
    )
    seen = []

    def progress(stages):
        for index, stage in enumerate(stages):
            if index == stop_after:
                raise KeyboardInterrupt
            seen.append(stage)
            yield stage

    def loss(model, batch):
        return model(batch).square().sum()

    solve_(
        pruner,
        solver or SparseGPT(),
        batches,
        forward=lambda m, b: m(b),
        loss=loss,
        progress=progress,
        unfinished=done,
    )
    pruner.apply_()
    return pruner, done


@pytest.mark.parametrize("solver", [SparseGPT(), WoodFisher()], ids=str)
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_what_is_cut_off_goes_on_and_ends_as_the_whole(tmp_path, stop_after, solver):
    whole, _ = solve(network(), solver=solver)
    with pytest.raises(KeyboardInterrupt):
        solve(network(), tmp_path / "unfinished", stop_after=stop_after, solver=solver)
    files = list((tmp_path / "unfinished").glob("*.pt"))
    assert len(files) == stop_after
    times = {file: file.stat().st_mtime_ns for file in files}
    rest, done = solve(network(), tmp_path / "unfinished", solver=solver, wanted=True)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())  # none was solved again
    for name, parameter in whole.targets.items():
        assert torch.equal(parameter, rest.targets[name]) and torch.equal(whole.masks[name], rest.masks[name])
    done.finish()
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize("what", ["weights", "sparsity", "data", "words"])
def test_layers_of_something_else_are_not_taken(tmp_path, what):
    folder = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        solve(network(), folder, stop_after=2)
    net = network()
    if what == "weights":
        net[0].bias.data += 1.0
    other = {
        "weights": {},
        "sparsity": {"pruner": pruner_of(net, 0.25)},
        "data": {"batches": BATCHES[:2]},
        "words": {"solver": SparseGPT(block_size=4)},
    }[what]
    with pytest.raises(ValueError, match=r"`unfinished` is a folder .* is of another model, recipe or data"):
        solve(net, folder, wanted=True, **other)
    solve(net, folder, **other)  # unasked, it begins anew
    assert len(list(folder.glob("*.pt"))) == len(SIZES) - 1


def test_a_folder_that_is_not_there_is_refused_and_strangers_files_stay(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        solve(network(), tmp_path / "nowhere", wanted=True)
    (tmp_path / "notes.txt").write_text("mine")
    _, done = solve(network(), tmp_path)
    done.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def normed_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8))


class Batches:
    """Some batches, of which one is interrupted in its midst, by a real SIGINT."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at, self.num_run = interrupt_at, 0

    def step(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        model[0](batch)
        if self.num_run == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        self.num_run += 1
        return model(batch).square().sum()


def calibrated(criterion, batches, folder=None, num_rounds=None, **options):
    net = normed_network()
    pruner = Pruner(net, Recipe(0.5, criterion, include=["0.weight", "3.weight"]))
    unfinished = Unfinished(folder, key_of(net, {}, {}, BATCHES)) if folder else None
    how = {"forward": batches.step, "loss": batches.step, "unfinished": unfinished}
    measure = partial(calibrate, pruner.statistics, net, BATCHES, **how)
    if num_rounds is None:
        measure()
        return pruner.statistics.sums()
    prune_in_rounds_(pruner, num_rounds, measure, unfinished=unfinished, **options)
    return {**pruner.masks, **net.state_dict()}


CRITERIA = (Wanda(), ActivationVariance(), BatchNormScale(), Fisher(), OBD(), SecondOrderTaylor(), GraSP())


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_calibration_goes_on_with_the_batch_after_the_interrupted_one(tmp_path, criterion, share):
    whole = calibrated(criterion, counting := Batches())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        calibrated(criterion, cut := Batches(interrupt_at=int(share * counting.num_run)), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    rest = calibrated(criterion, again := Batches(), tmp_path)
    assert cut.num_run + again.num_run == counting.num_run and again.num_run < counting.num_run
    assert equal(whole, rest)


@pytest.mark.parametrize("options", [{}, {"revive": True}], ids=str)
@pytest.mark.parametrize("interrupt_at", [0, 4, 8, 14])
def test_rounds_go_on_in_the_midst_of_one(tmp_path, interrupt_at, options):
    whole = calibrated(Saliency(), counting := Batches(), num_rounds=5, **options)
    with pytest.raises(KeyboardInterrupt):
        calibrated(Saliency(), cut := Batches(interrupt_at), tmp_path, num_rounds=5, **options)
    rest = calibrated(Saliency(), again := Batches(), tmp_path, num_rounds=5, **options)
    assert cut.num_run + again.num_run == counting.num_run == 15
    assert equal(whole, rest)


def test_a_second_interrupt_does_not_wait_and_leaves_no_half_of_a_batch(tmp_path):
    class Hasty(Batches):
        def step(self, model, batch):
            signal.raise_signal(signal.SIGINT)
            return super().step(model, batch)

    with pytest.raises(KeyboardInterrupt):
        calibrated(Wanda(), Hasty(interrupt_at=0), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_held_is_written_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished_module, "SECONDS", -1.0)
    calibrated(Wanda(), Batches(), tmp_path)
    found = Unfinished(tmp_path, key_of(normed_network(), {}, {}, BATCHES)).read("calibration")
    assert (found["num_passes"], found["num_batches"]) == (1, 0)


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_latencies_are_measured_once_and_forgotten_in_the_end(tmp_path):
    def search(path, stop_after=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
        couplings = trace(net, (x := torch.randn(32, 64),))
        cost_of = cost_function(Budget(latency=0.5), couplings, call_of(net, x), measured=Measured(path))
        return [cost_of({"0.weight": kept, "2.weight": 256}) for kept in (256, 64, 128)[:stop_after]]

    path = tmp_path / "latencies.json"
    first = search(path, stop_after=2)
    written = path.read_text()
    again = search(path)
    assert again[:2] == first and again[0] == 1.0 and 0 < again[2] < 1.5
    assert set(json.loads(written)) < set(json.loads(path.read_text())) and len(json.loads(written)) == 1
    Measured(path).forget()
    assert not path.exists()
