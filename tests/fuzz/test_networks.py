"""Random small networks become smaller and compute the same, or are refused with a clear error.

`python -m benchmarks.fuzz_networks` does the same to thousands, and prints the seed of what goes wrong.
"""

import pytest
import torch

from benchmarks.zoo.random_networks import random_network
from benchmarks.zoo.random_pruning import fuzz
from benchmarks.zoo.verdicts import TOLERANCE, VISIBLE
from lightning_prune.graph import trace

BLOCKS = {"a few": (range(32), 8), "many": (range(10_000, 10_300), 100)}


@pytest.mark.filterwarnings("ignore")  # what torch says of odd pieces
@pytest.mark.parametrize("block", ["a few", pytest.param("many", marks=pytest.mark.slow)])
def test_whatever_the_network_and_the_recipe(block):
    seeds, least = BLOCKS[block]
    rows = [fuzz(seed) for seed in seeds]  # raises what is wrong
    equal = [row for row in rows if row["outcome"] == "equal"]
    assert len(equal) >= least
    assert max(row["error"] for row in equal if "error" in row) <= TOLERANCE
    visible = [row["control"] > VISIBLE for row in rows if row.get("control", float("nan")) >= 0]
    assert sum(visible) >= 0.7 * len(visible) > 0  # a wrong slice would have been noticed


def test_a_network_is_a_function_of_its_seed():
    first, again, other = random_network(5), random_network(5), random_network(6)
    assert str(first.model) == str(again.model) != str(other.model)
    for a, b in zip(first.outputs(), again.outputs(), strict=True):
        assert torch.equal(a, b)


def test_they_are_of_many_kinds_and_have_much_to_prune():
    kinds, num_groups = set(), 0
    for seed in range(40):
        example = random_network(seed)
        kinds |= {type(module).__name__ for module in example.model.modules()}
        num_groups += len(trace(example.model, example.args).groups)
    assert {"Conv2d", "Linear", "BatchNorm2d", "LayerNorm", "Embedding", "MultiheadAttention"} <= kinds
    assert num_groups > 60
