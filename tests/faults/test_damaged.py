"""Checkpoints, records and reports that were cut off, changed, are newer or belong to another model are refused."""

import contextlib
import copy
import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import (
    AtomicCheckpointIO,
    Channel,
    CollapseGuard,
    Distillation,
    Fisher,
    InitialPruning,
    Magnitude,
    SparseTraining,
    TrainTimePruning,
    WeightRewinding,
    load_pruned,
)
from lightning_prune.callbacks.states import SEAL, check_seal, checksum
from lightning_prune.model.history import KEY
from lightning_prune.model.whole import check_whole, read_checkpoint
from lightning_prune.report import storage
from lightning_prune.report.data import Report
from tests.callbacks.toy import GAN, Toy, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*learning rate had fallen"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the middle of a run that masks and of one that has become smaller."""
    folder, paths = tmp_path_factory.mktemp("saved"), {}
    for name, granularity in (("masked", {}), ("small", {"granularity": Channel(), "shrink": "update"})):
        saving = ModelCheckpoint(folder, name, save_top_k=1)
        trainer(TrainTimePruning(0.5, report=False, **granularity), saving, max_epochs=2).fit(
            Toy(), data(), data()
        )
        paths[name] = folder / f"{name}.ckpt"
    return paths


def resume(path, callback=None, module=None):
    run = trainer(callback or TrainTimePruning(0.5, report=False), plugins=[AtomicCheckpointIO()])
    run.fit(module or Toy(), data(), data(), ckpt_path=path, weights_only=True)


def changed(path, tmp_path, change):
    """Write a checkpoint with a change to it, its states sealed anew."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    for state in checkpoint["callbacks"].values():
        if isinstance(state, dict) and SEAL in state:
            state[SEAL] = {name: checksum(value) for name, value in state.items() if name != SEAL}
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["cut", "bit", "bytes"]))
def test_a_file_that_is_not_what_it_was_is_noticed(seed, kind, tmp_path_factory):
    """Each tensor and all plain data: what is read is what was saved, or nothing is."""
    draw, folder = random.Random(seed), tmp_path_factory.mktemp("file")
    content = {"state_dict": {"w": torch.arange(300.0), "b": torch.arange(7)}, "epoch": 3}
    torch.save(content, folder / "a.ckpt")
    damaged = bytearray((folder / "a.ckpt").read_bytes())
    if kind == "cut":
        damaged = damaged[: draw.randrange(len(damaged))]
    else:
        for _ in range(1 if kind == "bit" else 20):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    (folder / "a.ckpt").write_bytes(damaged)
    try:
        found = read_checkpoint(folder / "a.ckpt")
    except (ValueError, RuntimeError, KeyError, OSError):
        return
    assert all(torch.equal(found["state_dict"][n], t) for n, t in content["state_dict"].items())
    assert found["epoch"] == 3


def read_plainly(path, *, how):
    """By Lightning's own plugin, which does not look whether a file is whole."""
    run = trainer(TrainTimePruning(0.5, granularity=Channel(), shrink="update", report=False))
    data_of = {"fit": (data(), data()), "validate": (data(),)}[how]
    getattr(run, how)(Toy(), *data_of, ckpt_path=path, weights_only=True)


READ = {
    "fit": lambda path: resume(path),
    "fit with a plain Trainer": lambda path: read_plainly(path, how="fit"),
    "validate with a plain Trainer": lambda path: read_plainly(path, how="validate"),
    "load_pruned": lambda path: load_pruned(Toy, path),
    "teacher": lambda path: trainer(Distillation(teacher=path)).fit(Toy(), data(), data()),
}


@pytest.mark.parametrize("how", READ)
def test_a_flipped_bit_in_a_weight_is_refused_wherever_it_is_read(how, saved, tmp_path):
    content = bytearray(saved["small"].read_bytes())
    weight = torch.load(saved["small"], weights_only=True)["state_dict"]["head.weight"]
    content[content.index(weight.numpy().tobytes()) + 3] ^= 64
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)  # torch takes it for good
    with pytest.raises(ValueError, match="which is damaged: .* has another checksum"):
        READ[how](path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="which is damaged: File is not a zip file"):
        check_whole(tmp_path / "text.ckpt")
    with pytest.raises(FileNotFoundError):
        check_whole(tmp_path / "nothing.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(
        ValueError, match="a checkpoint with a `state_dict`, but got .*list.ckpt, which holds none"
    ):
        read_checkpoint(tmp_path / "list.ckpt")


