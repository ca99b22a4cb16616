import subprocess
import sys

import pytest

from lightning_prune import Constant, Join, Linear, Polynomial, Window
from lightning_prune.core.windows import StepWindow
from lightning_prune.plots import NUM_POINTS, plot_schedule

pytest.importorskip("matplotlib")


def lines(figure):
    return [list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines]


def test_the_curve_is_the_schedule():
    (curve,) = lines(plot_schedule(Polynomial()))
    assert len(curve) == NUM_POINTS and curve[0] == (0.0, 0.0) and curve[-1] == (1.0, 1.0)
    assert all(y == pytest.approx(1 - (1 - x) ** 3) for x, y in curve)


@pytest.mark.parametrize(
    ("window", "expected", "label"),
    [
        (Window(0.1, 0.5, 0.15), [0.1, 0.25, 0.4, 0.5], "fraction of the run"),
        (Window(1, 2.5, 0.5, unit="epochs"), [1.0, 1.5, 2.0, 2.5], "epochs"),
        (Window(3, 17, 4, unit="steps"), [3, 7, 11, 15, 17], "optimizer steps"),
        (StepWindow(0, 5, 2), [0, 2, 4, 5], "optimizer steps"),
        (Window(0.3, 0.3), [0.3], "fraction of the run"),
    ],
)
def test_points_are_the_updates(window, expected, label):
    figure = plot_schedule(Linear(), window)
    points = lines(figure)[1]
    assert [x for x, _ in points] == pytest.approx(expected)
    assert figure.axes[0].get_xlabel() == label
    start, length = expected[0], expected[-1] - expected[0]
    assert [y for _, y in points] == pytest.approx(
        [(x - start) / length if length else 1.0 for x in expected]
    )


def test_what_is_reached_is_kept_until_the_run_ends():
    assert lines(plot_schedule(Constant(), Window(end=0.5)))[0][-1] == (1.0, 1.0)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture_is_saved(tmp_path, suffix):
    path = tmp_path / "pictures" / f"schedule.{suffix}"
    join = Join(schedules=(Linear(), Constant(), Polynomial()), boundaries=(0.3, 0.6), levels=(0.5, 0.8))
    plot_schedule(join, Window(), path)
    assert path.stat().st_size > 1000
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_a_missing_matplotlib_is_named_with_the_extra_that_brings_it():
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "from lightning_prune.core.schedules import Linear\n"
        "from lightning_prune.plots import plot_schedule\n"
        "try: plot_schedule(Linear())\n"
        "except ImportError as error: print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "lightning-prune[plots]"' in done.stdout
