"""Solvers against the published formulas in numpy, without their shortcuts."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import ALPS, ERK, LeastSquares, Local, NofM, PerRow, SparseGPT, WoodFisher
from lightning_prune.core.quotas import Quota
from lightning_prune.core.solvers import needs_of
from tests.members import members


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


def split_by_hand(weight, gram, keep, penalty=0.1, damping=0.01):
    """ALPS, section 3.2, with a system solved at each step and no decomposition."""
    w, h = weight.double().numpy(), gram.double().numpy()
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    scale = np.sqrt(np.diag(h))
    w, h = w * scale, h / scale / scale[:, None]

    def largest(x):
        places = np.argsort(-np.abs(x), axis=None, kind="stable")[:keep]
        mask = np.zeros(x.size, dtype=bool)
        mask[places] = True
        return mask.reshape(x.shape)

    mask = known = largest(w)
    d, v = w * mask, np.zeros_like(w)
    for step in range(1, 301):
        dense = np.linalg.solve(h + penalty * np.eye(len(h)), (w @ h - v + penalty * d).T).T
        mask = largest(dense + v / penalty)
        d = (dense + v / penalty) * mask
        v = v + penalty * (dense - d)
        if step % 3 == 0:
            changed = (mask ^ known).sum() / keep
            if changed == 0:
                break
            penalty *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            known = mask
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_alps_is_the_published_splitting_with_the_best_values_after_it(seed):
    weight, _, gram = layer(seed)
    found, mask = ALPS()(weight=weight, gram=gram, quota=Quota(Local(), 30, (6, 12)))
    assert mask.tolist() == split_by_hand(weight, gram, 30).tolist() and int(mask.sum()) == 30
    expected, _ = LeastSquares()(weight=weight, gram=gram, mask=mask)
    assert torch.equal(found, expected)


def test_alps_finds_the_best_of_all_masks_often_and_is_nearer_to_it_than_the_others():
    """One row of ten weights, of which four stay: every choice is tried."""
    excess = {"alps": [], "surgery": [], "largest": []}
    for seed in range(12):
        weight, x, gram = layer(seed, out=1, size=10, positions=30)
        quota, solve = Quota(Local(), 4, (1, 10)), LeastSquares(1e-6)
        masks = torch.zeros(210, 1, 10, dtype=torch.bool)
        for index, places in enumerate(combinations(range(10), 4)):
            masks[index, 0, list(places)] = True
        best = min(error(weight, solve(weight=weight, gram=gram, mask=m)[0], x) for m in masks)
        known = {"weight": weight, "gram": gram}
        found = {
            "alps": ALPS(damping=1e-6)(**known, quota=quota)[0],
            "surgery": SparseGPT(damping=1e-6)(**known, quota=quota)[0],
            "largest": solve(**known, mask=quota.choose(weight.abs(), 0))[0],
        }
        for name, new in found.items():
            excess[name].append(error(weight, new, x) / best - 1)
    assert min(excess["alps"]) > -1e-3 and sum(e < 1e-3 for e in excess["alps"]) >= 4
    assert np.mean(excess["alps"]) < 0.6 * min(np.mean(excess["surgery"]), np.mean(excess["largest"]))


def gradients(seed=0, num=9, out=3, size=8):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(out, size, generator=draw), torch.randn(num, out, size, generator=draw)


def fisher_by_hand(samples, damping):
    """The inverse of one block by Woodbury's recursion, eq. 9 of the paper, a gradient at a time."""
    n, size = samples.shape
    inverse = np.eye(size) / damping
    for g in samples:
        column = inverse @ g
        inverse = inverse - np.outer(column, column) / (n + g @ column)
    return inverse


