"""Laws of every criterion, and each one against numpy or the definition written out."""

import math

import numpy as np
import pytest
import torch

from lightning_prune import (
    OBD,
    ActivationVariance,
    APoZ,
    BatchNormScale,
    Fisher,
    GeometricMedian,
    GraSP,
    Magnitude,
    MeanActivation,
    Movement,
    Random,
    Saliency,
    SecondOrderTaylor,
    Taylor,
    Wanda,
)
from lightning_prune.core.criteria import check_can_calibrate, check_can_train, required_statistics
from lightning_prune.model.statistics import KNOWN
from tests.members import members

SHAPES = [(4, 8), (6, 4, 3, 3), (5, 2, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def statistics(criterion, shape, dtype=torch.float32):
    """Random statistics of the shapes that the collector gives."""
    draw = torch.Generator().manual_seed(0)
    rest = [1] * (len(shape) - 2)
    made = {
        "weight": torch.randn(shape, generator=draw).to(dtype),
        "grad": torch.randn(shape, generator=draw).to(dtype),
        "movement": torch.randn(shape, generator=draw).to(dtype),
        "input_norm": torch.rand(1, shape[1], *rest, generator=draw),
        "output_mean": torch.rand(shape[0], 1, *rest, generator=draw),
        "grad_mean": torch.randn(shape, generator=draw),
        "grad_square": torch.rand(shape, generator=draw),
        "hessian_diagonal": torch.randn(shape, generator=draw).to(dtype),
        "hessian_gradient": torch.randn(shape, generator=draw).to(dtype),
        "flow_gradient": torch.rand(shape, generator=draw, dtype=torch.float64),
        "norm_scale": torch.rand(shape[0], 1, *rest, generator=draw),
        "output_variance": torch.rand(shape[0], 1, *rest, generator=draw),
        "output_positive": torch.rand(shape[0], 1, *rest, generator=draw),
        "name": "net.0.weight",
    }
    return {name: made[name] for name in required_statistics(criterion)}


@pytest.mark.parametrize("criterion", members("criterion"), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_criterion_is_pure_and_keeps_the_shape(criterion, shape, dtype):
    stats = statistics(criterion, shape, dtype)
    before = {k: v.clone() for k, v in stats.items() if torch.is_tensor(v)}
    scores = criterion(**stats)
    assert scores.shape == shape and scores.is_floating_point() and scores.isfinite().all()
    assert torch.equal(scores, criterion(**stats))
    assert all(torch.equal(stats[k], v) for k, v in before.items())


@pytest.mark.parametrize("criterion", members("criterion"), ids=str)
def test_criterion_asks_for_statistics_that_exist(criterion):
    assert set(required_statistics(criterion)) <= set(KNOWN)


def test_magnitude_is_the_absolute_value_to_the_power():
    w = np.array([[-3.0, 0.5], [0.0, 2.0]])
    np.testing.assert_allclose(Magnitude(p=3)(weight=torch.tensor(w)), np.abs(w) ** 3)


def test_random_depends_on_seed_and_name_alone():
    w = torch.ones(50, 50)
    scores = Random(seed=1)(weight=w, name="a.weight")
    assert torch.equal(scores, Random(seed=1)(weight=-w, name="a.weight"))
    assert not torch.equal(scores, Random(seed=2)(weight=w, name="a.weight"))
    assert not torch.equal(scores, Random(seed=1)(weight=w, name="b.weight"))
    assert (
        abs(float(scores.mean()) - 0.5) < 4 / math.sqrt(12 * 2500) and 0 <= scores.min() <= scores.max() < 1
    )


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Random()(weight=torch.ones(9, 9), name="a")
    assert torch.equal(torch.rand(3), expected)


def test_geometric_median_against_scipy():
    distance = pytest.importorskip("scipy.spatial.distance")
    w = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    expected = distance.squareform(distance.pdist(w.flatten(1).numpy())).sum(1)
    scores = GeometricMedian()(weight=w)
    np.testing.assert_allclose(scores[:, 0, 0, 0], expected, rtol=1e-5)
    assert torch.equal(scores, scores[:, :1, :1, :1].expand(w.shape))


def test_saliency_is_the_first_order_change_of_the_loss():
    """|L(w) - L(w without w_i)| of a linear loss is |w_i dL/dw_i| exactly."""
    w, slope = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, 0.7, -4.0]])
    change = [
        abs(float((w * slope).sum()) - float((w * slope * (torch.arange(3) != i)).sum())) for i in range(3)
    ]
    np.testing.assert_allclose(Saliency()(weight=w, grad=slope)[0], change, rtol=1e-6)


