"""A batch runs through an example before training does: a network that does not fit the data is told at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_prune.callbacks.own_steps import silenced
from lightning_prune.examples.data import InMemory
from lightning_prune.examples.loading import as_sliced
from lightning_prune.examples.networks import GPT
from lightning_prune.examples.tasks import Task
from lightning_prune.model.calls import undisturbed

if TYPE_CHECKING:
    import lightning as L

NUM_EXAMPLES = 64  # enough to meet all classes


def rehearse(module: L.LightningModule, datamodule: L.LightningDataModule) -> set[str] | None:
    """Run a batch through the steps of an example, without a trace; modules of others are left alone.

    Returns:
        The names of the metrics that it logs, or None for a module that is no example.

    Raises:
        ValueError: the network cannot read the data, or its outputs are not what the data has labels for.
    """
    if not (isinstance(module, Task) and isinstance(datamodule, InMemory)):
        return None
    datamodule.setup("fit")
    examples: Any = datamodule.sets["train"]
    batch = as_sliced(examples.__getitems__(range(min(NUM_EXAMPLES, len(examples)))))
    names: set[str] = set()
    try:
        with undisturbed(module), silenced(module), torch.no_grad():
            vars(module)["log"] = lambda name, *_, **__: names.add(name)
            for step in (module.training_step, module.validation_step, module.test_step):
                step(batch, 0)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        told = f"{error}{_about_tokens(module, batch)}"
        raise ValueError(
            f"`model` reads and labels what `data` gives, but got {type(module.network).__name__} for "
            f"{type(datamodule).__name__} with inputs of shape {tuple(batch[0].shape[1:])}: {told}"
        ) from error
    return names


def _about_tokens(module: Task, batch: Any) -> str:
    """Return what is wrong with the size of a vocabulary, if it is that."""
    if not isinstance(module.network, GPT):
        return ""
    size, largest = module.network.embedding.num_embeddings, int(batch[0].max())
    return (
        f". `model.vocab_size` is above each token, {largest} here, but got {size}."
        if largest >= size
        else ""
    )
