import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import Global, Magnitude, Slice, Weight
from lightning_prune.core.masks import (
    check_mask,
    compute_masks,
    overlap,
    pack,
    sparsity_of,
    unpack,
)
from lightning_prune.core.scoring import group_scores, without_pruned

shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4)


@given(shape=shapes, seed=st.integers(0, 1000))
def test_packed_masks_come_back_and_take_a_bit_per_weight(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack(mask)
    restored = unpack("a", packed)
    assert torch.equal(restored, mask) and restored.dtype == torch.bool and restored.shape == mask.shape
    assert packed["bits"].numel() == -(-mask.numel() // 8) and packed["bits"].untyped_storage().nbytes() <= -(
        -mask.numel() // 8
    )


def test_packed_bits_are_little_endian_as_in_numpy():
    np = pytest.importorskip("numpy")
    mask = torch.rand(5, 7) > 0.5
    assert pack(mask)["bits"].tolist() == np.packbits(mask.numpy().ravel(), bitorder="little").tolist()


def test_packed_masks_load_with_weights_only(tmp_path):
    torch.save({"mask": pack(torch.ones(3, 3, dtype=torch.bool))}, tmp_path / "mask.pt")
    assert unpack("a", torch.load(tmp_path / "mask.pt", weights_only=True)["mask"]).all()


def test_truncated_bits_are_refused():
    packed = pack(torch.ones(4, 9, dtype=torch.bool))
    packed["bits"] = packed["bits"][:-1]
    with pytest.raises(
        ValueError, match=r"`net.0.weight`: a mask of shape \(4, 9\) is stored in 5 bytes, but got 4"
    ):
        unpack("net.0.weight", packed)


@pytest.mark.parametrize("bad", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), [True]])
def test_what_is_no_mask_is_refused(bad):
    with pytest.raises(
        ValueError, match=r"`a`: a mask is a boolean tensor of the weight's shape \(2, 3\), but got"
    ):
        check_mask("a", bad, (2, 3))


def test_sparsity_and_overlap_are_over_all_weights():
    first = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True])}
    second = {"a": torch.tensor([True, False, True]), "b": torch.tensor([True])}
    assert sparsity_of(first) == 0.25 and sparsity_of({}) == 0.0
    assert overlap(first, second) == 0.5 and overlap(first, first) == 1.0
    with pytest.raises(ValueError, match="only one has `b`"):
        overlap(first, {"a": second["a"]})


def test_scores_are_computed_when_read_and_not_before():
    calls = []

    def criterion(*, weight):
        calls.append(weight.shape)
        return weight.abs()

    weights = {"a": torch.randn(4, 3), "b": torch.randn(2, 3)}
    sizes = {name: tuple(w.shape) for name, w in weights.items()}
    scores = group_scores(
        {n: {"weight": w} for n, w in weights.items()}, sizes, criterion=criterion, granularity=Slice()
    )
    assert not calls and scores.shapes == {"a": (4,), "b": (2,)}
    assert torch.equal(scores["a"], weights["a"].abs().mean(1)) and len(calls) == 1


def test_scores_of_another_shape_are_refused():
    scores = group_scores(
        {"a": {"weight": torch.ones(2, 3)}},
        {"a": (2, 3)},
        criterion=lambda *, weight: weight[0],
        granularity=Weight(),
    )
    with pytest.raises(ValueError, match=r"weight's shape, \(2, 3\) for `a`, but got \(3,\)"):
        scores["a"]


@pytest.mark.parametrize("granularity", [Weight(), Slice(), Slice(dim=1)], ids=str)
def test_what_is_pruned_stays_pruned_even_with_high_scores(granularity):
    weights = {"a": torch.rand(8, 6), "b": torch.rand(4, 6)}
    sizes = {name: tuple(w.shape) for name, w in weights.items()}

    def masks(seed, sparsity, before):
        draw = torch.Generator().manual_seed(seed)
        stats = {n: {"weight": torch.rand(s, generator=draw)} for n, s in sizes.items()}
        scores = group_scores(stats, sizes, criterion=Magnitude(), granularity=granularity)
        return compute_masks(
            without_pruned(scores, before, granularity),
            sizes,
            sparsity,
            granularity=granularity,
            scope=Global(),
        )

    first = masks(0, 0.4, {})
    second = masks(1, 0.7, first)
    assert all(bool((second[n] <= first[n]).all()) for n in sizes)
    assert sparsity_of(second) > sparsity_of(first)
