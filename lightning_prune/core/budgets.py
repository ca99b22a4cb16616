"""What a pruned model may cost, in place of a sparsity."""

from __future__ import annotations

from dataclasses import dataclass, fields

KINDS = ("params", "macs", "num_bytes", "latency")


@dataclass(frozen=True)
class Budget:
    """What a smaller model may cost, as a fraction of what the dense one costs; exactly one of the four is given.

    Group sparsity, parameters and multiply-accumulates are not the same: half of all channels leave about a quarter
    of the weights of a layer, since it loses inputs and outputs, and early layers hold few weights but much of the
    work. A budget is solved for: sparsity is searched until the cost fits.

    Cost: sparsity is searched by counting, at each update; for `latency` some twenty smaller copies at most are timed,
        once.

    When: coupled groups, where it is known what the model may cost, and not how many channels that is.

    Args:
        params: parameters, in (0, 1).
        macs: multiply-accumulates of the example call, in (0, 1).
        num_bytes: bytes of parameters and buffers, in (0, 1).
        latency: time of the example call, measured on this machine, in (0, 1). It holds for calls of that batch size:
            a small batch gains less, since part of its time does not depend on the model's width.
        tolerance: how far from the budget the result may lie, relative to the dense cost, in (0, 1).

    Raises:
        ValueError: none or several are given, or one is out of its range.

    Example:
        >>> Budget(macs=0.5).kind, Budget(macs=0.5).fraction
        ('macs', 0.5)
    """

    params: float | None = None
    macs: float | None = None
    num_bytes: float | None = None
    latency: float | None = None
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in KINDS if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(f"`budget` is exactly one of {list(KINDS)}, but got {given or 'none'}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < 1):
                raise ValueError(
                    f"`{field.name}` is a fraction of the dense model's cost, in (0, 1), but got {value!r}."
                )

    def __str__(self) -> str:
        """Return what is given, as it would be written."""
        more = f", tolerance={self.tolerance}" if self.tolerance != type(self).tolerance else ""
        return f"Budget({self.kind}={self.fraction}{more})"

    @property
    def kind(self) -> str:
        """What is limited: "params", "macs", "num_bytes" or "latency"."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The limit, as a fraction of the dense model's cost."""
        return float(getattr(self, self.kind))