@pytest.mark.parametrize("block", [4, 5, 24, 100])
def test_wood_fisher_prunes_by_the_inverse_of_each_block(block):
    weight, grads = gradients()
    found, mask = WoodFisher(block)(weight=weight, gradients=grads, quota=Quota(Local(), 10, (3, 8)))
    flat, samples = weight.double().flatten().numpy(), grads.double().flatten(1).numpy()
    parts = [slice(i, min(i + block, 24)) for i in range(0, 24, block)]
    kept, result = mask.flatten().numpy(), found.flatten().numpy()
    costs, added = np.zeros(24), 0.1 * np.mean(samples**2)
    for part in parts:
        inverse = fisher_by_hand(samples[:, part], added)
        costs[part] = flat[part] ** 2 / (2 * np.diag(inverse))
        gone = ~kept[part]
        # all that go at once: w - F^-1 E (E^T F^-1 E)^-1 E^T w
        change = inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], flat[part][gone])
        np.testing.assert_allclose(result[part], flat[part] - change, rtol=1e-3, atol=1e-4)
    assert costs[kept].min() >= costs[~kept].max() and int(mask.sum()) == 10


def test_a_block_of_one_is_optimal_brain_damage_and_nothing_makes_up_for_it():
    weight, grads = gradients()
    found, mask = WoodFisher(1, damping=1e-9)(
        weight=weight, gradients=grads, quota=Quota(Local(), 10, (3, 8))
    )
    cost = (weight.square() * grads.square().mean(0)).flatten()
    assert torch.equal(mask.flatten(), cost >= cost.sort(descending=True).values[9])
    torch.testing.assert_close(found, weight * mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [ALPS(), SparseGPT(), WoodFisher(3), WoodFisher(24)], ids=str)
def test_weights_that_nothing_depends_on_go_first_however_large(solver):
    """An input that is never on; it must not count as one that is on by itself, however small the others are."""
    weight, x, _ = layer(out=3, size=8)
    grads = gradients()[1]
    weight[:, 2] *= 100.0
    x[:, 2] = grads[:, :, 2] = 0.0
    known = {"weight": weight, "quota": Quota(Local(), 12, (3, 8))}
    known |= {"gram": 1e-6 * x.t() @ x, "gradients": 1e-6 * grads}
    _, mask = solver(**{name: known[name] for name in needs_of(solver)})
    assert int(mask.sum()) == 12 and not mask[:, 2].any()


def test_inputs_that_are_never_on_cost_no_more_weights_than_the_quota_says():
    """Where they are more than go, those that stay keep their weights: zeros beside the masks would not be counted."""
    weight, x, _ = layer(out=3, size=8)
    x[:, :6] = 0.0
    found, mask = SparseGPT()(weight=weight, gram=x.t() @ x, quota=Quota(Local(), 12, (3, 8)))
    assert int(mask.sum()) == int(found.count_nonzero()) == 12 and bool(mask[:, 6:].all())
    assert torch.equal(found[mask], weight[mask])


@pytest.mark.parametrize("solver", members("solver"), ids=str)
@pytest.mark.parametrize(("scope", "keep"), [(Local(), 30), (PerRow(), 36), (NofM(), 36)], ids=str)
def test_a_solver_keeps_what_the_quota_says_changes_nothing_and_decides_the_same_again(solver, scope, keep):
    weight, _, gram = layer()
    draw = torch.Generator().manual_seed(3)
    known = {
        "weight": weight,
        "gram": gram,
        "gradients": torch.randn(5, *weight.shape, generator=draw),
        "quota": Quota(scope, keep, (6, 12)),
        "mask": scope({"": weight.abs()}, 1 - keep / 72)[""],
    }
    offered = {name: known[name] for name in needs_of(solver)}
    before = {name: value.clone() for name, value in offered.items() if torch.is_tensor(value)}
    found, mask = solver(**offered)
    again, same = solver(**offered)
    assert torch.equal(found, again) and torch.equal(mask, same)
    assert all(torch.equal(offered[name], value) for name, value in before.items())
    assert int(mask.sum()) == keep and not found[~mask].any() and found.dtype == weight.dtype
    if scope == PerRow():
        assert set(mask.sum(1).tolist()) == {6}
    if scope == NofM():
        assert (mask.view(-1, 4).sum(1) == 2).all()


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
        (lambda: ALPS(penalty=0.0), "`penalty` is a number above 0"),
        (lambda: ALPS(num_steps=0), "`num_steps`"),
        (lambda: WoodFisher(block_size=0), "`block_size`"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
