"""Stands in for the compiled operators of torchvision where its build does not fit that of torch."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

_NAMES = [
    "nms",
    "qnms",
    "roi_align",
    "qroi_align",
    "roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "deform_conv2d",
]
_NAMES += [
    f"_{name}_backward" for name in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
]


@cache
def declare_operators() -> torch.library.Library | None:
    """Declare them, if they cannot be loaded. It must come before torchvision, which registers fake kernels for them.

    Only detection models call them. What they would compute is not declared, so that a call fails instead of returning
    something wrong.
    """
    spec = find_spec("torchvision")
    assert spec is not None and spec.origin is not None, "torchvision is not installed"
    try:
        for file in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(file)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _NAMES:
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        return library
    return None
