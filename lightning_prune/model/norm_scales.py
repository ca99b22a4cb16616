"""The scales of the batch norms right behind layers: which norm reads what, a forward pass shows."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.core.types import Name
from lightning_prune.model.activations import owners_of
from lightning_prune.model.layouts import layout_of
from lightning_prune.model.shards import whole_of

KIND = "norm_scale"


class NormScales:
    """The scale |gamma| of each target's outputs in the batch norm that reads them.

    Args:
        model: the module that holds the targets.
        targets: parameters by name.

    Raises:
        ValueError: a target is no weight of a linear or convolution layer, or the model has no batch norm for it.
    """

    def __init__(self, model: nn.Module, targets: Mapping[Name, nn.Parameter]) -> None:
        self.model, self._layouts = model, {}
        for name, parameter in targets.items():
            layouts = [layout_of(owner, key) for owner, key in owners_of(model, parameter)]
            self._layouts[name] = [x for x in layouts if x is not None and x.from_output is not None]
            if not self._layouts[name]:
                raise ValueError(
                    f"`criterion` asks for `{KIND}`, which linear and convolution layers have, but `{name}` belongs to "
                    "none: exclude it."
                )
            if not _is_there(model, [layout.module for layout in self._layouts[name]]):
                raise ValueError(_without(name))
        self._norms: dict[nn.Module, _BatchNorm] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Find out which norm reads which layer's output in the forward passes inside."""
        outputs: dict[int, tuple[weakref.ref[Tensor], nn.Module]] = {}

        def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[id(output)] = weakref.ref(output), layer

        def before_norm(norm: nn.Module, args: tuple[Any, ...]) -> None:
            found, layer = outputs.get(id(args[0]) if args else 0, (lambda: None, norm))
            if found() is not None and found() is args[0] and isinstance(norm, _BatchNorm):
                self._norms[layer] = norm

        layers = {layout.module for layouts in self._layouts.values() for layout in layouts}
        with ExitStack() as stack:
            for module in self.model.modules() if layers else ():
                if module in layers:
                    stack.callback(module.register_forward_hook(after_layer).remove)
                elif isinstance(module, _BatchNorm) and module.affine:
                    stack.callback(module.register_forward_pre_hook(before_norm).remove)
            yield

    def sums(self) -> dict[str, str]:
        """Return which norm reads which layer's output, as far as it was seen, by their paths."""
        paths = {module: path for path, module in self.model.named_modules()}
        return {paths[layer]: paths[norm] for layer, norm in self._norms.items()}

    def load_sums(self, found: Mapping[str, str]) -> None:
        """Take over what `sums` returned."""
        modules: dict[str, Any] = dict(self.model.named_modules())
        self._norms = {modules[layer]: modules[norm] for layer, norm in found.items()}

    def read(self, name: Name) -> Tensor:
        """Return the scales behind one target as they are now, in the dims of its weight.

        Raises:
            ValueError: no batch norm with a scale reads what it gives.
        """
        for layout in self._layouts[name]:
            if (norm := self._norms.get(layout.module)) is not None and layout.from_output is not None:
                return layout.from_output(whole_of(norm.weight.detach()).abs())
        raise ValueError(_without(name))


def _without(name: Name) -> str:
    return (
        f"`{name}` has no `{KIND}`: no batch norm with a scale reads what it gives. Exclude it, or choose another "
        "criterion."
    )


def _is_there(model: nn.Module, layers: Iterable[nn.Module]) -> bool:
    """Whether there is a batch norm that could read what one of some layers gives, by their numbers of features."""
    given = {_num_outputs(layer) for layer in layers}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
    return any(None in given or norm.num_features in (0, *given) for norm in norms)  # 0: a lazy one


def _num_outputs(layer: nn.Module) -> int | None:
    found = [getattr(layer, key, None) for key in ("out_features", "out_channels")]
    return next((number for number in found if isinstance(number, int)), None)
