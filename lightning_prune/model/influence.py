"""How much residual blocks change their input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_prune.model.statistics import Statistics


class Influence(Statistics):
    """The influence of each block, a mean over the forward passes inside of `watch`.

    Men et al. 2024, ShortGPT (arXiv:2403.03853), eq. 1: 1 - E[cos(x, f(x))] over the positions of all examples.

    Args:
        model: the module that holds the blocks.
        paths: of the blocks.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        super().__init__(model, {}, ())
        self.blocks = {path: model.get_submodule(path) for path in paths}
        self.clear()

    @property
    def activations(self) -> tuple[str, ...]:
        """What needs hooks on forward passes."""
        return ("influence",)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sum up the cosines over the forward passes inside."""
        with ExitStack() as stack:
            for path, block in self.blocks.items():

                def hook(block: nn.Module, args: Any, output: Any, path: str = path) -> None:
                    self._add_(path, block, args[0], output)

                stack.callback(block.register_forward_hook(hook).remove)
            yield

    @torch.no_grad()
    def _add_(self, path: str, block: nn.Module, x: Tensor, output: Any) -> None:
        y = output[0] if isinstance(output, (tuple, list)) else output
        cosine = nn.functional.cosine_similarity(x.double(), y.double(), dim=feature_dim(block, x))
        total, count = self._cosines.get(path, (0.0, 0))
        self._cosines[path] = total + float(cosine.sum()), count + cosine.numel()

    def clear(self) -> None:
        """Forget what was seen."""
        self._cosines: dict[str, tuple[float, int]] = {}

    def influence(self) -> Mapping[str, float]:
        """Return path -> influence, in [0, 2]: 0 is a block that only scales its input; empty if nothing was seen."""
        return {path: 1.0 - total / count for path, (total, count) in self._cosines.items()}


def feature_dim(block: nn.Module, x: Tensor) -> int:
    """Return the dim of a block's input along which its features lie: the last one, or that of its convolutions.

    Example:
        >>> images, tokens = torch.zeros(2, 8, 5, 5), torch.zeros(2, 5, 8)
        >>> feature_dim(nn.Conv2d(8, 8, 3), images), feature_dim(nn.Linear(8, 8), tokens)
        (1, -1)
    """
    for module in block.modules():
        if isinstance(module, _ConvNd) and x.dim() == len(module.kernel_size) + 2:
            if x.shape[1] == module.in_channels:
                return 1
        elif isinstance(module, _BatchNorm) and x.dim() > 3 and x.shape[1] == module.num_features:
            return 1
    return -1
