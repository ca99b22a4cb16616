"""Plans are checked when they are made, can be read and compared, and survive as plain data or not at all."""

import copy
import io
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.graph import Plan, Scale
from lightning_prune.graph.plan_data import VERSION, checksum, from_data, to_data


def example(**changes):
    parts = {
        "slices": {"a.weight": {0: (0, 2), 1: (1,)}, "a.bias": {0: (0, 2)}},
        "shapes": {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (5,)},
        "attributes": {"a": {"num_heads": 2, "sizes": (1, 2)}},
        "scales": (Scale("a.weight", 0, (0, 1), 0.5**0.5),),
        "replaced": {"c": "attention", "d": "skip2"},
        "groups": {"a.weight": (3, 2)},
        "error": 1e-15,
    }
    return Plan(**parts | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slices": {"z": {0: (0,)}}}, "`shapes` has all tensors of `slices`, but got none for z"),
        ({"slices": {"a.bias": {0: (2, 0)}}}, r"ascending indices .* but got \(2, 0\) for dim 0"),
        ({"slices": {"a.bias": {0: (1, 1)}}}, "ascending"),
        ({"slices": {"a.bias": {0: (-1, 1)}}}, "ascending"),
        ({"slices": {"a.bias": {0: (0, 3)}}}, "below the size"),
        ({"slices": {"a.bias": {1: (0,)}}}, "an existing dim"),
        ({"slices": {"a.bias": {0: ()}}}, "at least one"),
        ({"scales": (Scale("a.bias", 0, (3,), 1.0),)}, "`scales` are of slices of known tensors"),
        ({"scales": (Scale("z", 0, (0,), 1.0),)}, "known tensors"),
        ({"replaced": {"c": "skipper"}}, "`replaced` by .* but got 'skipper' for c"),
        ({"attributes": {"a": {"n": [object()]}}}, "`attributes` of a are plain values"),
        ({"groups": {"g": (2, 3)}}, "keep at most what they have, but got 3 of 2 for g"),
        ({"error": -1.0}, "at least 0"),
        ({"error": float("nan")}, "at least 0"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        example(**changes)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_positive(factor):
    with pytest.raises(ValueError, match="`factor` of w is a number above 0"):
        Scale("w", 0, (0,), factor)


def test_parts_are_not_shared_between_plans():
    first, second = (Plan({}, {}) for _ in range(2))
    assert first.replaced == second.replaced == {} and first.replaced is not second.replaced
    given = {"a": {0: [0, 1]}}
    plan = Plan(given, {"a": (3,)})
    given["a"][0].append(2)
    assert plan.slices == {"a": {0: (0, 1)}}


def test_it_prints_what_it_does():
    text = str(example()).splitlines()
    assert text[0] == "1 of 1 groups and 2 tensors become smaller: 9 -> 4 entries"
    assert "a.weight  3 x 2   2 x 1" in text and "a.weight     3     2" in text
    assert any(line.split() == ["a.sizes", "(1,", "2)"] for line in text)
    assert any(line.split() == ["a.weight", "0", "2", "0.7071"] for line in text)
    assert any(line.split() == ["d", "skip2"] for line in text)
    assert text[-1] == "largest relative difference: 1.0e-15"


def test_shapes_after():
    plan = example()
    assert [plan.shape_after(name) for name in plan.shapes] == [(2, 1), (2,), (5,)]


def test_differences_name_each_part_that_differs():
    plan = example()
    assert plan.differences(example()) == []
    other = example(error=None, groups={"a.weight": (3, 3)}, attributes={}, replaced={"c": "attention"})
    assert plan.differences(other) == [
        "attributes of a: {'num_heads': 2, 'sizes': (1, 2)} and nothing",
        "replaced of d: skip2 and nothing",
        "groups of a.weight: (3, 2) and (3, 3)",
        "error: 1e-15 and None",
    ]
    assert other.differences(plan)[0].startswith("attributes of a: nothing and")


@st.composite
def plans(draw):
    shapes, slices = {}, {}
    for i in range(draw(st.integers(0, 4))):
        shapes[f"t{i}"] = tuple(draw(st.lists(st.integers(1, 20), max_size=3)))
        for dim, size in enumerate(shapes[f"t{i}"]):
            if draw(st.booleans()):
                kept = draw(st.sets(st.integers(0, size - 1), min_size=1))
                slices.setdefault(f"t{i}", {})[dim] = tuple(sorted(kept))
    scales = tuple(
        Scale(n, d, k, draw(st.floats(1e-3, 1e3))) for n, dims in slices.items() for d, k in dims.items()
    )
    values = (
        st.integers() | st.floats(allow_nan=False) | st.text("abc.", max_size=3) | st.booleans() | st.none()
    )
    attributes = draw(
        st.dictionaries(
            st.text("abc.", max_size=3), st.dictionaries(st.text("xyz"), values, max_size=2), max_size=2
        )
    )
    return Plan(slices, shapes, attributes, scales, error=draw(st.none() | st.floats(0, 1)))


@given(st.lists(plans(), max_size=3))
def test_plans_survive_json_and_safe_loading(made):
    data = to_data(made)
    assert from_data(data) == tuple(made)
    assert from_data(json.loads(json.dumps(data))) == tuple(made)
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    assert from_data(torch.load(file, weights_only=True)) == tuple(made)


def test_deep_copies_are_equal():
    assert copy.deepcopy(example()) == example() == replace(example(), error=1e-15)


def test_equal_indices_are_stored_once():
    size, num = 4096, 200
    kept = tuple(range(0, size, 2))
    many = Plan({f"t{i}": {0: kept} for i in range(num)}, {f"t{i}": (size,) for i in range(num)})
    file = io.BytesIO()
    torch.save(to_data([many]), file)
    assert len(file.getvalue()) < 60 * num + 5000  # names and shapes, and not 200 lists of 2048 numbers


def test_a_newer_version_is_refused():
    data = to_data([example()])
    data["version"] = VERSION + 1
    with pytest.raises(
        ValueError, match=rf"in \[1, {VERSION}\], but got {VERSION + 1}: a newer lightning_prune"
    ):
        from_data(data)


@pytest.mark.parametrize("version", [0, -3, "1", 1.0, None])
def test_what_is_no_version_is_refused(version):
    data = {**to_data([example()]), "version": version}
    with pytest.raises(ValueError, match=rf"`version` .* but got {version!r}: it was changed"):
        from_data(data)


@pytest.mark.parametrize("value", [None, 7, "zz", [], {}, [["a"]], float("nan")], ids=str)
def test_nonsense_under_a_right_checksum_is_refused_or_read(value):
    good = to_data([example()])
    outcomes = []
    for *path, key in [("plans",), *leaves(good["plans"], ("plans",)), *nodes(good["plans"], ("plans",))]:
        data = copy.deepcopy(good)
        place = data
        for step in path:
            place = place[step]
        place[key] = value
        data["checksum"] = checksum({name: part for name, part in data.items() if name != "checksum"})
        try:
            from_data(data)
        except ValueError as error:  # and nothing else
            outcomes.append(str(error))
    assert len(outcomes) > 5 and all("`" in said for said in outcomes)


def leaves(data, path=()):
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in entries:
        if isinstance(value, (dict, list)) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def nodes(data, path=()):
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, (dict, list)) and value:
            yield (*path, key)
            yield from nodes(value, (*path, key))


def test_whatever_is_changed_is_noticed():
    good = to_data([example(), example(error=None)])
    places = list(leaves(good))
    assert len(places) > 40
    for *path, key in places:
        data = copy.deepcopy(good)
        place = data
        for step in path:
            place = place[step]
        place[key] = 77 if place[key] != 77 else 78
        with pytest.raises(ValueError, match="newer lightning_prune|changed or truncated"):
            from_data(data)


@pytest.mark.parametrize("part", ["version", "plans", "checksum"])
def test_truncated_data_is_refused(part):
    data = to_data([example()])
    del data[part]
    with pytest.raises(ValueError, match=f"got none of {part}: it is truncated"):
        from_data(data)


def test_a_lost_plan_is_noticed():
    data = to_data([example(), example()])
    del data["plans"][-1]
    with pytest.raises(ValueError, match="changed or truncated"):
        from_data(data)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_record_is_refused(data):
    with pytest.raises(ValueError, match="no pruning record"):
        from_data(data)


def test_a_forged_record_is_still_checked():
    """Whoever also forges the checksum meets the checks of the plan itself."""
    data = to_data([example()])
    del data["plans"][0]["shapes"]["a.bias"]
    content = {k: v for k, v in data.items() if k != "checksum"}
    with pytest.raises(ValueError, match="none for a.bias"):
        from_data({**content, "checksum": checksum(content)})
