"""One trial of structured pruning: a random network, a random recipe, and all that has to hold afterwards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.example import Example, tensors_in
from benchmarks.zoo.masked import difference, outputs64, reference
from benchmarks.zoo.pieces import coin
from benchmarks.zoo.random_fits import trial_in_a_fit
from benchmarks.zoo.random_networks import random_network
from benchmarks.zoo.random_recipes import granularity, recipe, scope
from benchmarks.zoo.slices import mistaken, tensors_of, wrong_slices
from benchmarks.zoo.verdicts import CLEAR, VISIBLE, WrongError, check, judged
from lightning_prune import Budget, Channel, Layer, shrink
from lightning_prune.core.recipe import Recipe
from lightning_prune.graph import Plan
from lightning_prune.graph.plan_data import from_data, to_data
from lightning_prune.model.calls import Call
from lightning_prune.model.group_pruning import GroupPruner
from lightning_prune.model.record import replay_


def fuzz(seed: int) -> dict[str, Any]:
    """Run the trial of a seed: of four one in a fit, one in steps, and one with a wrong copy as a control."""
    trials = {1: trial_in_a_fit, 3: trial_in_steps}
    return trials.get(seed % 4, partial(trial, controls=seed % 4 == 0))(seed)


def trial(seed: int, controls: bool = False) -> dict[str, Any]:
    """Prune one network and check everything; returns the outcome, and for a failure what went wrong.

    Args:
        seed: of network and recipe.
        controls: whether to make a wrong copy of the small model, to see that the comparison would notice.
    """
    draw = Random(seed + 10**9)
    example = random_network(seed)
    settings = recipe(draw, example)
    optimizer = draw.choice([torch.optim.Adam, torch.optim.RMSprop])(example.model.parameters(), lr=1e-3)
    if coin(draw):
        step_(example, optimizer)
    dense = copy.deepcopy(example)
    example.model.train(is_training := coin(draw))
    state = snapshot(example.model)
    row: dict[str, Any] = {"pieces": len(example.model.steps), "recipe": short(settings)}
    try:
        plan = shrink(example.model, example.args, optimizers=[optimizer], **settings)
    except ValueError as error:
        if not CLEAR.search(str(error)):
            raise WrongError(f"an error that does not say what is wrong: {error}") from error
        check(unchanged(state, snapshot(example.model)), "refused, and yet the model has changed")
        return row | {"outcome": "refused", "why": str(error)[:200]}
    check(all(m.training == is_training for m in example.model.modules()), "training flags have changed")
    if plan.is_empty:
        check(unchanged(state, snapshot(example.model)), "an empty plan has changed the model")
        return row | {"outcome": "nothing removed"}
    example.model.eval()
    row |= judged(dense, example, plan)
    if controls and plan.slices:
        row["control"] = control(dense, example, plan)
    check_use(dense, example, plan, optimizer)
    check_budget(dense, example, settings, plan)
    return row | {"outcome": "equal"}


def trial_in_steps(seed: int) -> dict[str, Any]:
    """Prune one network in several updates, as in training, each of which makes it smaller; resume before one."""
    draw = Random(seed + 10**9)
    example = random_network(seed)
    settings = {name: draw_one(draw) for name, draw_one in (("granularity", granularity), ("scope", scope))}
    if isinstance(settings["granularity"], Layer):
        settings["granularity"] = Channel(multiple_of=1)
    goal: dict[str, Any] = {"sparsity": draw.uniform(0.3, 0.9)}
    if coin(draw, 0.3):
        goal = {"budget": Budget(params=draw.uniform(0.3, 0.9), tolerance=0.1)}
    row = {"pieces": len(example.model.steps), "recipe": f"in steps, {settings | goal}"}
    num_cut = 0
    try:
        recipe = Recipe(**goal, **settings)
        pruner = GroupPruner(example.model, recipe, Call(example.model, example.args, {}))
        for fraction in (0.3, 0.7, 1.0):
            pruner.update_(fraction)
            dense = copy.deepcopy(example)  # masked: of a group that cannot be cut, zeros are left
            if coin(draw, 0.3):
                resumed = GroupPruner(example.model, pruner.recipe, pruner.call)
                resumed.load_state_dict(pruner.state_dict())
                masks = [{n: m.tolist() for n, m in p.masks.items()} for p in (pruner, resumed)]
                check(masks[0] == masks[1], "resumed it has other masks")
                pruner = resumed
            plan = pruner.shrink_()
            if not plan.is_empty:
                num_cut += 1
                judged(dense, example, plan)
    except ValueError as error:
        if not CLEAR.search(str(error)):
            raise WrongError(f"an error that does not say what is wrong: {error}") from error
        return row | {"outcome": "refused", "why": str(error)[:200]}
    return row | {"outcome": "equal" if num_cut else "nothing removed"}


def control(dense: Example, small: Example, plan: Plan) -> float:
    """Return the largest difference that one wrong index makes; NaN where the outputs depend on nothing that is cut."""
    if plan.scales:
        return float("nan")
    whole, expected = tensors_of(dense.model), reference(dense, plan.slices)
    slices = {name: dims for name, dims in plan.slices.items() if is_felt(dense, name)}
    found = [
        difference(outputs64(Example(wrong, small.args)), expected)
        for name, dim in wrong_slices(whole, small.model, slices)
        for index in range(len(slices[name][dim]))
        for wrong in [mistaken(whole[name], small.model, slices, (name, dim), index)]
    ]
    return max(found, default=float("nan"))


def is_felt(example: Example, name: str) -> bool:
    """Whether the outputs depend on a tensor: networks may return the end of one branch only."""
    other = copy.deepcopy(example)
    tensors_of(other.model)[name].mul_(-1.5)
    return difference(outputs64(other), outputs64(example)) > VISIBLE


def check_use(dense: Example, small: Example, plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    """Run another batch, train a step, and build the small model anew from its record."""
    other = [torch.cat([x, x[:1]]) for x in small.args]
    if runs(dense.model, other):  # a size may be written in the code
        check(runs(small.model, other), "another batch size runs in the dense model only")
    small.model.train()
    step_(small, optimizer)
    small.model.eval()
    (again,) = from_data(json.loads(json.dumps(to_data([plan]))))
    rebuilt = copy.deepcopy(dense.model)
    replay_(rebuilt, [again])
    rebuilt.load_state_dict(small.model.state_dict())
    pairs = zip(Example(rebuilt, small.args).outputs(), small.outputs(), strict=True)
    check(all(torch.equal(a, b) for a, b in pairs), "rebuilt from its record it computes something else")


def step_(example: Example, optimizer: torch.optim.Optimizer) -> None:
    """Train a step."""
    optimizer.zero_grad()
    outputs = tensors_in(example.model(*example.args))
    torch.stack([t.float().pow(2).mean() for t in outputs]).sum().backward()
    optimizer.step()


def runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception:  # whatever the model raises
        return False
    return True


def check_budget(dense: Example, small: Example, settings: dict[str, Any], plan: Plan) -> None:
    budget = settings.get("budget")
    measures: dict[str, Callable[[nn.Module], int]] = {
        "params": lambda m: sum(p.numel() for p in m.parameters()),
        "num_bytes": lambda m: sum(t.numel() * t.element_size() for t in [*m.parameters(), *m.buffers()]),
    }
    if budget is not None and budget.kind in measures:
        measure = measures[budget.kind]
        share = measure(small.model) / measure(dense.model)
        check(
            abs(share - budget.fraction) <= budget.tolerance + 1e-9,
            f"{budget} is missed without a word: {share:.3f}",
        )


def snapshot(model: nn.Module) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    modules = {
        path: {n: v for n, v in vars(m).items() if isinstance(v, (int, float, str, tuple))}
        for path, m in model.named_modules()
    }
    return {"tensors": tensors, "modules": modules, "kinds": [type(m) for m in model.modules()]}


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    same = before["tensors"].keys() == after["tensors"].keys() and all(
        torch.equal(tensor, after["tensors"][name]) for name, tensor in before["tensors"].items()
    )
    return same and before["modules"] == after["modules"] and before["kinds"] == after["kinds"]


def short(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value}" for name, value in settings.items() if name not in ("loss", "forward", "batches")
    )
