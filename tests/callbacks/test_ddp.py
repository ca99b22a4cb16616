"""Two and four real processes over gloo: masks, weights and reports are the same on each, and a resume is exact."""

import pytest
import torch
from torch.nn import functional as F

from lightning_prune import Local, prune
from lightning_prune.core.masks import unpack
from lightning_prune.model.history import read_record
from lightning_prune.report.storage import load
from tests.callbacks.ddp_run import CASES, KINDS, SMALLER, SOLVERS, features, run, statistics_of
from tests.callbacks.toy import Toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory, launch):
    out = tmp_path_factory.mktemp("ddp")
    run("magnitude", out / "one")
    launch("ddp_run.py", out)
    return out


@pytest.fixture(scope="module")
def four(folder, launch):
    launch("ddp_run.py", folder, num_processes=4)
    return folder / "four"


def state(folder, case, rank, kind="whole"):
    return torch.load(folder / f"{case}-{kind}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree(folder, case):
    first, second = state(folder, case, 0), state(folder, case, 1)
    assert all(torch.equal(first["masks"][name], mask) for name, mask in second["masks"].items())
    assert all(
        torch.equal(first["weights"][n], w) for n, w in second["weights"].items() if "running" not in n
    )
    assert first["updates"] == second["updates"] and first["updates"][-1]["progress"] == 1.0
    kept = sum(int(m.sum()) for m in first["masks"].values())
    assert 1 - kept / sum(m.numel() for m in first["masks"].values()) == pytest.approx(0.7, abs=0.05)


def test_a_guard_goes_by_what_the_first_process_measures(folder):
    """The second measures no collapse; masks are the same all the same, and the head has kept its half."""
    for rank in (0, 1):
        found = state(folder, "guard", rank)
        assert found["masks"]["head.weight"].float().mean() >= 0.5
        achieved = [update["achieved"] for update in found["updates"]]
        assert achieved != sorted(achieved)  # some were undone


def test_one_report_is_written_and_all_ranks_have_it(folder):
    text = (folder / "wanda" / "report.json").read_text()
    assert load(folder / "wanda" / "report.json").updates[-1].step == 6
    assert all(state(folder, "wanda", rank)["report"] == text for rank in (0, 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_masks_that_differ_end_the_run_on_all_ranks_with_the_name_of_the_layer(folder, rank):
    message = (folder / f"drifting-{rank}.txt").read_text()
    expected = "ValueError: `masks` are the same on all processes, but ranks 0 and 1 differ in `body.4.weight`. A crit"
    assert message.startswith(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_all_examples_however_uneven_the_batches(folder, kind):
    """Batches of 8 and 5 on one rank, of 3 on the other; a second layer is run on the first rank alone."""
    expected = statistics_of(kind, [*features(0), *features(1)])
    for rank in (0, 1):
        found = torch.load(folder / f"uneven-{rank}.pt", weights_only=True)[kind]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_sees_the_batches_of_all_processes(folder, solver):
    """Gram matrices are summed and gradients gathered: it solves as one process with the batches of both."""
    first, second = (torch.load(folder / f"{solver}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["batches"]) == len(second["batches"]) == 2
    assert not torch.equal(first["batches"][0][0], second["batches"][0][0])
    model = Toy()
    model.load_state_dict(first["before"])
    masks = prune(
        model,
        0.5,
        scope=Local(),
        solver=SOLVERS[solver],
        batches=[*first["batches"], *second["batches"]],
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
    )
    for name, mask in masks.items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert torch.equal(mask, first["masks"][name]) and torch.equal(mask, second["masks"][name])
        torch.testing.assert_close(
            model.get_parameter(name).detach(), first["weights"][name], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_goes_on_bit_for_bit_on_each_rank(folder, rank):
    whole, resumed = state(folder, "movement", rank), state(folder, "movement", rank, "resumed")
    different = [n for n, w in whole["weights"].items() if not torch.equal(w, resumed["weights"][n])]
    assert not [
        n for n in different if "running" not in n or rank == 0
    ]  # batch-norm buffers are saved by rank 0
    assert whole["updates"] == resumed["updates"]


@pytest.mark.parametrize("case", [*SMALLER, "once"])
def test_ranks_agree_on_what_becomes_smaller(folder, case):
    """Their data differ, so equal weights at the end mean that gradients were averaged after the shrink as before.

    What a latency asks of so small a network is the machine's to say; the ranks agree on it, whatever it is.
    """
    first, second = state(folder, case, 0), state(folder, case, 1)
    assert first["slices"] == second["slices"] and first["updates"] == second["updates"]
    assert case == "latency" or bool(first["slices"]) is (case != "never")
    assert all(torch.equal(first["masks"][name], mask) for name, mask in second["masks"].items())
    different = [n for n, w in first["weights"].items() if not torch.equal(w, second["weights"][n])]
    assert all("running" in name for name in different)
    assert all(torch.equal(a, b) for a, b in zip(first["moments"], second["moments"], strict=True))
    assert case == "latency" or (len(first["weights"]["body.0.bias"]) < 16) is (case != "never")
    assert case == "once" or len({len(state(folder, "update", r)["slices"]) for r in (0, 1)}) == 1


def test_a_model_shrinks_more_than_once(folder):
    assert len(state(folder, "update", 0)["slices"]) > 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_shrinks_goes_on_bit_for_bit_on_each_rank(folder, rank):
    whole, resumed = state(folder, "update", rank), state(folder, "update", rank, "resumed")
    different = [n for n, w in whole["weights"].items() if not torch.equal(w, resumed["weights"][n])]
    assert not [n for n in different if "running" not in n or rank == 0]
    assert whole["updates"] == resumed["updates"] and whole["slices"] == resumed["slices"]


def test_checkpoints_have_the_record(folder):
    checkpoint = torch.load(folder / "once" / "pruned.ckpt", weights_only=True)
    assert [dict(p.slices) for p in read_record(checkpoint)] == state(folder, "once", 1)["slices"]


def check_goes_on(before, first, last):
    """The masks of a checkpoint are those that the resumed run starts from, and it ends where it should."""
    assert first.keys() == before.keys()
    assert all(torch.equal(first[name], unpack(name, packed)) for name, packed in before.items())
    assert all(not (mask & ~first[name]).any() for name, mask in last["masks"].items())
    assert last["updates"][-1]["achieved"] == pytest.approx(0.7, abs=0.01)


def saved_masks(path):
    checkpoint = torch.load(path, weights_only=True)
    return next(s for key, s in checkpoint["callbacks"].items() if "TrainTime" in key)["pruner"]["masks"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(folder):
    path = folder / "magnitude" / "step=5.ckpt"
    run("magnitude", folder / "to_one", path)
    found = state(folder / "to_one", "magnitude", 0, "resumed")
    check_goes_on(saved_masks(path), found["first"], found)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_of_one_process_goes_on_on_two_ranks(folder, rank):
    found = state(folder / "from_one", "magnitude", rank, "resumed")
    check_goes_on(saved_masks(folder / "one" / "magnitude" / "step=5.ckpt"), found["first"], found)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_agree(four, case):
    first, *others = (state(four, case, rank) for rank in range(4))
    for other in others:
        assert all(torch.equal(first["masks"][name], mask) for name, mask in other["masks"].items())
        weights = {name: w for name, w in other["weights"].items() if "running" not in name}
        assert all(torch.equal(first["weights"][name], w) for name, w in weights.items())
        assert first["updates"] == other["updates"] and first["report"] == other["report"]


@pytest.mark.slow
def test_random_masks_do_not_depend_on_the_number_of_ranks(folder, four):
    two, many = state(folder, "random", 1)["masks"], state(four, "random", 3)["masks"]
    assert all(torch.equal(two[name], mask) for name, mask in many.items())


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_run_of_four_goes_on_bit_for_bit(four, rank):
    """DDP does not rebuild its buckets here; else it would add up four gradients in another order after a resume."""
    whole, resumed = state(four, "movement", rank), state(four, "movement", rank, "resumed")
    different = [n for n, w in whole["weights"].items() if not torch.equal(w, resumed["weights"][n])]
    assert not [n for n in different if "running" not in n or rank == 0]
    assert whole["updates"] == resumed["updates"]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "rank"), [("one", 0), ("two", 3)])
def test_checkpoints_of_fewer_ranks_go_on_on_four(folder, four, source, rank):
    path = (folder / "one" if source == "one" else folder) / "magnitude" / "step=2.ckpt"
    found = state(four / f"from_{source}", "magnitude", rank, "resumed")
    check_goes_on(saved_masks(path), found["first"], found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_a_checkpoint_of_four_ranks_goes_on_in_one_process(four):
    path = four / "magnitude" / "step=1.ckpt"
    run("magnitude", four / "to_one", path)
    found = state(four / "to_one", "magnitude", 0, "resumed")
    check_goes_on(saved_masks(path), found["first"], found)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_other_batches_run_on_other_ranks_follows(folder, rank):
    weights = state(folder, "tasks", rank)["weights"]
    assert weights["head.weight"].shape == weights["other.weight"].shape
    assert weights["other.weight"].shape[1] == len(weights["body.4.bias"]) < 8
