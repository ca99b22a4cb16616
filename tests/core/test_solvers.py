"""Solvers against the published formulas in numpy, without their shortcuts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import ERK, LeastSquares, Local, NofM, PerRow, SparseGPT
from lightning_prune.core.quotas import Quota


def layer(seed=0, out=6, size=12, positions=40):
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.eye(size) + 0.3 * torch.randn(size, size, generator=draw)
    x = torch.randn(positions, size, generator=draw) @ mixing  # inputs that hang together
    return torch.randn(out, size, generator=draw), x, x.t() @ x


def error(weight, new, x):
    return float(((weight - new) @ x.t()).square().sum())


def by_hand(weight, gram, damping, block, choose):
    """Optimal brain surgery, column by column, each with the inverse of what is left of H; no Cholesky, no blocks."""
    w, h = weight.double().numpy().copy(), gram.double().numpy()
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(len(h))]
    mask = np.ones(w.shape, dtype=bool)
    for j in range(w.shape[1]):
        if j % block == 0:
            columns = range(j, min(j + block, w.shape[1]))
            cost = np.stack([w[:, k] ** 2 / inverses[k][0, 0] for k in columns], 1)
            mask[:, columns] = choose(cost, j)
        change = np.where(mask[:, j], 0.0, w[:, j])[:, None] / inverses[j][0, 0] * inverses[j][0]
        w[:, j:] -= change
    return w * mask, mask


@pytest.mark.parametrize("block", [1, 4, 5, 12, 128])
def test_sparse_gpt_is_the_surgery_column_by_column(block):
    weight, _, gram = layer()
    quota = Quota(Local(), 36, (6, 12))
    found, mask = SparseGPT(block_size=block)(weight=weight, gram=gram, quota=quota)

    def choose(cost, start):
        return quota.choose(torch.from_numpy(cost).float(), start).numpy()

    expected, places = by_hand(weight, gram, 0.01, block, choose)
    assert mask.tolist() == places.tolist() and int(mask.sum()) == 36
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert not found[~mask].any()


def test_sparse_gpt_keeps_the_pattern_of_n_of_m_and_chooses_within_it():
    weight, _, gram = layer()
    quota = Quota(NofM(), 36, (6, 12))
    found, mask = SparseGPT(block_size=8)(weight=weight, gram=gram, quota=quota)
    assert (mask.view(-1, 4).sum(1) == 2).all()

    def choose(cost, start):
        best = np.argsort(-cost, axis=1, kind="stable")[:, :2]
        mask = np.zeros(cost.shape, dtype=bool)
        np.put_along_axis(mask, best, True, axis=1)
        return mask

    expected, places = by_hand(weight, gram, 0.01, 4, choose)
    assert mask.tolist() == places.tolist()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_least_squares_is_the_minimum_for_each_row():
    weight, x, gram = layer()
    mask = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[2] = False  # a row of which nothing is left
    found, same = LeastSquares(damping=1e-9)(weight=weight, gram=gram, mask=mask)
    assert torch.equal(same, mask) and not found[~mask].any()
    for row in range(6):
        kept = mask[row].numpy()
        goal = x.double().numpy() @ weight[row].double().numpy()
        solution, *_ = np.linalg.lstsq(x.double().numpy()[:, kept], goal, rcond=None)
        np.testing.assert_allclose(found[row].numpy()[kept], solution, rtol=1e-3, atol=1e-4)


def test_damping_pulls_towards_the_weights_there_were():
    """It stands for inputs of independent noise: with much of it the kept weights stay as they were."""
    weight, _, gram = layer()
    mask = torch.ones(6, 12, dtype=torch.bool)
    mask[:, ::2] = False
    found, _ = LeastSquares(damping=1e6)(weight=weight, gram=gram, mask=mask)
    torch.testing.assert_close(found, weight * mask, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_surgery_loses_less_than_zeroing(seed):
    weight, x, gram = layer(seed, out=16, size=32, positions=200)
    quota = Quota(Local(), 256, (16, 32))
    zeroed = weight * quota.choose(weight.abs(), 0)
    solved, _ = LeastSquares()(weight=weight, gram=gram, mask=zeroed != 0)
    surgery, _ = SparseGPT()(weight=weight, gram=gram, quota=quota)
    assert max(error(weight, surgery, x), error(weight, solved, x)) < error(weight, zeroed, x)
    again, _ = LeastSquares(damping=1e-9)(weight=weight, gram=gram, mask=surgery != 0)
    assert error(weight, again, x) < error(weight, surgery, x)  # the optimum of its own mask


def test_inputs_that_are_never_on_lose_their_weights_first():
    weight, _, gram = layer()
    gram[3], gram[:, 3] = 0.0, 0.0
    found, _ = SparseGPT()(weight=weight, gram=gram, quota=Quota(Local(), 36, (6, 12)))
    assert not found[:, 3].any() and found.isfinite().all()


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 7), st.floats(0.0, 1.0))
def test_spans_keep_the_quota_together(out, size, span, share):
    num = round(share * out * size)
    quota = Quota(ERK(), num, (out, size))
    widths = [min(span, size - start) for start in range(0, size, span)]
    masks = [quota.choose(torch.rand(out, w), i * span) for i, w in enumerate(widths)]
    assert sum(int(mask.sum()) for mask in masks) == num


def test_rows_keep_equally_many():
    quota = Quota(PerRow(), 15, (3, 10))
    masks = torch.cat([quota.choose(torch.rand(3, 4)[:, : 10 - start], start) for start in (0, 4, 8)], 1)
    assert masks.sum(1).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SparseGPT(damping=0.0), "`damping` is a number above 0, but got 0.0"),
        (lambda: SparseGPT(block_size=0), "`block_size`"),
        (lambda: LeastSquares(damping=-1.0), "`damping`"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
