"""The passes over calibration batches that statistics take: forward, backward, and backward through the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from lightning_prune.model.curvature import hessian_product, signs
from lightning_prune.model.flow import flow_gradients
from lightning_prune.model.gradients import FLOW, Gradients
from lightning_prune.model.ranks import is_distributed
from lightning_prune.model.statistics import Statistics

Step = Callable[[nn.Module, Any], Any]


def passes_of(
    statistics: Statistics, model: nn.Module, forward: Step, loss: Step | None, mean: Gradients
) -> list[Callable[[Iterable[Any]], None]]:
    """Return what has to be run on the batches, one after the other, for all that `statistics` asks for.

    Args:
        statistics: what to read; each pass adds to them.
        model: the whole model.
        forward: (model, batch) -> anything.
        loss: (model, batch) -> scalar, where gradients of it are needed.
        mean: takes the gradients of a first pass that a second one needs.
    """
    kinds, found = set(statistics.gradients), statistics.from_gradients
    passes: list[Callable[[Iterable[Any]], None]] = []
    if loss is not None and kinds & {"grad", "grad_mean", "grad_square", "hessian_gradient"}:
        ledgers = [found, mean] if "hessian_gradient" in kinds else [found]
        passes.append(partial(_run_backward, statistics, model, loss, ledgers))
    elif statistics.activations:
        passes.append(partial(_run_forward, statistics, model, forward))
    if loss is not None and "hessian_diagonal" in kinds:
        passes.append(partial(_run_probes, found, model, loss))
    if loss is not None and "hessian_gradient" in kinds:
        passes.append(partial(_run_products, found, model, loss, mean))
    if FLOW in kinds:
        passes.append(partial(_run_flow, found, model, forward))
    return passes


def _run_forward(statistics: Statistics, model: nn.Module, forward: Step, batches: Iterable[Any]) -> None:
    with statistics.watch(), torch.no_grad():
        for batch in batches:
            forward(model, batch)


def _run_backward(
    statistics: Statistics, model: nn.Module, loss: Step, ledgers: list[Gradients], batches: Iterable[Any]
) -> None:
    with statistics.watch(), torch.enable_grad():
        for batch in batches:
            if (found := loss(model, batch)) is None:  # a step that skips a batch
                continue
            found.backward()
            for ledger in ledgers:
                ledger.note()
                ledger.confirm()
            model.zero_grad(set_to_none=True)


def _run_probes(found: Gradients, model: nn.Module, loss: Step, batches: Iterable[Any]) -> None:
    """Hutchinson: z * H z for a random vector of signs, one for each batch of each process."""
    rank = torch.distributed.get_rank() if is_distributed() else 0
    for batch in batches:
        index = max(found.counts["hessian_diagonal"].values(), default=0)  # batches that are done
        probe = signs(found.targets, seed=index + (rank << 32))
        product = hessian_product(partial(loss, model, batch), found.targets, probe)
        for name, value in product.items():
            found.add_("hessian_diagonal", name, value * probe[name])


def _run_products(
    found: Gradients, model: nn.Module, loss: Step, mean: Gradients, batches: Iterable[Any]
) -> None:
    """H g, where both are means over all batches of all processes."""
    mean.sum_over_processes_()
    vectors = {name: mean.read("grad", name) for name in mean.totals["grad"]}
    for batch in batches:
        product = hessian_product(partial(loss, model, batch), found.targets, vectors)
        for name, value in product.items():
            found.add_("hessian_gradient", name, value)


def _run_flow(found: Gradients, model: nn.Module, forward: Step, batches: Iterable[Any]) -> None:
    for batch in islice(batches, 1):
        for name, value in flow_gradients(model, found.targets, partial(forward, model, batch)).items():
            found.add_(FLOW, name, value)
