import errno
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.report import storage
from lightning_prune.report.costs import Acceleration, Cost, Latency, LayerCost, LayerKernel, differs
from lightning_prune.report.data import FORMAT_VERSION, KINDS, Evaluation, Group, Layer, Report, Update
from lightning_prune.report.environment import environment
from lightning_prune.report.storage import from_json, load, save, to_json, write_text

FLOATS = st.floats(allow_nan=False)
METRICS = st.dictionaries(st.text(max_size=5), FLOATS, max_size=3)
TEXTS = st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3)
COUNTS = st.integers(0, 2**70)
MAYBE = st.none() | COUNTS
SHAPES = st.lists(COUNTS, max_size=3).map(tuple)
LATENCIES = st.builds(
    Latency,
    *(FLOATS, FLOATS, FLOATS, COUNTS, st.text(max_size=5), COUNTS, st.text(max_size=5)),
    *(st.none() | FLOATS, st.none() | FLOATS),
)
PLACES = st.lists(st.text(max_size=9), max_size=2).map(tuple)
GROUPS = st.builds(Group, st.text(max_size=5), st.text(max_size=5), COUNTS, COUNTS, PLACES)
LAYER_COSTS = st.builds(LayerCost, st.text(max_size=5), SHAPES, COUNTS, MAYBE, MAYBE)
COSTS = st.builds(
    Cost,
    *(COUNTS, MAYBE, MAYBE, MAYBE, MAYBE, MAYBE, st.none() | LATENCIES, MAYBE),
    st.lists(LAYER_COSTS, max_size=2).map(tuple),
    TEXTS,
)
LAYERS = st.builds(Layer, st.text(max_size=5), SHAPES, COUNTS, COUNTS, MAYBE, MAYBE, MAYBE, MAYBE)
KERNELS = st.builds(
    LayerKernel,
    *(st.text(max_size=5), SHAPES, FLOATS, MAYBE, st.none() | LATENCIES, st.none() | LATENCIES),
    *(st.booleans(), st.none() | st.text(max_size=5)),
)
ACCELERATIONS = st.builds(
    Acceleration,
    *(st.sampled_from(["csr", "2:4"]), st.lists(KERNELS, max_size=2).map(tuple), st.booleans()),
    *(st.none() | LATENCIES, st.none() | LATENCIES, MAYBE, st.none() | FLOATS),
)
UPDATES = st.builds(Update, COUNTS, FLOATS, FLOATS, FLOATS, MAYBE, METRICS)
FIELDS_OF_A_REPORT = {
    "kind": st.sampled_from(KINDS),
    "recipe": TEXTS,
    "target_sparsity": st.none() | FLOATS,
    "achieved_sparsity": st.none() | FLOATS,
    "layers": st.lists(LAYERS, max_size=2).map(tuple),
    "updates": st.lists(UPDATES, max_size=2).map(tuple),
    "evaluations": st.lists(st.builds(Evaluation, COUNTS, FLOATS, METRICS, MAYBE), max_size=2).map(tuple),
    "cost_before": st.none() | COSTS,
    "cost_after": st.none() | COSTS,
    "metrics_before": METRICS,
    "metrics_after": METRICS,
    "warnings": st.lists(st.text(), max_size=2).map(tuple),
    "environment": TEXTS,
    "checkpoint": st.none() | st.text(),
    "resume_command": st.none() | st.text(),
    "load_command": st.none() | st.text(),
    "equivalence_error": st.none() | st.floats(min_value=0, allow_nan=False),
    "frozen": TEXTS,
    "acceleration": st.none() | ACCELERATIONS,
    "groups": st.lists(GROUPS, max_size=2).map(tuple),
    "model": st.none() | st.text(),
    "command": st.none() | st.text(),
    "config": st.none() | st.text(),
}
REPORTS = st.builds(Report, **FIELDS_OF_A_REPORT)
REPORT = Report(
    kind="train_time",
    recipe={"criterion": "Magnitude(p=1)"},
    layers=(Layer("net.weight", (2, 3), 6, 3),),
    updates=(Update(7, 1.0, 0.5, 0.5, layers={"net.weight": 0.5}),),
    cost_after=Cost(6, latency=Latency(2.0, 1.0, 3.0, 9), layers=(LayerCost("net.weight", (2, 3), 6),)),
    metrics_after={"acc": 0.25},
)


@settings(max_examples=60)
@given(REPORTS)
def test_reading_what_was_written_gives_the_same_report(report):
    assert from_json(to_json(report)) == report


def test_every_field_is_drawn_in_the_round_trip():
    """So that a new field cannot be left out of the test above."""
    assert {f.name for f in fields(Report)} == {*FIELDS_OF_A_REPORT, "format_version"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2])
def test_every_float_survives_and_the_text_is_valid_json(value):
    text = to_json(replace(REPORT, metrics_after={"loss": value}))
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    found = from_json(text).metrics_after["loss"]
    assert math.copysign(1.0, found) == math.copysign(1.0, value)
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_text_that_reads_like_a_number_stays_text():
    report = replace(REPORT, recipe={"sparsity": "NaN"}, environment={"seed": "7"})
    assert from_json(to_json(report)) == report


