"""Recipes against the algorithms of their papers: whole trainings written out in plain torch, by sorting."""

import math

import pytest
import torch
from hydra.utils import instantiate
from torch.nn import functional as F

from tests.callbacks.test_soft_masking import LAST, Plain, assert_alike, fit, top
from tests.callbacks.toy import NUM_BATCHES, data
from tests.hydra_runs import composed

SPARSITY, END = 0.75, round(0.75 * LAST)


def recipe(name, *settings):
    common = (f"pruning={name}", f"pruning.sparsity={SPARSITY}", f"pruning.window.end={END / LAST}")
    return instantiate(composed(*common, *settings).callbacks.pruning, report=False)


def matrices(module):
    return {name: p for name, p in module.named_parameters() if p.dim() == 2}


def train_step(module, optimizer, step):
    """Take a step as anybody would, of a network whose pruned weights are zero."""
    inputs, labels = list(data())[step % NUM_BATCHES]
    optimizer.zero_grad()
    F.cross_entropy(module(inputs), labels).backward()
    optimizer.step()


@torch.no_grad()
def mask_(weights, masks, optimizer):
    for name, mask in masks.items():
        weights[name] *= mask
        if state := optimizer.state[weights[name]]:
            state["momentum_buffer"] *= mask


def ac_dc(num_phases):
    """Peste et al. 2021, algorithm 1: phases of training all weights, and those of the largest alone, in turn."""
    module = Plain()
    weights, optimizer = matrices(module), module.configure_optimizers()
    length = END // num_phases
    for step in range(LAST):
        if step % length == 0 and step < END:
            is_sparse = (num_phases - step // length) % 2 == 1  # the last one is
            magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
            masks = top(magnitudes, SPARSITY if is_sparse else 0.0)
            mask_(weights, masks, optimizer)
        train_step(module, optimizer, step)
        mask_(weights, masks, optimizer)
    return masks, dict(module.named_parameters())


@pytest.mark.parametrize("num_phases", [2, 3, 6])
def test_ac_dc_is_the_loop_written_out(num_phases):
    callback, module = recipe("alternating", f"pruning.schedule.num_phases={num_phases}"), Plain()
    fit(callback, module)
    assert_alike(callback, module, ac_dc(num_phases))


@torch.no_grad()
def regenerated(mask, weight, fraction):
    """Drop a fraction of the weights of a layer, the smallest, and grow as many where the gradient is largest."""
    num = round(fraction * int(mask.sum()))
    kept = mask.flatten().clone()
    kept[weight.abs().masked_fill(~mask, math.inf).flatten().argsort()[:num]] = False
    kept[weight.grad.abs().flatten().masked_fill(kept, -1.0).argsort(descending=True)[:num]] = True
    return kept.view_as(mask)


def granet(every, drop_fraction):
    """Liu et al. 2021: prune by magnitude along a cubic ramp, and each time let some weights change their places."""
    module = Plain()
    weights, optimizer = matrices(module), module.configure_optimizers()
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for step in range(1, LAST + 1):
        train_step(module, optimizer, step - 1)
        mask_(weights, masks, optimizer)
        if step % every == 0 and step <= END:
            left = (1 - step / END) ** 3
            magnitudes = {
                name: weight.detach().abs().masked_fill(~masks[name], -1.0)
                for name, weight in weights.items()
            }
            masks = top(magnitudes, SPARSITY * (1 - left))
            fraction = drop_fraction * (1 + math.cos(math.pi * step / END)) / 2
            masks = {name: regenerated(mask, weights[name], fraction) for name, mask in masks.items()}
            mask_(weights, masks, optimizer)
    return masks, dict(module.named_parameters())


@pytest.mark.parametrize("every", [1, 3])
def test_granet_is_the_loop_written_out(every):
    callback, module = recipe("granet", f"pruning.window.every={every / LAST}"), Plain()
    fit(callback, module)
    assert_alike(callback, module, granet(every, drop_fraction=0.3))
