"""Sharded weights (FSDP2, tensor parallelism): bit for bit what DDP makes of the same run, on two and four processes.

Whole tensors are put together here, and in no run that goes by rows.
"""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_prune import (
    Channel,
    InitialPruning,
    PostTrainingPruning,
    SparseTraining,
    TopKAST,
    TrainTimePruning,
    Wanda,
    WeightRewinding,
    load_pruned,
)
from lightning_prune.callbacks.strategies import check_strategy
from tests.callbacks.sharded_run import BY_ROWS, CASES, CUT, Net, run

AS_ONE = ("local", "rigl", "rigl-mean")
"""Cases whose gradients choose the masks: those of all processes together."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, launch):
    out = tmp_path_factory.mktemp("sharded")
    for case in AS_ONE:
        run(case, "one", out)
    for case in ("local", *CUT):
        run(case, "even", out)
    launch("sharded_run.py", out)
    return out


@pytest.fixture(scope="module")
def four(folder, launch):
    launch("sharded_run.py", folder, num_processes=4)
    return folder / "four"


def states(folder, name, num=2):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(num)]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], t) for n, t in second.items())


@pytest.mark.parametrize("case", CASES)
def test_masks_weights_and_moments_are_those_of_ddp(folder, case):
    expected = states(folder, f"{case}-ddp")[0]
    for found in states(folder, f"{case}-sharded"):
        assert same(found["masks"], expected["masks"])
        assert same(found["weights"], expected["weights"]) and same(found["moments"], expected["moments"])
        assert found["updates"] == expected["updates"] and len(found["updates"]) > 2
        assert found["leaks"] == 0 and found["by_rows"] is (case in BY_ROWS or case == "ste")
        kept = {name: mask for name, mask in found["masks"].items() if not mask.all()}
        assert kept and not any(found["weights"][name][~mask].any() for name, mask in kept.items())


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
@pytest.mark.parametrize("case", AS_ONE)
def test_masks_are_those_of_one_process(folder, case, kind):
    """On the same batches, halved; gradients are averaged in another order, so weights agree to rounding."""
    (expected,) = states(folder, f"{case}-one", 1)
    for found in states(folder, f"{case}-{kind}"):
        assert same(found["masks"], expected["masks"]) and found["updates"] == expected["updates"]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)
    assert case == "local" or not same(expected["masks"], expected["first"])


def test_the_report_counts_all_parts(folder):
    expected, found = states(folder, "defaults-ddp")[0], states(folder, "defaults-sharded")
    assert found[0]["nonzeros"] == found[1]["nonzeros"] == expected["nonzeros"]
    text = (folder / "defaults-sharded" / "report.md").read_text()
    assert "the weights are spread over processes" in text


def test_a_checkpoint_before_the_first_step_counts_as_no_step(folder):
    """Adam counts the step that torch takes to have a state, so that weights differ; the ramp must not."""
    expected, found = states(folder, "wanda-sharded")[0], states(folder, "early-sharded")[0]
    assert [u["step"] for u in found["updates"]] == [u["step"] for u in expected["updates"]] and not found[
        "leaks"
    ]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_resumed_run_goes_on_bit_for_bit(folder, kind):
    whole, resumed = states(folder, f"local-{kind}"), states(folder, f"local-{kind}-resumed")
    for expected, found in zip(whole, resumed, strict=True):
        assert same(found["masks"], expected["masks"]) and same(found["weights"], expected["weights"])
        assert same(found["moments"], expected["moments"]) and found["updates"] == expected["updates"]
        assert found["leaks"] == 0 and found["first"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_a_full_checkpoint_goes_on_in_one_process(folder):
    path = folder / "local-full" / "step=5.ckpt"
    run("local", "one", folder / "from_full", path)
    (found,) = states(folder / "from_full", "local-one-resumed", 1)
    assert same(found["first"], states(folder, "local-sharded-resumed")[0]["first"])
    assert same(found["masks"], states(folder, "local-sharded")[0]["masks"])


def test_a_sharded_checkpoint_goes_on_in_one_process(folder, launch):
    launch("sharded_run.py", folder, num_processes=1)
    (found,) = states(folder / "alone", "local-sharded-resumed", 1)
    whole = states(folder, "local-sharded")[0]
    assert same(found["first"], states(folder, "local-sharded-resumed")[0]["first"])
    assert (
        same(found["masks"], whole["masks"]) and found["updates"] == whole["updates"] and not found["leaks"]
    )
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)


def test_a_folder_of_shards_is_refused_where_a_file_is_read(folder):
    shards = folder / "local-sharded" / "step=5.ckpt"
    for read in (lambda: load_pruned(Net, shards), lambda: run("local", "one", folder / "no", shards)):
        with pytest.raises(ValueError, match=r"`path` is a file .* got the folder .*step=5.ckpt.*strategy"):
            read()


def test_tensor_parallel_weights_are_put_together(folder):
    (expected,) = states(folder, "local-even", 1)
    for found in states(folder, "local-tensor"):
        assert same(found["masks"], expected["masks"]) and found["leaks"] == 0 and not found["by_rows"]


@pytest.mark.parametrize("case", CUT)
def test_what_tensor_parallelism_cuts_is_pruned_as_in_one_process(folder, case):
    (expected,) = states(folder, f"{case}-even", 1)
    for found in states(folder, f"{case}-tensor"):
        assert same(found["masks"], expected["masks"]) and found["leaks"] == 0 and not found["by_rows"]
        assert found["updates"] == expected["updates"] and len(found["updates"]) > 2
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)
    assert not all(mask.all() for mask in expected["masks"].values())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_processes_one_of_them_without_a_row(four, case):
    """Gradients of four are added up in another order than by DDP, so weights agree to rounding."""
    expected, found = states(four, f"{case}-ddp", 4)[0], states(four, f"{case}-sharded", 4)
    assert same(found[3]["masks"], expected["masks"]) and found[0]["updates"] == expected["updates"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found[3]["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert all(rank["leaks"] == 0 for rank in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_of_two_goes_on_on_four(folder, four, kind):
    found = states(four, f"local-{kind}-resumed", 4)
    assert same(found[3]["first"], states(folder, "local-sharded-resumed")[0]["first"])
    assert same(found[3]["masks"], states(folder, "local-sharded")[0]["masks"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_of_four_goes_on_on_two(folder, four, launch, kind):
    if not (folder / "two").is_dir():
        launch("sharded_run.py", folder, "again")
    whole = states(folder, "local-sharded")[0]
    for found in states(folder / "two", f"local-{kind}-resumed"):
        assert same(found["masks"], whole["masks"]) and found["first"] and found["leaks"] == 0
        assert found["updates"] == whole["updates"]
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sharded_along_two_dims_of_the_mesh(folder, four):
    (expected,) = states(folder, "local-even", 1)
    found = states(four, "local-both", 4)
    assert same(found[2]["masks"], expected["masks"]) and found[2]["leaks"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["local", "lamp"])
def test_sharded_in_each_half_with_copies_in_the_other(four, case):
    """HSDP: by rows, and put together; counts of copies are no counts of more weights."""
    expected, *_ = states(four, f"{case}-ddp", 4)
    found = states(four, f"{case}-hybrid", 4)
    for state in found:
        assert same(state["masks"], expected["masks"]) and state["leaks"] == 0
        assert state["updates"] == expected["updates"] and state["by_rows"] is (case == "local")
        assert same(state["weights"], found[0]["weights"])


@pytest.mark.parametrize(
    ("strategy", "callback", "message"),
    [
        (
            FSDPStrategy(accelerator=None),
            TrainTimePruning(0.5),
            "`strategy` is one under .* but got FSDPStrategy, which",
        ),
        (
            ModelParallelStrategy(),
            InitialPruning(0.5),
            "whole weights on each process for InitialPruning .* Use strat",
        ),
        (
            ModelParallelStrategy(),
            PostTrainingPruning(0.5),
            "whole weights on each process for PostTrainingPruning",
        ),
        (ModelParallelStrategy(), WeightRewinding(0.5), "whole weights on each process for WeightRewinding"),
        (
            ModelParallelStrategy(),
            TrainTimePruning(0.5, masking=TopKAST()),
            "`masking` turns each .* but got TopKAST",
        ),
        (
            ModelParallelStrategy(),
            TrainTimePruning(0.5, granularity=Channel(), shrink="never"),
            "`granularity` is one of single tensors under ModelParallelStrategy, .* but got Channel",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_advice(strategy, callback, message):
    with pytest.raises(ValueError, match=message):
        check_strategy(strategy, callback)


@pytest.mark.parametrize("callback", [TrainTimePruning(0.5), SparseTraining(0.5)])
def test_what_can_be_done_is_not_refused(callback):
    check_strategy(ModelParallelStrategy(), callback)


def test_activations_are_refused_under_tensor_parallelism():
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(
        ValueError, match=r"`criterion` reads weights or gradients under tensor parallelism, .* got Wanda"
    ):
        check_strategy(strategy, TrainTimePruning(0.5, criterion=Wanda()))
