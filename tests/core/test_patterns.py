import pytest

from lightning_prune.core.patterns import check_match, check_patterns, listed, matches

NAMES = ["encoder.0.attn.weight", "encoder.1.attn.weight", "head.weight"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head.weight", [2]),
        ("head", [2]),
        ("encoder", [0, 1]),
        ("encoder.0", [0]),
        ("*attn*", [0, 1]),
        ("encoder.?.attn", [0, 1]),
        ("encoder.[1-9]", [1]),
        ("weight", []),
        ("HEAD", []),
        (r"re:encoder\.\d\.attn\.weight", [0, 1]),
        ("re:encoder", []),
        ("re:.*(0|head).*", [0, 2]),
    ],
)
def test_matches(pattern, expected):
    assert [i for i, name in enumerate(NAMES) if matches(pattern, name)] == expected


def test_no_match_names_the_nearest_and_all_candidates():
    with pytest.raises(
        ValueError, match=r"`exclude` .* 'encodr'\. Did you mean encoder.* The candidates are encoder.0"
    ):
        check_match("exclude", "encodr", NAMES)
    with pytest.raises(ValueError, match=r"'attnn'\. Did you mean encoder\.0\.attn\?"):  # by its last part
        check_match("exclude", "attnn", NAMES)


@pytest.mark.parametrize("bad", ["head", [""], [3], ["re:("]])
def test_bad_patterns_are_refused_before_any_model(bad):
    with pytest.raises(ValueError, match="`exclude`"):
        check_patterns("exclude", bad)


def test_a_long_list_is_shortened():
    assert listed(map(str, range(100)), num_shown=2) == "0, 1 and 98 more"
