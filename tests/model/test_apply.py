import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.model import apply
from lightning_prune.model.apply import apply_masks_

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPECIAL = [0.0, -0.0, 1.0, -1.5, float("inf"), -float("inf"), float("nan"), 1e-40]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(shape=st.lists(st.integers(0, 6), max_size=4), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_pruned_entries_are_plus_zero_and_kept_ones_the_same_bits(dtype, shape, seed):
    draw = torch.Generator().manual_seed(seed)
    integer = apply.INTEGERS[torch.empty(0, dtype=dtype).element_size()]
    values = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(0, len(SPECIAL), shape, generator=draw)]
    mask = torch.rand(shape, generator=draw) > 0.5
    weight = values.clone()
    apply_masks_([weight], [mask])
    expected = torch.where(mask, values.view(integer), torch.zeros_like(values.view(integer)))
    assert torch.equal(weight.view(integer), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "arrange",
    [
        lambda w: w,
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        lambda w: torch.stack([w, w], -1)[..., 0],
    ],
    ids=["contiguous", "channels-last", "transposed", "strided"],
)
def test_any_strides(dtype, arrange):
    values = torch.randn(4, 6, 3, 3).to(dtype)
    mask = torch.rand(4, 6, 3, 3) > 0.5
    weight = arrange(values.clone())
    before = weight.stride()
    apply_masks_([weight], [mask])
    assert torch.equal(weight, values * mask) and weight.stride() == before


def test_tensors_larger_than_a_chunk_and_several_at_once(monkeypatch):
    monkeypatch.setattr(apply, "CHUNK", 7)
    values = [torch.randn(5, 5), torch.randn(3), torch.randn(2, 2).double(), torch.randn(7, 1).bfloat16()]
    masks = [torch.rand(v.shape) > 0.5 for v in values]
    weights = [v.clone() for v in values]
    apply_masks_(weights, masks)
    for weight, value, mask in zip(weights, values, masks, strict=True):
        assert torch.equal(weight, value * mask)


def test_masks_and_identity_of_parameters_stay():
    layer = nn.Linear(6, 5)
    mask = torch.rand(5, 6) > 0.5
    before, storage = mask.clone(), layer.weight.data_ptr()
    apply_masks_([layer.weight], [mask])
    assert torch.equal(mask, before) and layer.weight.data_ptr() == storage and layer.weight.requires_grad
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_a_backward_through_a_weight_that_was_masked_meanwhile_is_an_error():
    """As after any other in-place change: autograd must not use the old value with the new weight."""
    layer, after = nn.Linear(3, 3), nn.Linear(3, 3)
    out = after(layer(torch.randn(2, 3))).sum()
    apply_masks_([after.weight], [torch.zeros(3, 3, dtype=torch.bool)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_lists_of_unlike_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        apply_masks_([torch.ones(2)], [])


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)],
    ids=["float", "transposed", "row"],
)
def test_a_mask_that_does_not_fit_is_an_error(mask):
    weight = torch.full((2, 3), 2.0)
    with pytest.raises(
        ValueError, match=r"`masks` are boolean and of their tensors' shapes, but got .* shape \(2, 3\)"
    ):
        apply_masks_([weight], [mask])
    assert torch.equal(weight, torch.full((2, 3), 2.0))


@pytest.fixture
def mesh(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [True, False])
def test_dtensors(mesh, sharded):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    place = [Shard(0) if sharded else Replicate()]
    values, mask = (
        torch.tensor([[1.0, float("nan")], [-3.0, 4.0]]),
        torch.tensor([[True, False], [True, False]]),
    )
    weight = nn.Parameter(distribute_tensor(values, mesh, place))
    apply_masks_([weight], [distribute_tensor(mask, mesh, place)])
    assert weight.full_tensor().tolist() == [[1.0, 0.0], [-3.0, 0.0]]
