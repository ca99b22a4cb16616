"""Two real processes over gloo: masks, weights and reports are the same on each rank, and a resume is exact."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune.model.history import read_record
from lightning_prune.report.storage import load
from tests.callbacks.ddp_run import CASES, SMALLER


@pytest.fixture(scope="module")
def folder(tmp_path_factory, root, subprocess_env):
    out = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_run.py")
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    done = subprocess.run(
        [*launcher, str(script), str(out)],
        cwd=root,
        env=subprocess_env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


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


def test_one_report_is_written(folder):
    report = load(folder / "wanda" / "report.json")
    assert report.updates[-1].achieved == state(folder, "wanda", 1)["updates"][-1]["achieved"]


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
