"""Products of the loss's Hessian with vectors, by differentiating twice; the Hessian itself is never formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_prune.core.types import Name

Vectors = Mapping[Name, Tensor]


def hessian_product(
    loss: Callable[[], Tensor | None], parameters: Mapping[Name, nn.Parameter], vectors: Vectors
) -> dict[Name, Tensor]:
    """Return H v for the Hessian of a loss in some of its parameters: v = `vectors`, zero where there is none.

    Pearlmutter 1994: H v = d/dw (dL/dw . v), one more backward pass and the graph of the first.

    Args:
        loss: runs the model; its attention is computed by plain operations, which can be differentiated twice. Of None,
            a batch that is skipped, there is no product.
        parameters: by name; those that do not require gradients or that none reaches are left out.
        vectors: by name, of the parameters' shapes.

    Raises:
        ValueError: an operation of the model cannot be differentiated twice.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> hessian_product(lambda: w[0] * w[1] ** 2, {"w": w}, {"w": torch.tensor([1.0, 0.0])})
        {'w': tensor([0., 4.])}
    """
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            if (value := loss()) is None:
                return {}
            first = torch.autograd.grad(value, list(wanted.values()), create_graph=True, allow_unused=True)
            reached = {name: g for name, g in zip(wanted, first, strict=True) if g is not None}
            slope = sum((g * vectors[name]).sum() for name, g in reached.items() if name in vectors)
            if not (isinstance(slope, Tensor) and slope.requires_grad):
                return {name: torch.zeros_like(g) for name, g in reached.items()}
            second = torch.autograd.grad(slope, [wanted[name] for name in reached], allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        if not any(words in str(error) for words in ("derivative", "double backward")):
            raise
        raise ValueError(
            f"`criterion` asks for second derivatives, which an operation of the model does not have: {error}"
        ) from error
    return {
        name: torch.zeros_like(g) if h is None else h.detach()
        for (name, g), h in zip(reached.items(), second, strict=True)
    }


def signs(parameters: Mapping[Name, nn.Parameter], seed: int) -> dict[Name, Tensor]:
    """Return a random vector of +1 and -1 for each parameter, the same on every device.

    Example:
        >>> sorted(set(signs({"w": nn.Parameter(torch.zeros(99))}, seed=0)["w"].tolist()))
        [-1.0, 1.0]
    """
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randint(0, 2, p.shape, generator=draw) * 2 - 1).to(p.device, p.dtype)
        for name, p in parameters.items()
    }
