"""What `sensitivity.py` does: prune one layer at a time, write the curves as they grow, and draw them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_prune.core.checks import check_choice, check_sparsity
from lightning_prune.core.directions import checked_mode
from lightning_prune.core.scopes.curves import allocate
from lightning_prune.model.sensitivity import Curves, sensitivity
from lightning_prune.model.targets import select_targets
from lightning_prune.report.progress import showing, steps

if TYPE_CHECKING:
    import lightning as L

CURVES_FILE, PICTURE_FILE = "sensitivity.json", "sensitivity.png"


def analyse(
    trainer: L.Trainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule,
    folder: Path,
    *,
    metric: str,
    sparsities: Sequence[float],
    sparsity: float,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    curves: str | Path | None = None,
    mode: str | None = None,
) -> dict[str, float]:
    """Validate a trained model with each layer pruned by itself, show and draw the curves, and allocate a sparsity.

    The curves are in `sensitivity.json` after every validation: what is interrupted goes on with `curves`.

    Args:
        trainer: which validates.
        model: trained; it is left as it was.
        datamodule: with validation data.
        folder: for `sensitivity.json` and, where matplotlib is installed, `sensitivity.png`.
        metric: that the validation logs.
        sparsities: to which each layer is pruned, in [0, 1).
        sparsity: over all, in [0, 1).
        include: patterns of what to look at.
        exclude: patterns of what to leave out.
        curves: a file of a run before, with the same metric.
        mode: "min" or "max", what is better of the metric; by default as its name says.

    Returns:
        The sparsities by layer that lose least for `sparsity`.

    Raises:
        ValueError: a value out of its range, a metric that is not logged, curves of something else, or a sparsity
            that the curves do not reach.
    """
    _check_sparsities(sparsity, sparsities)
    targets = select_targets(model, include=include, exclude=exclude)
    done = _read(Path(curves), metric, targets) if curves is not None else {}
    path = folder / CURVES_FILE

    def shown(runs: Iterable[Any]) -> Iterator[Any]:
        """Write what there is after each run; `sensitivity` fills `done` in place."""
        with showing():
            for run in steps(list(runs), "layers"):
                yield run
                _write(path, metric, checked_mode(metric, mode), done)

    evaluate = partial(_validated, trainer, datamodule, metric, mode)
    with _told_where(path):
        found = sensitivity(
            model, evaluate, sparsities, include=include, exclude=exclude, done=done, progress=shown
        )
    mode = checked_mode(metric, mode)
    allocation = allocate(found, {name: p.numel() for name, p in targets.items()}, sparsity, mode=mode)
    _write(path, metric, mode, found, allocation)
    _show(metric, found, allocation)
    _draw(folder / PICTURE_FILE, metric, found)
    return allocation


def _check_sparsities(sparsity: float, sparsities: Sequence[float]) -> None:
    for value in (sparsity, *sparsities):
        check_sparsity("sparsity", value)
    largest = max(sparsities, default=0.0)
    if sparsity > largest:
        raise ValueError(f"`sparsity` is at most the largest of `sparsities`, {largest}, but got {sparsity}.")


def _validated(
    trainer: L.Trainer,
    datamodule: L.LightningDataModule,
    metric: str,
    mode: str | None,
    model: L.LightningModule,
) -> float:
    """Return a metric that validation logs, if it is known what is better of it."""
    found = trainer.validate(model, datamodule, verbose=False)
    logged = found[0] if found else {}
    if not logged:
        raise ValueError("`data` has validation data for this, but got none: set data.num_val.")
    check_choice("metric", metric, logged)
    checked_mode(metric, mode)
    return float(logged[metric])


@contextmanager
def _told_where(path: Path) -> Iterator[None]:
    """Say where the curves lie if one is interrupted: a trainer that validates ends the process itself."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if path.is_file():
            Console().print(
                f"The curves so far lie in {path}; go on with curves={path}.", soft_wrap=True, markup=False
            )
        raise


def _read(path: Path, metric: str, targets: Mapping[str, object]) -> Curves:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        curves = {name: {float(s): float(v) for s, v in c.items()} for name, c in known["curves"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`curves` is a {CURVES_FILE} of a run before, but got {path}: {error!r}.") from None
    if known.get("metric") != metric:
        raise ValueError(f"`metric` is that of `curves`, {known.get('metric')!r}, but got {metric!r}.")
    if strangers := sorted(set(curves) - set(targets)):
        raise ValueError(
            f"`curves` has the layers of this model, but got {strangers} as well, which are none."
        )
    return curves


def _write(
    path: Path, metric: str, mode: str, curves: Curves, allocation: Mapping[str, float] | None = None
) -> None:
    """Write the file as a whole or not at all."""
    half = path.with_suffix(".tmp")
    held: dict[str, Any] = {"metric": metric, "is_lower_better": mode == "min", "curves": curves}
    held |= {"allocation": allocation} if allocation else {}
    half.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    half.replace(path)


def _show(metric: str, curves: Curves, allocation: Mapping[str, float]) -> None:
    sparsities = sorted({s for curve in curves.values() for s in curve})
    table = Table(metric, *(f"{s:.0%}" if s else "dense" for s in sparsities), "allocated")
    for name, curve in curves.items():
        cells = [f"{curve[s]:.4f}" if s in curve else "" for s in sparsities]
        table.add_row(name, *cells, f"{allocation[name]:.3f}")
    Console().print(table)


def _draw(path: Path, metric: str, curves: Curves) -> None:
    from lightning_prune.plots import plot_sensitivity

    try:
        plot_sensitivity(curves, metric, path)
    except ImportError as error:
        Console().print(f"no picture: {error}", markup=False)