def quadratic():
    """L(w) = g.(w - w0) + (w - w0) H (w - w0) / 2 around w0, with a diagonal H: all expansions are exact."""
    w, g, h = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.7, -4.0]), np.array([2.0, 0.5, -1.0])

    def without(i):
        step = np.where(np.arange(3) == i, -w, 0.0)
        return g @ step + step @ np.diag(h) @ step / 2

    return w, g, h, np.array([without(i) for i in range(3)])


def test_second_order_criteria_are_the_change_of_a_quadratic_loss():
    w, g, h, change = quadratic()
    numbers = {"weight": torch.tensor(w), "hessian_diagonal": torch.tensor(h)}
    np.testing.assert_allclose(SecondOrderTaylor()(**numbers, grad=torch.tensor(g)), change**2)
    at_a_minimum = change + w * g  # without the gradient's part
    np.testing.assert_allclose(OBD()(**numbers), at_a_minimum)
    np.testing.assert_allclose(
        Fisher()(weight=torch.tensor(w), grad_square=torch.tensor(g**2)), (w * g) ** 2 / 2
    )


def test_taylor_of_a_group_is_the_sum_of_squares():
    w, g = np.array([[1.0, -2.0], [3.0, 3.0]]), np.array([[4.0, 1.0], [1.0, 1.0]])
    scores = Taylor()(weight=torch.tensor(w), grad=torch.tensor(g)).sum(1)
    np.testing.assert_allclose(scores, [4**2 + 2**2, 3**2 + 3**2])
    assert scores[0] > scores[1]  # by the sum of absolute values both are alike


def test_grasp_keeps_what_the_squared_gradient_would_lose_most():
    """For L = w H w / 2, |dL/dw|^2 = |H w|^2, and the score is its decrease to first order, by finite differences."""
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(4, 4))
    hessian, w, step = matrix + matrix.T, draw.normal(size=4), 1e-6
    flow = lambda v: float(np.sum((hessian @ v) ** 2)) / 2  # noqa: E731
    slopes = [(flow(w + step * e) - flow(w - step * e)) / (2 * step) for e in np.eye(4)]
    scores = GraSP()(weight=torch.tensor(w), hessian_gradient=torch.tensor(hessian @ hessian @ w))
    np.testing.assert_allclose(scores, w * np.array(slopes), rtol=1e-4)


def test_statistics_that_training_or_batches_do_not_show_are_refused():
    with pytest.raises(
        ValueError, match=r"got OBD\(\), which takes passes of its own .*: use InitialPruning"
    ):
        check_can_train(OBD())
    with pytest.raises(ValueError, match=r"got Movement\(\), a sum over training: use TrainTimePruning"):
        check_can_calibrate(Movement())
    for criterion in (Taylor(), Fisher(), Wanda(), Magnitude()):
        check_can_train(criterion), check_can_calibrate(criterion)


def test_movement_and_activation_criteria_against_their_formulas():
    w = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert torch.equal(Movement()(movement=-w), -w)
    norm = torch.tensor([[2.0, 0.1]])
    np.testing.assert_allclose(Wanda()(weight=w, input_norm=norm), np.abs(w.numpy()) * norm.numpy())
    per_output = torch.tensor([[0.2], [0.9]])
    for scores in (
        MeanActivation()(weight=w, output_mean=per_output),
        APoZ()(weight=w, output_positive=per_output),
        ActivationVariance()(weight=w, output_variance=per_output),
        BatchNormScale()(weight=w, norm_scale=per_output),
    ):
        assert scores.tolist() == pytest.approx(np.array([[0.2, 0.2], [0.9, 0.9]]))


def test_a_criterion_with_other_than_keyword_arguments_is_refused():
    with pytest.raises(ValueError, match=r"keyword-only arguments, \(\*, weight, \.\.\.\)"):
        required_statistics(lambda weight: weight)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Magnitude(p=0), r"`p` is a number above 0, but got 0"),
        (lambda: Random(seed=-1), r"`seed` is a whole number of at least 0, but got -1"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
