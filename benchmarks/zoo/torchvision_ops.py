"""Declares the compiled operators of torchvision, which has no build beside some CPU builds of torch.

Import it before torchvision, which registers fake kernels for them. Only detection models call them; what they would
compute is not declared, so that a call fails instead of returning something wrong.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")
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

for _name in _NAMES:
    _LIBRARY.define(f"{_name}(Tensor a, Tensor b, float c) -> Tensor")
