"""What Hydra's overrides let Optuna choose from, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def distribution(override: Override) -> BaseDistribution:
    """Return what an override lets Optuna choose from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if override.is_choice_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        is_log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=is_log)
        return FloatDistribution(float(value.start), float(value.end), log=is_log)
    if isinstance(value, RangeSweep) and all(
        isinstance(v, int) for v in (value.start, value.stop, value.step)
    ):
        last = list(value.range())[-1]
        return IntDistribution(int(value.start or 0), int(last), step=int(value.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def read(text: str, kind: BaseDistribution) -> Any:
    """Return a setting of the command line as Optuna has it."""
    from optuna.distributions import FloatDistribution, IntDistribution

    if isinstance(kind, IntDistribution):
        return int(text)
    return float(text) if isinstance(kind, FloatDistribution) else text


def contains(kind: BaseDistribution, value: Any) -> bool:
    """Whether Optuna may choose a value."""
    try:
        return bool(kind._contains(kind.to_internal_repr(value)))
    except ValueError:
        return False
