"""What a solver is done with outlives it: a solution that was cut off goes on, and ends as the whole one would."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_prune import Local, Magnitude, NofM, SparseGPT, WoodFisher
from lightning_prune.core.recipe import Recipe
from lightning_prune.model.layerwise import solve_
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.solved import Solved, key_of

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
        Solved(folder, key_of(pruner, {"solver": str(solver)}, batches), is_wanted=wanted) if folder else None
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
        done=done,
    )
    pruner.apply_()
    return pruner, done


@pytest.mark.parametrize("solver", [SparseGPT(), WoodFisher()], ids=str)
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_what_is_cut_off_goes_on_and_ends_as_the_whole(tmp_path, stop_after, solver):
    whole, _ = solve(network(), solver=solver)
    with pytest.raises(KeyboardInterrupt):
        solve(network(), tmp_path / "solved", stop_after=stop_after, solver=solver)
    files = list((tmp_path / "solved").glob("*.pt"))
    assert len(files) == stop_after
    times = {file: file.stat().st_mtime_ns for file in files}
    rest, done = solve(network(), tmp_path / "solved", solver=solver, wanted=True)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())  # none was solved again
    for name, parameter in whole.targets.items():
        assert torch.equal(parameter, rest.targets[name]) and torch.equal(whole.masks[name], rest.masks[name])
    done.finish()
    assert not (tmp_path / "solved").exists()


@pytest.mark.parametrize("what", ["weights", "sparsity", "data", "words"])
def test_layers_of_something_else_are_not_taken(tmp_path, what):
    folder = tmp_path / "solved"
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
    with pytest.raises(ValueError, match=r"`solved` is a folder .* is of another model, recipe or data"):
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
