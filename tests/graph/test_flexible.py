"""The flexible attention is nn.MultiheadAttention while it is whole, and the formula of attention when it is not."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from lightning_prune.graph.flexible import (
    FlexibleAttention,
    can_be_flexible,
    flexible_attention,
    make_flexible_,
)

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 4, 5
MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(QUERIES, KEYS).triu(1).bool()},
    "float": {"attn_mask": torch.linspace(-1, 1, QUERIES * KEYS, dtype=torch.double).view(QUERIES, KEYS)},
    "by-head": {
        "attn_mask": torch.linspace(-1, 1, BATCH * HEADS * QUERIES * KEYS, dtype=torch.double).view(
            -1, QUERIES, KEYS
        )
    },
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False, False, False, True, True]])},
    "float-padding": {
        "key_padding_mask": torch.linspace(-2, 0, BATCH * KEYS, dtype=torch.double).view(BATCH, KEYS)
    },
}
MASKS["both"] = {**MASKS["float"], "key_padding_mask": MASKS["float-padding"]["key_padding_mask"]}
MASKS["both-bool"] = {**MASKS["bool"], **MASKS["padding"]}
MASKS["hint"] = {**MASKS["bool"], "is_causal": True}
SHAPES = {
    "plain": {},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "widths": {"kdim": 7, "vdim": 9},
}


def twins(**options):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.double, **options)
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
        nn.init.normal_(plain.out_proj.bias)
    flexible = copy.deepcopy(plain)
    make_flexible_(flexible)
    return plain, flexible


def inputs(plain, batched=True):
    draw = torch.Generator().manual_seed(1)
    shapes = [(BATCH, QUERIES, EMBED), (BATCH, KEYS, plain.kdim), (BATCH, KEYS, plain.vdim)]
    found = [torch.randn(shape, generator=draw, dtype=torch.double) for shape in shapes]
    if not batched:
        return [x[0] for x in found]
    return found if plain.batch_first else [x.transpose(0, 1) for x in found]


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_plain_attention(shape, masks):
    plain, flexible = twins(**shape)
    for need_weights, average in itertools.product([True, False], [True, False]):
        options = {**masks, "need_weights": need_weights, "average_attn_weights": average}
        expected, weights = plain(*inputs(plain), **options)
        result, shown = flexible(*inputs(plain), **options)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        assert (shown is None) is (weights is None)
        if weights is not None:
            torch.testing.assert_close(shown, weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch(need_weights):
    plain, flexible = twins()
    options = {"attn_mask": MASKS["bool"]["attn_mask"], "need_weights": need_weights}
    options["key_padding_mask"] = torch.tensor([False, False, False, False, True])
    for expected, result in zip(
        plain(*inputs(plain, False), **options), flexible(*inputs(plain, False), **options), strict=True
    ):
        assert (result is None) is (expected is None)
        if result is not None:
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_gradients_agree():
    plain, flexible = twins()
    for module in (plain, flexible):
        module(*inputs(module))[0].square().sum().backward()
    for p, q in zip(plain.parameters(), flexible.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_drops_weights_in_training_only(need_weights):
    _, flexible = twins(dropout=0.5)
    x = inputs(flexible)
    flexible.train()
    assert not torch.equal(
        flexible(*x, need_weights=need_weights)[0], flexible(*x, need_weights=need_weights)[0]
    )
    flexible.eval()
    assert torch.equal(flexible(*x, need_weights=need_weights)[0], flexible(*x, need_weights=need_weights)[0])


def by_formula(module, x, num_heads, head_dim, value_dim, scored_dim):
    """Each head and each query by itself."""
    q, k, v = module.in_proj_weight.split([num_heads * head_dim, num_heads * head_dim, num_heads * value_dim])
    bq, bk, bv = module.in_proj_bias.split(
        [num_heads * head_dim, num_heads * head_dim, num_heads * value_dim]
    )
    mixed = []
    for h in range(num_heads):
        of_keys, of_values = (
            slice(h * head_dim, (h + 1) * head_dim),
            slice(h * value_dim, (h + 1) * value_dim),
        )
        queries, keys = x @ q[of_keys].T + bq[of_keys], x @ k[of_keys].T + bk[of_keys]
        values = x @ v[of_values].T + bv[of_values]
        mixed.append(torch.softmax(queries @ keys.T / math.sqrt(scored_dim), -1) @ values)
    return torch.cat(mixed, -1) @ module.out_proj.weight.T + module.out_proj.bias


@pytest.mark.parametrize(("num_heads", "head_dim", "value_dim"), [(2, 4, 4), (3, 3, 4), (3, 4, 1), (1, 5, 2)])
def test_any_widths(num_heads, head_dim, value_dim):
    _, module = twins(batch_first=True)
    rows = num_heads * (2 * head_dim + value_dim)
    module.in_proj_weight.data = torch.randn(rows, EMBED, dtype=torch.double)
    module.in_proj_bias.data = torch.randn(rows, dtype=torch.double)
    module.out_proj.weight.data = torch.randn(EMBED, num_heads * value_dim, dtype=torch.double)
    module.num_heads, module.head_dim, module.value_dim = num_heads, head_dim, value_dim
    x = torch.randn(KEYS, EMBED, dtype=torch.double)
    expected = by_formula(module, x, num_heads, head_dim, value_dim, EMBED // HEADS)
    for need_weights in (True, False):
        result = module(x[None], x[None], x[None], need_weights=need_weights)[0][0]
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_the_state_dict_is_that_of_the_plain_one():
    plain, flexible = twins()
    assert list(plain.state_dict()) == list(flexible.state_dict())
    plain.load_state_dict(flexible.state_dict())


def test_a_hint_without_a_mask_is_refused():
    _, flexible = twins()
    with pytest.raises(ValueError, match="`attn_mask` is needed"):
        flexible(*inputs(flexible), is_causal=True)


def test_extra_positions_are_not_handled():
    assert can_be_flexible(nn.MultiheadAttention(4, 2))
    assert not can_be_flexible(nn.MultiheadAttention(4, 2, add_bias_kv=True))
    assert not can_be_flexible(nn.MultiheadAttention(4, 2, add_zero_attn=True))
    assert not can_be_flexible(nn.Linear(4, 2))


@pytest.mark.parametrize("shape", [{}, {"kdim": 7, "vdim": 9}])
def test_for_a_while(shape):
    plain, already = twins(**shape)
    before = dict(vars(plain))

    def run():
        with flexible_attention([plain, already, nn.Linear(2, 2)]):
            assert type(plain) is FlexibleAttention
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert type(plain) is nn.MultiheadAttention and dict(vars(plain)) == before
    assert type(already) is FlexibleAttention
