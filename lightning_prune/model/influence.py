"""How much residual blocks and branches change what they add to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.depth import LINEAR, Block, stream_of
from lightning_prune.graph.run import plain_name
from lightning_prune.graph.sandbox import plain_kernels
from lightning_prune.model.statistics import Statistics


class Influence(Statistics):
    """The influence of each block or branch, a mean over the forward passes inside of `watch`.

    Men et al. 2024, ShortGPT (arXiv:2403.03853), eq. 1: 1 - E[cos(x, y)] over the positions of all examples, where y is
    what the block makes of x, or the residual stream x with the branch.

    Args:
        model: the module that holds the blocks.
        blocks: by path.
        called: the modules that were traced when the blocks were found, `model` or parts of it.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Block], called: Iterable[nn.Module]) -> None:
        super().__init__(model, {}, ())
        self.blocks, self.called = dict(blocks), list(dict.fromkeys(called))
        self.modules = {path: model.get_submodule(path) for path in blocks}
        self.clear()

    @property
    def activations(self) -> tuple[str, ...]:
        """What needs hooks on forward passes."""
        return ("influence",)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sum up the cosines over the forward passes inside."""
        additions = _Additions(self)
        with ExitStack() as stack:
            if any(block.is_branch for block in self.blocks.values()):
                stack.enter_context(plain_kernels())
                for part in self.called:
                    stack.callback(part.register_forward_pre_hook(additions.begin).remove)
                    stack.callback(part.register_forward_hook(additions.end, always_call=True).remove)
            for path, block in self.blocks.items():
                see = additions.follow if block.is_branch else self._see
                hook = partial(see, path, block.argument)
                stack.callback(self.modules[path].register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _see(
        self, path: str, argument: str | None, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        self.add_(path, args[0] if args else kwargs[argument or ""], _first(output))

    @torch.no_grad()
    def add_(self, path: str, x: Tensor, y: Tensor) -> None:
        """Count the positions of x, and how alike y is there."""
        dim = feature_dim(self.modules[path], x)
        cosine = nn.functional.cosine_similarity(x.double(), y.double(), dim=dim)
        total, count = self._cosines.get(path, (0.0, 0))
        self._cosines[path] = total + float(cosine.sum()), count + cosine.numel()

    def clear(self) -> None:
        """Forget what was seen."""
        self._cosines: dict[str, tuple[float, int]] = {}

    def sums(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {"cosines": dict(self._cosines)}

    def load_sums(self, found: Mapping[str, Any]) -> None:
        """Go on from what `sums` returned."""
        self._cosines = dict(found["cosines"])

    def influence(self) -> Mapping[str, float]:
        """Return path -> influence, in [0, 2]: 0 only scales what it is added to; empty if nothing was seen."""
        return {path: 1.0 - total / count for path, (total, count) in self._cosines.items()}


class _Additions(TorchDispatchMode):
    """Follows what branches return to where it is added to the stream."""

    def __init__(self, seen_by: Influence) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen_by = seen_by
        self.followed: dict[int, tuple[str, Tensor]] = {}
        self.num_open = 0  # calls, of which one may be made within another

    def begin(self, *_: Any) -> None:
        if not self.num_open:
            self.followed = {}
            self.__enter__()  # type: ignore[no-untyped-call]
        self.num_open += 1

    def end(self, *_: Any) -> None:
        if not self.num_open:  # where another hook has failed, it never began
            return
        self.num_open -= 1
        if not self.num_open:
            self.followed = {}
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def follow(self, path: str, _: str | None, __: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = _first(output)
        self.followed[id(tensor)] = path, tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = plain_name(func), kwargs or {}
        met = [self.followed[id(a)] for a in args if id(a) in self.followed]
        if not met or name not in {"add"} | LINEAR:
            return func(*args, **kwargs)
        path, branch = met[0]
        stream = stream_of(name, args, kwargs, branch)
        before = stream.clone() if stream is not None else None
        output = func(*args, **kwargs)
        if before is not None:
            self.seen_by.add_(path, before, output)
            del self.followed[id(branch)]
        else:
            self.followed[id(output)] = path, output
        return output


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


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
