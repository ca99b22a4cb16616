"""Whatever lies in a file that is read, nothing of it runs: files that would run code say so, and the rest is data."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch

from lightning_prune import (
    AtomicCheckpointIO,
    Channel,
    Distillation,
    PostTrainingPruning,
    TrainTimePruning,
    load_pruned,
    load_weights_,
    shrink,
)
from lightning_prune.model.export.files import ENTRY
from lightning_prune.model.history import KEY
from lightning_prune.model.record import shrink_to_
from lightning_prune.model.unfinished import Unfinished
from lightning_prune.model.whole import read_checkpoint
from lightning_prune.report import storage
from lightning_prune.sweep.notes import held_jobs
from lightning_prune.sweep.rows import read_jobs
from tests.callbacks.toy import Toy, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


class Bomb:
    """Touches a file when it is unpickled, as any other call could be made."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "it_ran"


def checkpoint_with(bomb, where):
    """A checkpoint that fits the toy, but for what lies at one place of it."""
    module = Toy()
    run = trainer(TrainTimePruning(0.5, report=False), max_epochs=1)
    run.fit(module, data(), data())
    found = run._checkpoint_connector.dump_checkpoint()
    if where == "weights":
        found["state_dict"]["head.bias"] = bomb
    elif where == "callback":
        found["callbacks"]["TrainTimePruning"]["pruner"] = bomb
    elif where == "record":
        found[KEY] = bomb
    else:
        found["hyper_parameters"] = {"lr": bomb}
    return found


READ = {
    "fit": lambda path: trainer(TrainTimePruning(0.5, report=False)).fit(
        Toy(), data(), data(), ckpt_path=path, weights_only=True
    ),
    "fit, whole files": lambda path: trainer(
        TrainTimePruning(0.5, report=False), plugins=[AtomicCheckpointIO()]
    ).fit(Toy(), data(), data(), ckpt_path=path, weights_only=True),
    "load_pruned": lambda path: load_pruned(Toy, path),
    "teacher": lambda path: trainer(Distillation(teacher=path)).fit(Toy(), data(), data()),
    "after training": lambda path: PostTrainingPruning(0.5, report=False).run(
        trainer(), Toy(), _Data(), ckpt_path=path
    ),
    "commands": read_checkpoint,
}


def _Data():  # noqa: N802
    import lightning as L

    return L.LightningDataModule.from_datasets(data().dataset, data().dataset, batch_size=8)


@pytest.mark.parametrize("how", READ)
def test_a_checkpoint_that_would_run_code_is_refused(how, place, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what some set to read old files
    where = ("weights", "callback", "record", "arguments")[list(READ).index(how) % 4]
    torch.save(checkpoint_with(Bomb(place), where), path := tmp_path / "evil.ckpt")
    with pytest.raises((ValueError, pickle.UnpicklingError), match="more than that|[Ww]eights.only"):
        READ[how](path)
    assert not place.exists()
    torch.load(path, weights_only=False)
    assert place.exists()  # it would have run


def test_other_files_that_would_run_code_are_refused(place, tmp_path):
    evil = pickle.dumps(Bomb(place))
    for name in ("evil.safetensors", "evil.json"):
        (tmp_path / name).write_bytes(evil)
    with pytest.raises(ValueError, match="cut short or damaged"):
        load_weights_(Toy(), tmp_path / "evil.safetensors")
    with pytest.raises(ValueError, match=r"evil.json"):
        storage.load(tmp_path / "evil.json")
    module = Toy()
    held = Unfinished(tmp_path / "unfinished", "key")
    held.write("head.weight", {"weight": module.head.weight, "mask": Bomb(place)})
    with pytest.raises(pickle.UnpicklingError):
        held.read("head.weight")
    assert not place.exists()


def targets(place):
    """What Hydra would call if anything were instantiated."""
    return {
        "_target_": "pathlib.Path.touch",
        "_args_": [{"_target_": "pathlib.Path", "_args_": [str(place)]}],
    }


def test_a_target_in_a_checkpoint_or_a_report_stays_data(place, tmp_path):
    found = checkpoint_with(targets(place), "record")
    with pytest.raises(ValueError, match="no pruning record"):
        shrink_to_(Toy(), found)
    found["callbacks"]["TrainTimePruning"]["nouns"]["criterion"] = targets(place)
    del found["callbacks"]["TrainTimePruning"]["checksum"]
    found.pop(KEY)
    torch.save(found, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="`criterion` was {'_target_': .* in the run that is resumed"):
        READ["fit"](tmp_path / "a.ckpt")
    report = json.loads(storage.to_json(storage.from_json(_report(config=json.dumps(targets(place))))))
    assert "_target_" in report["config"] and not place.exists()


def _report(**fields):
    from lightning_prune.report.data import Report

    return storage.to_json(Report(kind="none", **fields))


def test_a_target_among_the_arguments_of_a_file_stays_data(place, tmp_path):
    pytest.importorskip("safetensors")
    import lightning as L

    from lightning_prune import export_weights

    class Lit(L.LightningModule):
        def __init__(self, options=None):
            super().__init__()
            self.save_hyperparameters()
            self.options, self.head = options, torch.nn.Linear(4, 2)

    export_weights(Lit(targets(place)), path := tmp_path / "model.safetensors")
    assert load_pruned(Lit, path).options == targets(place) and ENTRY in path.read_bytes().decode("latin1")
    assert not place.exists()


YAML = "- !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]\n"


def test_notes_of_a_sweep_stay_data(place, tmp_path):
    note = tmp_path / "0" / ".hydra" / "overrides.yaml"
    note.parent.mkdir(parents=True)
    note.write_text(YAML.format(place))
    for read in (held_jobs, read_jobs):
        with pytest.raises(
            ValueError, match=r"overrides.yaml is Hydra's list of overrides, but got what cannot"
        ):
            read(tmp_path)
    note.write_text("- seed=${oc.env:HOME}\n")
    assert held_jobs(tmp_path) == {"0": ("seed=${oc.env:HOME}",)} and not place.exists()


def test_a_record_is_plain_data_through_and_through():
    """What is written holds nothing that reading it could run: text, numbers, lists and dicts."""
    shrink(module := Toy(), torch.randn(2, 8), 0.5, granularity=Channel())
    run = trainer(max_epochs=0)
    run.fit(module, data(), data())
    record = run._checkpoint_connector.dump_checkpoint()[KEY]
    assert json.loads(json.dumps(record)) == record
    torch.save(record, file := io.BytesIO())
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True) == record
