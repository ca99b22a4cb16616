"""Linear layers for the sparse tensor cores of GPUs: two of every four neighbours in a row are not zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
"""Of rows and columns of a weight, by its dtype; of those of torch's two backends, CUTLASS asks for more."""
CAPABILITY = (8, 0)


def why_not_semi_structured(weight: Tensor) -> str | None:
    """Return why a weight cannot be converted, wherever it lies, or None.

    Example:
        >>> why_not_semi_structured(torch.zeros(32, 64))
        'float32: sparse tensor cores take float16 and bfloat16'
        >>> why_not_semi_structured(torch.ones(32, 64).half())
        'more than two of four neighbours are not zero'
        >>> why_not_semi_structured(torch.zeros(32, 64).half())
    """
    if weight.dtype not in MULTIPLES:
        return f"{str(weight.dtype).partition('.')[2]}: sparse tensor cores take float16 and bfloat16"
    rows, columns = MULTIPLES[weight.dtype]
    if weight.dim() != 2 or weight.shape[0] % rows or weight.shape[1] % columns:
        return f"of shape {tuple(weight.shape)}: rows are a multiple of {rows}, columns of {columns}"
    if int((weight.view(-1, 4) != 0).sum(1).max()) > 2:
        return "more than two of four neighbours are not zero"
    return None


def check_device(model: nn.Module) -> None:
    """Refuse a model that lies on no GPU with sparse tensor cores.

    Raises:
        ValueError: it says where the model lies.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = str(device)
    if device.type == "cuda":
        if torch.version.hip is None and (version := torch.cuda.get_device_capability(device)) >= CAPABILITY:
            return
        found = f"{device}, a {torch.cuda.get_device_name(device)}" + (
            f" of {'.'.join(map(str, version))}" if torch.version.hip is None else ""
        )
    raise ValueError(
        f"`model` lies on an NVIDIA GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} and above, which "
        f"multiplies 2:4 sparse weights, but got one on {found}. On CPUs, `accelerate` uses compressed sparse rows."
    )


def semi_structured(dense: nn.Linear) -> nn.Linear:
    """Return the layer with its weight compressed; it cannot learn."""
    layer = nn.Linear(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
    compressed: Tensor = torch.sparse.to_sparse_semi_structured(dense.weight.detach().contiguous())
    layer.weight = nn.Parameter(compressed, requires_grad=False)
    if dense.bias is not None:
        layer.bias = nn.Parameter(dense.bias.detach(), requires_grad=False)
    return layer.train(dense.training)
