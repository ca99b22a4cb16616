"""A batch and a call of a module before it is trained, and what stands in their way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L

from lightning_prune.callbacks.own_steps import silenced, step_of
from lightning_prune.callbacks.structure import see_calls
from lightning_prune.model.calibration import calibrate
from lightning_prune.model.calls import Call, random_states_kept, undisturbed
from lightning_prune.model.gradients import FLOW
from lightning_prune.model.statistics import Statistics


def first_batch(data: Any, model: L.LightningModule, troubles: list[str]) -> tuple[Any, Any]:
    """Return the training loader and its first batch, or None for what cannot be had."""
    device = next((p.device for p in model.parameters()), model.device)
    try:
        with random_states_kept(device):
            loader = data
            if isinstance(data, L.LightningDataModule):
                data.prepare_data()
                data.setup("fit")
                loader = data.train_dataloader()
            batch = next(iter(loader), None)
    except Exception as error:  # whatever a user's data module raises
        troubles.append(f"`data` gives no batch: {type(error).__name__}: {error}")
        return None, None
    if batch is None:
        troubles.append("`data` gives at least one batch, but got none.")
    return loader, batch


def first_call(
    module: L.LightningModule, batches: Iterable[Any], trainer: L.Trainer | None, troubles: list[str]
) -> Call | None:
    """Return the calls of the model that its own step makes for some batches, on the CPU or where the model is."""
    from lightning.pytorch.utilities import move_data_to_device

    module._trainer = trainer
    device = next((p.device for p in module.parameters()), module.device)
    try:
        call = see_calls(module, (move_data_to_device(batch, device) for batch in batches)).call
    except Exception as error:  # whatever a user's step raises
        troubles.append(f"`training_step` does not run on the first batches: {type(error).__name__}: {error}")
        return None
    finally:
        module._trainer = None
    if call is None:
        troubles.append(f"a step of {type(module).__name__} calls no module that has parameters.")
    return call


def check_flow(module: L.LightningModule, statistics: Statistics, batch: Any) -> None:
    """See on a batch that the flow through the network reaches all that is scored by it, where it is asked for.

    Raises:
        ValueError: it does not, or exceeds what float64 can hold.
    """
    if FLOW not in statistics.names:
        return
    flow = Statistics(module, statistics.targets, (FLOW,))
    with undisturbed(module), silenced(module):
        calibrate(flow, module, [batch], forward=step_of(module))
    flow.read()
