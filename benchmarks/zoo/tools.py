"""The tools that are compared, each asked to remove half of every group of channels by local magnitude."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.example import Example, tensors_in
from benchmarks.zoo.masked import Kept

Facts = dict[str, Any]


def timed(facts: Facts, name: str, function: Callable[[], Any]) -> Any:
    """Call a function and note the CPU seconds that it took."""
    start = time.process_time()
    try:
        return function()
    finally:
        facts[name] = facts.get(name, 0.0) + time.process_time() - start


def ours(example: Example, facts: Facts) -> Kept:
    """Prune half of every channel group and head width, whole heads and groups of convolutions being kept."""
    from lightning_prune.graph import trace
    from lightning_prune.model.equivalence import settle
    from lightning_prune.model.surgery import execute_

    late: list[dict[str, Any]] = []
    facts["late"] = late
    couplings = timed(facts, "trace_s", lambda: trace(example.model, example.args, example.kwargs))
    tensors = {**dict(example.model.named_parameters()), **dict(example.model.named_buffers())}
    facts["groups_found"] = len(couplings.groups)
    choice, plan = timed(
        facts,
        "plan_s",
        lambda: settle(
            couplings,
            lambda: {
                name: keep_half(group, tensors)
                for name, group in couplings.groups.items()
                if group.role in ("channel", "head_dim") and group.size > 1
            },
            freeze=lambda names, reason: late.append({"groups": list(names)[:6], "reason": reason[:300]}),
        ),
    )
    facts |= {"groups": len(choice), "own_error": plan.error, "is_fake": couplings.record.is_fake}
    example.model.double()  # factors folded into weights are not to be rounded before the comparison
    timed(facts, "surgery_s", lambda: execute_(example.model, plan))
    facts["frozen"] = sorted(set(couplings.frozen.values()))[:8]
    return plan.slices


def keep_half(group: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Return the half of a group with the largest sums of magnitudes, each tensor's scaled to a mean of 1."""
    scores = torch.zeros(group.size)
    for member in group.members:
        if member.is_parameter:
            magnitudes = tensors[member.tensor].detach().float().abs()
            sums = member.project(
                magnitudes.movedim(member.dim, 0).reshape(magnitudes.shape[member.dim], -1).sum(1)
            )
            scores += sums / sums.mean()
    mask = torch.zeros(group.size, dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[: group.size - group.size // 2]] = True
    return mask


class NoHints(Exception):  # noqa: N818
    """There is no attention whose number of heads could be told."""


def torch_pruning(example: Example, facts: Facts, hints: bool = False) -> None:
    """Prune with Torch-Pruning's magnitude pruner, the layers of the output being ignored."""
    import torch_pruning as tp

    model, heads = example.model, attention_heads(example.model) if hints else {}
    if hints and not heads:
        raise NoHints
    pruner = timed(
        facts,
        "trace_s",
        lambda: tp.pruner.BasePruner(
            model,
            dict(example.kwargs) if example.kwargs else example.args,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=output_layers(example),
            num_heads=heads,
            prune_head_dims=True,
        ),
    )
    timed(facts, "surgery_s", pruner.step)
    facts["heads"] = len(heads)
    if hints:
        set_head_widths_(model, heads)


def output_layers(example: Example) -> list[nn.Module]:
    """Return the layers whose outputs are those of the model; the last one that ran, where none is."""
    outputs: list[tuple[nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: outputs.append((module, output)))
        for module in example.model.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear)
    ]
    try:
        results = example.outputs()
    finally:
        for hook in hooks:
            hook.remove()
    places = {result.untyped_storage().data_ptr() for result in results}
    found = [
        m for m, out in outputs if any(t.untyped_storage().data_ptr() in places for t in tensors_in(out))
    ]
    return list(dict.fromkeys(found)) or [outputs[-1][0]]


COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
KEY_VALUE_NAMES = ("num_key_value_heads", "num_kv_heads", "num_heads_k")
QUERY_NAMES = (
    "qkv",
    "q",
    "query",
    "q_proj",
    "q_lin",
    "query_key_value",
    "Wqkv",
    "to_q",
    "to_qkv",
    "qkv_proj",
    "q_norm",
)
KEY_NAMES = ("k", "v", "key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "kv", "to_k", "to_v", "to_kv")
WIDTH_NAMES = (
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "dim_per_head",
    "dim_head",
    "head_size",
)
INNER_NAMES = ("all_head_size", "inner_dim", "embed_dim", "attn_dim", "split_size", "dim", "attention_dim")


def attentions(model: nn.Module) -> Iterator[tuple[nn.Module, int, dict[str, nn.Module]]]:
    """Yield modules that look like attention, their number of heads and the layers that make query, key and value."""
    config = getattr(model, "config", None)
    for module in model.modules():
        numbers = [vars(module).get(name) for name in COUNT_NAMES]
        layers = {n: child for n, child in module.named_children() if n in QUERY_NAMES + KEY_NAMES}
        if not any(name in QUERY_NAMES for name in layers):
            continue
        num = next((n for n in numbers if isinstance(n, int)), None) or getattr(
            config, "num_attention_heads", None
        )
        if isinstance(num, int):
            yield module, num, layers


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Return the hints that Torch-Pruning takes: layer -> number of heads."""
    heads = {}
    for module, num, layers in attentions(model):
        config = getattr(module, "config", None)
        groups = [getattr(owner, name, None) for owner in (module, config) for name in KEY_VALUE_NAMES]
        num_keys = next((n for n in groups if isinstance(n, int)), num)
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv1d):
                heads[layer] = num_keys if name in KEY_NAMES else num
    return heads | {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def set_head_widths_(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Set the attributes that a careful user of Torch-Pruning sets by hand after pruning head widths."""
    for module, num, layers in attentions(model):
        name, query = next((n, layer) for n, layer in layers.items() if n in QUERY_NAMES)
        if query not in heads:
            continue
        width = query.weight.shape[0] // (3 if "qkv" in name or name in ("query_key_value", "Wqkv") else 1)
        for attribute, value in [(n, width // num) for n in WIDTH_NAMES] + [(n, width) for n in INNER_NAMES]:
            if isinstance(vars(module).get(attribute), int):
                setattr(module, attribute, value)


def kirigami(example: Example, facts: Facts) -> None:
    """Prune with torch-kirigami's greedy planner and its group magnitude."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    graph = timed(
        facts,
        "trace_s",
        lambda: DependencyGraph.build(example.model, args=example.args, kwargs=dict(example.kwargs)),
    )
    pruner = Pruner(example.model, graph=graph)
    candidates = timed(facts, "plan_s", pruner.discover_candidates)
    plan = timed(
        facts,
        "plan_s",
        lambda: pruner.plan(candidates, budget=ChannelRatio(0.5), strategy=Greedy(GroupMagnitude(p=1))),
    )
    timed(facts, "surgery_s", lambda: pruner.apply(plan))


TOOLS: dict[str, Callable[[Example, Facts], Kept | None]] = {
    "ours": ours,
    "torch-pruning": torch_pruning,
    "torch-pruning-hints": lambda example, facts: torch_pruning(example, facts, hints=True),
    "kirigami": kirigami,
}
"""Name -> function that prunes an example's model in place and returns what it kept, or None where it does not say."""
