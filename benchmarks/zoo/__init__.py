"""Models to try structured pruning on: `names()` lists them, `build(name)` makes one with random weights."""

from __future__ import annotations

import random

import torch

from benchmarks.zoo.example import Example, make_sensitive_, tensors_in
from benchmarks.zoo.handwritten import MAKE, handwritten
from benchmarks.zoo.language import ARCHITECTURES, transformers_model
from benchmarks.zoo.pictures import DENSE, TIMM, TORCHVISION, dense_model, timm_model, torchvision_model
from benchmarks.zoo.torchvision_ops import declare_operators

__all__ = ["Example", "build", "load", "names", "tensors_in"]

SOURCES = {
    "torchvision": (TORCHVISION, torchvision_model),
    "dense": (DENSE, dense_model),
    "own": (list(MAKE), handwritten),
    "transformers": (list(ARCHITECTURES), transformers_model),
    "timm": (TIMM, timm_model),
}


def load() -> None:
    """Import what the models come from, once instead of in every process forked from this one."""
    declare_operators()
    import timm
    import torchvision
    import transformers

    assert timm and torchvision and transformers


def names(sources: list[str] | None = None) -> list[str]:
    """Return "source/model" of all models."""
    return [f"{source}/{name}" for source in sources or SOURCES for name in SOURCES[source][0]]


def build(name: str, seed: int = 0) -> Example:
    """Return a model in evaluation mode and a call of it, the same ones for the same seed."""
    source, _, model = name.partition("/")
    random.seed(seed)
    torch.manual_seed(seed)
    return make_sensitive_(SOURCES[source][1](model), seed + 1)