def test_a_report_of_the_first_version_is_read():
    """`report_v1.json` was written before groups, commands and configurations were part of a report."""
    path = Path(__file__).with_name("report_v1.json")
    report = load(path)
    assert report.format_version == FORMAT_VERSION > json.loads(path.read_text())["format_version"]
    assert report.cost_after.latency == Latency(1.0, 0.9, 1.1, 40)
    assert report.layers == (Layer("net.0.weight", (8, 4), 32, 32, 16, 8, 128, 64),)
    assert (report.groups, report.model, report.command, report.config) == ((), None, None, None)
    assert from_json(to_json(report)) == report


def test_a_newer_version_is_refused_before_anything_else_is_looked_at():
    with pytest.raises(
        ValueError, match=f"`format_version`.*at most {FORMAT_VERSION}, but got {FORMAT_VERSION + 1}"
    ):
        from_json(json.dumps({"format_version": FORMAT_VERSION + 1, "kind": {"not": "known yet"}}))


def test_a_report_cut_short_anywhere_is_an_error():
    text = to_json(REPORT).rstrip()
    for length in range(len(text)):
        with pytest.raises(ValueError, match="`report` is JSON that lightning_prune wrote"):
            from_json(text[:length])


def _set(data, path, value):
    for key in path[:-1]:
        data = data[key]
    if value is None:
        del data[path[-1]]
    else:
        data[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["kind"], "quantized", "`kind` is one of"),
        (["kind"], None, "got none of the name.*kind"),
        (["format_version"], None, "with a format_version"),
        (["format_version"], "1", "with a format_version"),
        (["format_version"], True, "with a format_version"),
        (["layers", 0, "shape", 1], 2.5, r"`report.layers\[0\].shape\[1\]` is a whole number, but got 2.5"),
        (["layers", 0, "params"], True, r"`report.layers\[0\].params` is a whole number, but got True"),
        (["layers"], {}, "`report.layers` is a list"),
        (["updates", 0, "achieved"], "0.5", r"`report.updates\[0\].achieved` is a number, but got '0.5'"),
        (["updates", 0, "layers"], [], r"`report.updates\[0\].layers` is an object"),
        (["cost_after", "latency", "device"], 0, "`report.cost_after.latency.device` is text"),
        (["cost_after", "speed"], 9, "`report.cost_after` has the fields.*got.*speed"),
        (["recipe", "criterion"], 1, "`report.recipe.criterion` is text"),
    ],
)
def test_a_tampered_report_is_an_error_that_names_the_place(path, value, message):
    data = json.loads(to_json(REPORT))
    _set(data, path, value)
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"report"', "[" * 100_000])
def test_other_text_is_an_error(text):
    with pytest.raises(ValueError, match="`report` is JSON that lightning_prune wrote"):
        from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics_after", {"acc": "0.9"}),
        ("warnings", "one"),
        ("layers", (1,)),
        ("recipe", {1: "a"}),
        ("checkpoint", 1),
    ],
)
def test_what_the_type_does_not_allow_is_not_written(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`report.{field}"):
        save(replace(REPORT, **{field: value}), tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="`kind` is one of"):
        Report(kind="structured")


def test_a_file_is_read_back_and_its_folder_created(tmp_path):
    path = save(REPORT, tmp_path / "a" / "b" / "report.json")
    assert load(path) == REPORT
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json"):
        load(tmp_path / "report.json")
    (tmp_path / "report.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"report\.json"):
        load(tmp_path / "report.json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save(REPORT, tmp_path / "report.json")
    beside = tmp_path / f".report.json.{os.getpid()}.tmp"
    beside.symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        save(replace(REPORT, kind="none"), path)
    assert caught.value.errno == errno.ENOSPC
    assert load(path) == REPORT
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_what_cannot_be_a_folder_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError):
        write_text(tmp_path / "file" / "report.json", "text")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_move_that_fails_leaves_no_half_file(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError):
        save(REPORT, tmp_path / "report.json")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_types_of_fields_are_those_that_storage_knows():
    """A field of another type would only fail when it is written."""

    def known(kind):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is None:
            return kind in (int, float, str, bool) or all(known(k) for k in storage._fields(kind).values())
        if origin is tuple:
            return len(arguments) == 2 and arguments[1] is Ellipsis and known(arguments[0])
        if origin is Mapping:
            return arguments[0] is str and known(arguments[1])
        return len(arguments) == 2 and arguments[1] is type(None) and known(arguments[0])

    assert known(Report)


@given(st.lists(st.floats(0.0, 9.0), min_size=6, max_size=6))
def test_a_difference_is_claimed_only_where_quartiles_are_apart(numbers):
    (a, b, c), (d, e, f) = sorted(numbers[:3]), sorted(numbers[3:])
    before, after = Latency(b, a, c, 9), Latency(e, d, f, 9)
    overlap = max(a, d) <= min(c, f)
    assert differs(before, after) is differs(after, before) is (not overlap)


@pytest.mark.parametrize("other", [{"device": "cuda:0"}, {"num_threads": 2}, {"clock": "wall"}])
def test_no_difference_is_claimed_between_what_cannot_be_compared(other):
    before = Latency(10.0, 9.0, 11.0, 9)
    assert differs(before, replace(before, median_ms=2.0, low_ms=1.0, high_ms=3.0))
    assert not differs(before, replace(before, median_ms=2.0, low_ms=1.0, high_ms=3.0, **other))


def test_the_environment_names_versions_threads_and_seed(monkeypatch):
    import torch

    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["seed"] == "42"
    assert found["torch threads"] == str(torch.get_num_threads())
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert "seed" not in environment()