CHANGES = {
    "a newer version": (
        lambda state: state.update(version=99),
        "at most 1, but got 99: a newer lightning_prune wrote it",
    ),
    "masks of another shape": (
        lambda state: state["pruner"]["masks"]["head.weight"].update(shape=[4, 9]),
        "a mask of shape .4, 9. is stored in 5 bytes, but got 4",
    ),
    "masks cut off": (
        lambda state: state["pruner"]["masks"]["head.weight"].update(bits=torch.zeros(2, dtype=torch.uint8)),
        "is stored in 4 bytes, but got 2",
    ),
    "masks of something else": (
        lambda state: state["pruner"]["masks"].update(other=state["pruner"]["masks"].pop("head.weight")),
        "belong to the pruned weights, .* but got some for other",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_was_changed_is_refused(name, saved, tmp_path):
    change, message = CHANGES[name]
    path = changed(saved["masked"], tmp_path, lambda found: change(found["callbacks"]["TrainTimePruning"]))
    with pytest.raises(ValueError, match=message):
        resume(path)


def leaves_of(value, path=()):
    """Every place of nested data that holds no more of it, as keys in a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from leaves_of(entry, (*path, key))
    if not inner:
        yield path


def test_whatever_is_changed_in_a_state_is_noticed(tmp_path):
    saving = ModelCheckpoint(tmp_path, "whole", save_top_k=1)
    callback = TrainTimePruning(0.5, criterion=Fisher(), report=False)
    trainer(callback, saving, max_epochs=1).fit(Toy(), data(), data())
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    places = list(leaves_of(whole["callbacks"]["TrainTimePruning"]))
    assert len(places) > 40
    for *path, key in places:
        for is_gone in (False, True):
            found = copy.deepcopy(whole)
            inner = found["callbacks"]["TrainTimePruning"]
            for step in path:
                inner = inner[step]
            if is_gone:
                del inner[key]
            else:
                inner[key] = inner[key] + 1 if isinstance(inner[key], torch.Tensor) else "other"
            if path == [SEAL] and is_gone:  # an entry that others have added has none
                continue
            with pytest.raises(ValueError, match="was changed since: .* has another checksum"):
                check_seal(callback, found)
    check_seal(callback, whole)


def test_masks_that_are_missing_do_not_let_weights_grow_back(saved, tmp_path):
    checkpoint = torch.load(saved["masked"], weights_only=True)
    checkpoint["callbacks"]["TrainTimePruning"]["pruner"]["masks"].clear()
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="state of TrainTimePruning .* was changed since"):
        resume(tmp_path / "changed.ckpt")


CALLBACKS = {
    "train_time": lambda: [TrainTimePruning(0.5, criterion=Fisher(), report=False), CollapseGuard()],
    "initial": lambda: [InitialPruning(0.5, criterion=Magnitude(), report=False)],
    "sparse": lambda: [SparseTraining(0.5, report=False)],
    "rewinding": lambda: [WeightRewinding(0.5, num_levels=1, report=False)],
}


def paths_of(state):
    """Every place of nested mappings, as keys in a row."""
    for key, value in state.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in paths_of(value))


@pytest.mark.filterwarnings("ignore:.*in the run that is resumed, and is")
@pytest.mark.filterwarnings("ignore:Training stopped after")
@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_state_without_one_of_its_entries_is_refused_or_resumed(kind, tmp_path):
    """Whatever is missing: an error that names the callback, or a run; never a KeyError from somewhere within."""
    saving = ModelCheckpoint(tmp_path, "whole", save_top_k=1)
    run = trainer(*CALLBACKS[kind](), saving, max_epochs=2, limit_train_batches=2)
    run.fit(Toy(), data(), data())
    states = torch.load(tmp_path / "whole.ckpt", weights_only=True)["callbacks"]
    ours = {key: state for key, state in states.items() if not key.startswith("ModelCheckpoint")}
    refused, places = Counter(), [place for place in paths_of(ours) if len(place) > 1]
    for place in places:

        def remove(found, place=place):
            inner = found["callbacks"]
            for key in place[:-1]:
                inner = inner[key]
            del inner[place[-1]]

        path = changed(tmp_path / "whole.ckpt", tmp_path, remove)
        again = trainer(*CALLBACKS[kind](), max_epochs=4, limit_train_batches=2)
        with contextlib.suppress(ValueError):
            again.fit(Toy(), data(), data(), ckpt_path=path, weights_only=True)
        refused[place[0]] += again.state.status == "interrupted"
    assert refused.keys() == ours.keys() and min(refused.values()) > 0


def test_a_checkpoint_of_another_model_is_refused(saved):
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for GAN"):
        resume(saved["masked"], module=GAN())
    with pytest.raises(ValueError, match="the plan belongs to another model"):
        load_pruned(GAN, saved["small"])


def test_a_state_of_another_kind_of_pruning_is_not_taken_for_ones_own(saved):
    """The weights are resumed, as those of a dense run are; the state belongs to the other callback."""
    callback = SparseTraining(0.5, report=False)
    resume(saved["masked"], callback)
    assert callback.pruner.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(version=99), r"in \[1, 1\], but got 99"),
        (lambda record: record.update(checksum="0" * 64), "it was changed or truncated"),
        (lambda record: record.pop("plans"), "it is truncated, or no pruning record"),
        (lambda record: record["plans"][0]["slices"].popitem(), "it was changed or truncated"),
        (lambda record: record["plans"].pop(), "it was changed or truncated"),
    ],
)
def test_a_record_that_was_changed_is_refused_and_the_model_is_as_it_was(change, message, saved, tmp_path):
    path = changed(saved["small"], tmp_path, lambda found: change(found[KEY]))
    module = Toy()
    before = copy.deepcopy(module.state_dict())
    for load in (lambda: load_pruned(Toy, path), lambda: resume(path, module=module)):
        with pytest.raises(ValueError, match=message):
            load()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@given(seed=st.integers(0, 10_000))
def test_a_report_that_was_changed_is_read_as_a_report_or_refused(seed):
    """Never anything else: what is read has the types of a report."""
    draw = random.Random(seed)
    text = storage.to_json(Report(kind="none", achieved_sparsity=0.5, metrics_after={"val/acc": 0.9}))
    place = draw.randrange(len(text))
    damaged = draw.choice([text[:place], text[:place] + draw.choice('0aé"{}[],:\x00') + text[place + 1 :]])
    try:
        report = storage.from_json(damaged)
    except ValueError as error:
        said = str(error)
    else:
        said = "`report`" if isinstance(report, Report) and json.loads(storage.to_json(report)) else ""
    assert "`" in said
