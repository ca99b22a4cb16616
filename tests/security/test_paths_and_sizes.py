"""Names in files never lead out of their folder, and sizes in files are believed by nobody."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import Channel, TrainTimePruning, shrink
from lightning_prune.core.masks import unpack
from lightning_prune.core.packing import decompress
from lightning_prune.graph.plan_data import checksum
from lightning_prune.model.calls import call_of
from lightning_prune.model.export.formats import checked_filename
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.history import KEY
from lightning_prune.model.record import shrink_to_
from lightning_prune.model.unfinished import Unfinished
from lightning_prune.sweep.notes import SWEEP_FILE, held_jobs
from lightning_prune.sweep.rows import read_jobs
from tests.callbacks.toy import Toy

HUGE = 10**12
OUTSIDE = ("../other", "/tmp/other", "a/../../other", "a/b", "..", ".", "", "a\\..\\other")


@given(name=st.text(max_size=20))
def test_an_export_stays_in_its_folder(name, tmp_path_factory):
    try:
        found = checked_filename(name + ".onnx", "onnx")
    except ValueError:
        return
    folder = tmp_path_factory.getbasetemp()
    assert (folder / found).parent == folder


@pytest.mark.parametrize("name", [f"{name}/model.onnx" for name in OUTSIDE])
def test_an_export_to_somewhere_else_is_refused(name):
    with pytest.raises(ValueError, match="a name within the run folder"):
        checked_filename(name, "onnx")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if "\\" not in name])
def test_a_job_that_would_lie_elsewhere_is_refused(name, tmp_path):
    (folder := tmp_path / "sweep").mkdir()
    (folder / SWEEP_FILE).write_text(json.dumps({"jobs": {name: ["seed=1"]}}))
    with pytest.raises(ValueError, match="`jobs` of a sweep are folders in its own"):
        held_jobs(folder)


def test_a_link_out_of_a_sweep_is_not_followed(tmp_path):
    for folder in ("sweep/0", "other"):
        (tmp_path / folder / ".hydra").mkdir(parents=True)
        (tmp_path / folder / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    (tmp_path / "sweep" / "1").symlink_to(tmp_path / "other")
    assert [row["job"] for row in read_jobs(tmp_path / "sweep")] == ["0"]
    with pytest.raises(ValueError, match="`jobs` of a sweep are folders in its own, .* but got '1'"):
        held_jobs(tmp_path / "sweep")


def test_a_folder_of_solved_layers_leaves_the_files_of_others_alone(tmp_path):
    """Also where it has the name of one that is there already."""
    mine = [tmp_path / name for name in ("weights.pt", "notes.tmp", "a.json")]
    for file in mine:
        file.write_text("mine")
    held = Unfinished(tmp_path, "key")
    held.write("a.weight", {})
    held.finish()
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_a_solved_layer_lies_in_its_folder_whatever_its_name(tmp_path):
    held = Unfinished(tmp_path / "unfinished", "key")
    assert all(held._file(name).parent == tmp_path / "unfinished" for name in OUTSIDE)


@pytest.fixture
def little_memory():
    """Refuse to believe a size: none of these files is larger than some kB."""
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def lying_record(change):
    """A record of a toy that was made smaller, with a checksum that fits what was changed."""
    shrink(module := Toy(), torch.randn(2, 8), 0.5, granularity=Channel())
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    record = checkpoint[KEY]
    change(record["plans"][0])
    record["checksum"] = checksum({key: value for key, value in record.items() if key != "checksum"})
    return checkpoint


LIES = {
    "a shape": lambda plan: plan["shapes"].update({"head.weight": [4, HUGE]}),
    "all shapes": lambda plan: plan.update(
        shapes={name: [HUGE] * len(s) for name, s in plan["shapes"].items()}
    ),
    "a group": lambda plan: plan["groups"].update({next(iter(plan["groups"])): [HUGE, HUGE + 1]}),
    "an index": lambda plan: plan["slices"].update({"head.weight": [[1, "00" * 100 + "01"]]}),
    "a dim": lambda plan: plan["slices"].update({"head.weight": [[HUGE, "01"]]}),
    "a method": lambda plan: plan["attributes"].setdefault("head", {}).update(forward=HUGE),
    "a class": lambda plan: plan["attributes"].setdefault("head", {}).update(__class__="os.system"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_claims_what_the_model_has_not_is_refused(lie, little_memory):
    before, module = Toy().state_dict(), Toy()
    with pytest.raises(ValueError, match=r"`\w+`|plan"):
        shrink_to_(module, lying_record(LIES[lie]))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_sizes_follow_the_weights_whatever_a_record_claims(little_memory):
    change = {"in_features": HUGE}
    shrink_to_(
        module := Toy(), lying_record(lambda plan: plan["attributes"].setdefault("head", {}).update(change))
    )
    assert module.head.in_features == module.head.weight.shape[1] < 8


def test_a_mask_that_claims_more_than_it_holds_is_refused(little_memory):
    with pytest.raises(ValueError, match="is stored in 125000000000 bytes, but got 4"):
        unpack("a", {"shape": [HUGE], "bits": torch.zeros(4, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="is stored in 125000000000 bytes, but got 4"):
        decompress("a", torch.zeros(4, dtype=torch.uint8), torch.zeros(2), (HUGE,))


@pytest.mark.parametrize("name", ["body.0.weight", "no_such_group"])
def test_a_state_that_claims_groups_of_another_size_is_refused(name, little_memory):
    recipe = TrainTimePruning(0.5, granularity=Channel()).recipe
    pruner = GroupPruner(module := Toy(), recipe, call_of(module, torch.randn(2, 8)))
    pruner.update_(1.0)
    state = pruner.state_dict()
    state["contest"]["sizes"][name] = HUGE
    fresh = GroupPruner(module, recipe, call_of(module, torch.randn(2, 8)))
    with pytest.raises(
        ValueError, match=rf"`sizes` of the checkpoint has \d+ for the group `{name}`, but got {HUGE}"
    ):
        fresh.load_state_dict(state)
