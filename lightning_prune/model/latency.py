"""How long a call takes, by torch.utils.benchmark: on one thread, in turns where several are compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.benchmark import Timer

from lightning_prune.model.calls import Call
from lightning_prune.model.copies import copied
from lightning_prune.model.plain import is_plain
from lightning_prune.report.costs import Latency

NUM_ROUNDS = 10
MAX_ROUNDS = 40
SECONDS = 0.5  # of measuring each call, over all rounds
TINY = 1e-3  # of a layer's largest weight
MAX_SECONDS = 3.0  # of one call: what takes longer is not repeated often enough for quartiles


def measure_latencies(*calls: Call, seconds: float = SECONDS) -> tuple[Latency, ...]:
    """Measure calls in turns, so that what else the machine does falls on all of them alike.

    On the CPU it is the processor time of one thread, elsewhere the time on the clock with the device synchronised.
    Run it inside of `replaying`, for eval mode and no gradients.

    Args:
        calls: what is measured.
        seconds: of measuring each, above 0.

    Returns:
        Median and quartiles of each.

    Raises:
        ValueError: a call takes longer than `MAX_SECONDS`, or its device is neither CPU nor CUDA.

    Example:
        >>> (latency,) = measure_latencies(Call(torch.nn.ReLU(), (torch.zeros(9),), {}), seconds=0.01)
        >>> 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
        True
    """
    timers = [_timer(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(NUM_ROUNDS):
        for timer, found in zip(timers, times, strict=True):
            found += timer.blocked_autorange(min_run_time=seconds / NUM_ROUNDS).times
    return tuple(_summary(call, found) for call, found in zip(calls, times, strict=True))


def latency_ratio(first: Call, second: Call, *, precision: float) -> float:
    """Return how long the second call takes, as a fraction of the first: the median of rounds in turns.

    There are at least `NUM_ROUNDS`, and so many more that the median surely (95 %) lies within `precision` of what is
    returned, or `MAX_ROUNDS` on a machine so busy that it never does.

    Args:
        first: what the other is compared with.
        second: what is compared.
        precision: in fractions of the first call's time, above 0.
    """
    timers, ratios = [_timer(first), _timer(second)], list[float]()
    while len(ratios) < MAX_ROUNDS:
        one, other = (timer.blocked_autorange(min_run_time=SECONDS / NUM_ROUNDS).median for timer in timers)
        ratios.append(other / one)
        between = median_interval(ratios) if len(ratios) >= NUM_ROUNDS else None
        if between is not None and between[1] - between[0] <= 2.0 * precision:
            break
    return statistics.median(ratios)


def dense_twin(call: Call) -> Call:
    """Return the same call of a copy of the module whose weights have no zeros, to compare a masked one with.

    The zeros of all weights of at least two dims are replaced by plus or minus a thousandth of the layer's largest
    weight, so that the activations stay about as they are: pooling takes another time on other numbers (a small
    convnet's call 20 % less), and that would be taken for an effect of the zeros.

    Example:
        >>> twin = dense_twin(Call(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), {}))
        >>> bool((twin.module.weight != 0).all())
        True
    """
    module = copied(call.module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2 and parameter.numel() and is_plain(parameter):
                small = torch.full(parameter.shape, TINY * float(parameter.abs().max()) or TINY)
                small.view(-1)[::2] *= -1.0  # so that their sums are small too
                parameter.copy_(torch.where(parameter == 0, small.to(parameter), parameter))
    return replace(call, module=module)


def _timer(call: Call) -> Timer:
    if call.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"`device` is cpu or cuda, where torch's timer waits for the result, but got {call.device}."
        )
    settings: dict[str, Any] = {"stmt": "call()", "globals": {"call": call}, "num_threads": 1}
    if call.device.type == "cpu":
        settings["timer"] = time.process_time
    timer = Timer(**settings)
    if (seconds := timer.timeit(1).mean) > MAX_SECONDS:
        raise ValueError(
            f"`call` takes at most {MAX_SECONDS:g} s, but got one of {seconds:.1f} s: too long to repeat."
        )
    return timer


def _summary(call: Call, times: list[float]) -> Latency:
    low, median, high = (1000.0 * t for t in statistics.quantiles(times, n=4, method="inclusive"))
    clock = "cpu" if call.device.type == "cpu" else "wall"
    above, below = median_interval([1000.0 * t for t in times]) or (None, None)
    return Latency(median, low, high, len(times), str(call.device), 1, clock, above, below)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Return between which two of the values the median of their distribution lies, whatever it is.

    Order statistics: the number of n values below the median is binomial with p = 1/2, so the r-th smallest and the
    r-th largest enclose it with probability 1 - 2 P(B < r). The largest r that reaches the confidence is taken.

    Returns:
        The two values; None where even the smallest and the largest reach less.

    Example:
        >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), median_interval([1.0, 2.0, 3.0])
        ((1.0, 6.0), None)
    """
    n, found, tail = len(values), 0, 0.0
    for below in range(n // 2):
        tail += math.comb(n, below) * 0.5**n if n < 1000 else _normal_mass(below, n)
        if 2.0 * tail > 1.0 - confidence:
            break
        found = below + 1
    ordered = sorted(values)
    return (ordered[found - 1], ordered[n - found]) if found else None


def _normal_mass(below: int, n: int) -> float:
    """Return the probability that of n values so many lie below the median, where n is large."""
    return math.exp(-((below - n / 2) ** 2) / (n / 2)) / math.sqrt(math.pi * n / 2)
