"""A disk that is full within a write: what was there is still there, and nothing half-written takes its place."""

import json
import os
import resource
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import AtomicCheckpointIO, PostTrainingPruning, TrainTimePruning
from lightning_prune.cli import analysis
from lightning_prune.model.whole import check_whole
from lightning_prune.report import render, storage
from lightning_prune.report.data import Report
from tests.callbacks.toy import Toy, data, trainer

ROOM = 10_000  # bytes, less than a checkpoint


def on_a_full_disk(function, room=ROOM):
    """Run in a process in which no file may grow beyond `room`; returns what it raised."""
    receive, send = os.pipe()
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        said = "nothing"
        try:
            function()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(send, said.encode()[:5000])
            os._exit(0)
    os.close(send)
    os.waitpid(pid, 0)
    with os.fdopen(receive) as pipe:
        return pipe.read()


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(10)}}, path)
    said = on_a_full_disk(lambda: io.save_checkpoint({"state_dict": {"w": torch.ones(10_000)}}, path))
    assert said == f"OSError: [Errno 27] File too large: '{path}'"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.equal(io.load_checkpoint(path, weights_only=True)["state_dict"]["w"], torch.ones(10))


def test_what_a_killed_run_has_left_goes_with_the_next_write(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    (tmp_path / ".last.ckpt.99999.tmp").write_bytes(b"half")
    io.save_checkpoint({"state_dict": {}}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_on_a_full_disk_stops_and_its_last_checkpoint_is_good(tmp_path):
    def fit(max_epochs):
        saving = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        run = trainer(
            TrainTimePruning(0.5, report=False), saving, max_epochs=max_epochs, plugins=[AtomicCheckpointIO()]
        )
        path = tmp_path / "last.ckpt"
        run.fit(Toy(), data(), data(), ckpt_path=path if path.exists() else None, weights_only=True)

    fit(1)
    before = (tmp_path / "last.ckpt").read_bytes()
    assert "File too large" in on_a_full_disk(lambda: fit(2))
    assert (tmp_path / "last.ckpt").read_bytes() == before
    check_whole(tmp_path / "last.ckpt")


class Loaders(L.LightningDataModule):
    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data()


def test_a_pruned_checkpoint_after_training_too(tmp_path):
    callback, run = PostTrainingPruning(0.5, report=False), trainer(default_root_dir=tmp_path)
    run.strategy.checkpoint_io = AtomicCheckpointIO()
    said = on_a_full_disk(lambda: callback.run(run, Toy(), Loaders()), room=1000)
    assert "File too large" in said and not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("room", [0, 300])
def test_a_report_is_written_whole_or_not_at_all(room, tmp_path):
    old = Report(kind="none", warnings=("old",))
    render.write(old, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    new = Report(kind="none", warnings=("new" * 1000,))
    assert "File too large" in on_a_full_disk(lambda: render.write(new, tmp_path), room)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert storage.load(tmp_path / "report.json") == old


def test_curves_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sensitivity.json"
    analysis._write(path, "val/loss", "min", {"a": {0.0: 1.0}})
    before = path.read_bytes()
    many = {f"layer{i}": {0.0: 1.0} for i in range(500)}
    assert "File too large" in on_a_full_disk(lambda: analysis._write(path, "val/loss", "min", many), 1000)
    assert path.read_bytes() == before and json.loads(before)["curves"] == {"a": {"0.0": 1.0}}


def test_a_file_that_is_cut_off_anywhere_is_no_checkpoint(tmp_path):
    torch.save({"w": torch.ones(100)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        with pytest.raises(ValueError, match="which is damaged"):
            check_whole(tmp_path / "cut.pt")
