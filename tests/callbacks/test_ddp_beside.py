"""Two real processes over gloo, with what else a run may have: teachers, averages, penalties, accumulated gradients."""

from functools import reduce

import pytest
import torch

from lightning_prune import load_pruned
from lightning_prune.model.history import read_record
from tests.callbacks.ddp_beside_run import (
    ACCUMULATED,
    AVERAGED,
    CASES,
    DECAY,
    LATER,
    MIDDLE,
    run,
    run_accumulated,
)
from tests.callbacks.toy import Toy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, launch):
    out = tmp_path_factory.mktemp("beside")
    launch("ddp_beside_run.py", out, "two")
    for case in ACCUMULATED:
        run_accumulated(case, out)
    return out


@pytest.fixture(scope="module")
def again(folder, launch):
    """On one process from what two have written, and on two from what that one has written."""
    run("update", folder / "to_one", folder / "update" / f"step={MIDDLE}.ckpt")
    launch("ddp_beside_run.py", folder, "again")
    return folder


def state(folder, case, rank, kind="whole"):
    path = folder / f"{case}-{kind}"
    more = torch.load(f"{path}-more-{rank}.pt", weights_only=True)
    return torch.load(f"{path}-{rank}.pt", weights_only=True) | more


def assert_same(first, second, but=()):
    for kind in ("masks", "weights"):
        assert first[kind].keys() == second[kind].keys()
        different = [n for n, t in first[kind].items() if not torch.equal(t, second[kind][n])]
        assert [name for name in different if not any(word in name for word in but)] == []
    assert all(torch.equal(a, b) for a, b in zip(first["moments"], second["moments"], strict=True))
    assert first["updates"] == second["updates"] and first["slices"] == second["slices"]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_though_their_data_differ(folder, case):
    first, second = state(folder, case, 0), state(folder, case, 1)
    assert first["loss"] != second["loss"]
    assert_same(first, second, but=["running"])
    for ours, theirs in zip(first["averages"], second["averages"], strict=True):
        assert all(torch.equal(average, theirs[name]) for name, average in ours.items())
    assert first["updates"][-1]["achieved"] == pytest.approx(0.7, abs=0.05)
    assert bool(first["slices"]) is ("granularity" in CASES[case])
    for name, mask in first["masks"].items():
        assert not first["weights"][name][~mask].any()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_bit_for_bit(folder, case, rank):
    whole, resumed = state(folder, case, rank), state(folder, case, rank, "resumed")
    assert_same(whole, resumed, but=["running"] if rank else [])  # those of batch norms are saved by rank 0
    assert whole["loss"] == resumed["loss"]
    for ours, theirs in zip(whole["averages"], resumed["averages"], strict=True):
        assert all(torch.equal(average, theirs[name]) for name, average in ours.items())


def test_ranks_agree_on_an_average_that_one_of_them_keeps(folder):
    first, second = (torch.load(folder / f"by-one-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second and any(name.startswith("ema.") for slices in first for name in slices)


def mean(case, snapshots):
    """Return what Lightning's averages are by their definitions, of weights that were cut to the last size."""
    if case.startswith("ema"):
        return reduce(lambda average, weight: DECAY * average + (1 - DECAY) * weight, snapshots)
    return torch.stack(snapshots[1:3]).mean(
        0
    )  # SWA begins with the second epoch; the fourth is for batch norms


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", AVERAGED)
def test_averages_are_those_of_the_weights_that_are_left(folder, case, rank):
    found = state(folder, case, rank)
    assert len(found["snapshots"]) == (12 if case.startswith("ema") else 4) and found["averages"]
    for name, weight in found["averages"][0].items():
        expected = mean(case, [snapshot[name] for snapshot in found["snapshots"]])
        expected = expected * found["masks"].get(name, 1.0)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["weights"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ACCUMULATED)
def test_masks_of_accumulated_gradients_are_those_of_one_process(folder, case, rank):
    """On the same batches, halved; gradients are averaged in another order, so weights agree to rounding."""
    expected = torch.load(folder / f"{case}-wholes-0.pt", weights_only=True)
    found = torch.load(folder / f"{case}-halves-{rank}.pt", weights_only=True)
    assert len(found["updates"]) > 2 and found["updates"] == expected["updates"]
    for name, mask in expected["masks"].items():
        assert torch.equal(found["masks"][name], mask)
        torch.testing.assert_close(found["weights"][name], expected["weights"][name], rtol=1e-5, atol=1e-6)


def check_goes_on(path, found):
    """A run starts with the weights, moments and masks of a smaller checkpoint, and ends as small as it should."""
    checkpoint = torch.load(path, weights_only=True)
    record = [dict(plan.slices) for plan in read_record(checkpoint)]
    assert record and found["slices"][: len(record)] == record and len(found["slices"]) > len(record)
    weights = load_pruned(Toy, path).state_dict()
    assert len(weights["body.0.bias"]) < 16
    moments = [own["exp_avg"] for own in checkpoint["optimizer_states"][0]["state"].values()]
    assert all(torch.equal(found["start"]["weights"][name], weight) for name, weight in weights.items())
    assert all(torch.equal(a, b) for a, b in zip(found["start"]["moments"], moments, strict=True))
    assert found["updates"][-1]["progress"] == 1.0
    assert found["updates"][-1]["achieved"] == pytest.approx(0.7, abs=0.05)


def test_a_smaller_checkpoint_of_two_ranks_goes_on_in_one_process(again):
    check_goes_on(again / "update" / f"step={MIDDLE}.ckpt", state(again / "to_one", "update", 0, "resumed"))


def test_and_that_goes_on_on_two_ranks(again):
    first, second = (state(again / "again", "update", rank, "resumed") for rank in (0, 1))
    assert_same(first, second, but=["running"])
    assert first["loss"] != second["loss"]
    for found in (first, second):
        check_goes_on(again / "to_one" / "update" / f"step={LATER}.ckpt", found)
