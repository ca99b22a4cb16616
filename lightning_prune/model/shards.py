"""Weights that are spread over processes as DTensors (FSDP2, tensor parallelism): what a process sees of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_prune.core.checksums import text_checksum
from lightning_prune.core.types import Across, Masks, Name, Shape, Stats
from lightning_prune.model.plain import is_sharded, numbers_of

BY_WEIGHT = ("weight", "grad", "grad_mean", "grad_square", "movement")
"""The statistics that have a number for each weight, and lie where the weights do."""


class Whole:
    """Weights that are whole on each process, and what pruning asks of them; `Shards` answers for those that are not.

    Args:
        targets: parameters by name.
    """

    across: Across | None = None
    place = 0
    """Which parts lie here: processes of one place hold the same."""

    def __init__(self, targets: Mapping[Name, nn.Parameter]) -> None:
        self.targets = targets
        self.shapes: dict[Name, Shape] = {name: tuple(p.shape) for name, p in targets.items()}
        """What a criterion is given and gives back."""

    def stats(self, found: Mapping[Name, Stats]) -> Mapping[Name, Stats]:
        """Return the statistics that scores are computed from."""
        return found

    def seen(self, masks: Masks) -> Mapping[Name, Tensor]:
        """Return masks as scores are, from those that lie here."""
        return masks

    def own(self, masks: Masks) -> Masks:
        """Return the masks that lie here, from those that a scope has chosen."""
        return masks

    def whole(self, name: Name, part: Tensor) -> Tensor:
        """Return all of a tensor of a target's shape, from what lies here; to be called on all processes."""
        return part

    def part(self, name: Name, whole: Tensor) -> Tensor:
        """Return what lies here of a tensor of a target's shape."""
        return whole

    def placed(self, masks: Masks) -> Masks:
        """Return masks in the form of the weights."""
        return masks

    def num_kept(self, masks: Masks) -> dict[Name, int]:
        """Return how many weights masks keep, on all processes; to be called on all of them."""
        return {name: int(mask.sum()) for name, mask in masks.items()}


class Shards(Whole):
    """Weights of which each process has a part; a tensor is put together where it has to be seen as a whole.

    Tensors are put together one at a time, as they are in a forward pass.
    """

    def __init__(self, targets: Mapping[Name, nn.Parameter]) -> None:
        super().__init__(targets)
        self.place = text_checksum(repr([_coordinate(parameter) for parameter in targets.values()]))

    def stats(self, found: Mapping[Name, Stats]) -> Mapping[Name, Stats]:
        return {name: _Lazy(stats, self._reader(name, stats)) for name, stats in found.items()}

    def _reader(self, name: Name, stats: Stats) -> Callable[[str], Any]:
        return lambda kind: self.whole(name, stats[kind]) if kind in BY_WEIGHT else stats[kind]

    def seen(self, masks: Masks) -> Mapping[Name, Tensor]:
        return _Lazy(masks, lambda name: self.whole(name, masks[name]))

    def own(self, masks: Masks) -> Masks:
        return {name: self.part(name, mask) for name, mask in masks.items()}

    def whole(self, name: Name, part: Tensor) -> Tensor:
        if part.dtype == torch.bool:
            return self.whole(name, part.view(torch.uint8)).bool()
        placed = _placed(part, self.targets[name])
        return placed.full_tensor() if placed is not None else part

    def part(self, name: Name, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        parameter: Any = self.targets[name]
        if not isinstance(parameter, DTensor):
            return whole
        mesh = parameter.device_mesh
        everywhere = [Replicate()] * mesh.ndim
        copied = DTensor.from_local(whole.to(parameter.device), mesh, everywhere, run_check=False)
        return copied.redistribute(placements=parameter.placements).to_local().clone()

    def placed(self, masks: Masks) -> Masks:
        placed = {name: _placed(mask, self.targets[name]) for name, mask in masks.items()}
        return {name: mask if (found := placed[name]) is None else found for name, mask in masks.items()}

    def num_kept(self, masks: Masks) -> dict[Name, int]:
        return {name: _sum_of_parts(mask.sum(), self.targets[name]) for name, mask in masks.items()}


class Rows(Shards):
    """Weights of which each process has some rows, that is, of dim 0: nothing has to be put together.

    Args:
        targets: parameters by name, all spread over the same processes.
        across: these processes.
    """

    def __init__(self, targets: Mapping[Name, nn.Parameter], across: Across) -> None:
        super().__init__(targets)
        self.across = across
        self.shapes = {name: tuple(local(p.detach()).shape) for name, p in targets.items()}
        lengths = across.collect(torch.tensor([shape[0] for shape in self.shapes.values()]))
        self._starts = dict(zip(targets, lengths[: across.rank].sum(0).tolist(), strict=True))

    def stats(self, found: Mapping[Name, Stats]) -> Mapping[Name, Stats]:
        return {
            name: {kind: self._rows(name, kind, value) for kind, value in stats.items()}
            for name, stats in found.items()
        }

    def _rows(self, name: Name, kind: str, value: Any) -> Any:
        """Return the rows of a statistic that varies along dim 0."""
        if kind in BY_WEIGHT or not isinstance(value, Tensor) or len(value) != self.targets[name].shape[0]:
            return value
        start = self._starts[name]
        return value[start : start + self.shapes[name][0]]

    def seen(self, masks: Masks) -> Mapping[Name, Tensor]:
        return masks

    def own(self, masks: Masks) -> Masks:
        return masks


class Group:
    """The processes of a group, which put counts together.

    Args:
        group: of torch.distributed.
        device: where the group's tensors lie.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device

    @property
    def rank(self) -> int:
        """The place of this process in the group."""
        return distributed.get_rank(self._group)

    def sum(self, counts: Tensor) -> Tensor:
        """Return the sum of the counts of all processes."""
        total = counts.to(self._device, copy=True)
        distributed.all_reduce(total, group=self._group)
        return total.to(counts.device)

    def collect(self, counts: Tensor) -> Tensor:
        """Return the counts of each process, (processes, *shape)."""
        own = counts.to(self._device)
        rows = [torch.empty_like(own) for _ in range(distributed.get_world_size(self._group))]
        distributed.all_gather(rows, own, group=self._group)
        return torch.stack(rows).to(counts.device)


class _Lazy(Mapping[str, Any]):
    """A mapping whose values are computed when they are read."""

    def __init__(self, keys: Mapping[str, Any], read: Callable[[str], Any]) -> None:
        self._keys, self._read = keys, read

    def __getitem__(self, key: str) -> Any:
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def has_shards(model: nn.Module) -> bool:
    """Whether some weights of a model are spread over processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return what lies here of a tensor: all of it, but for a DTensor. Of a parameter, only where no graph is made."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_of(tensor: Tensor) -> Tensor:
    """Return all of a tensor, put together where it is spread; to be called on all processes that have a part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def num_nonzeros(tensor: Tensor) -> int:
    """Return how many entries of a tensor are not zero, on all processes; to be called on all that have a part."""
    return _sum_of_parts(torch.count_nonzero(local(numbers_of(tensor).detach())), tensor)


def shards_of(targets: Mapping[Name, nn.Parameter], *, by_rows: bool) -> Whole:
    """Return what stands for the weights of some targets.

    Args:
        targets: parameters by name.
        by_rows: whether all that is computed of them can be computed row by row (`core.types.BY_ROWS`).
    """
    if not any(is_sharded(parameter) for parameter in targets.values()):
        return Whole(targets)
    across = _rows_group(targets) if by_rows else None
    return Shards(targets) if across is None else Rows(targets, across)


def _rows_group(targets: Mapping[Name, nn.Parameter]) -> Group | None:
    """Return the processes that all targets' rows are spread over, or None where they are spread in another way."""
    from torch.distributed.tensor import DTensor, Shard

    found = set()
    for parameter in targets.values():
        if not isinstance(parameter, DTensor):
            return None
        split = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
        if (
            len(split) != 1
            or type(placement := parameter.placements[split[0]]) is not Shard
            or placement.dim != 0
        ):
            return None
        found.add((parameter.device_mesh, split[0]))
    if len(found) != 1:
        return None
    (mesh, dim), device = found.pop(), next(iter(targets.values())).device
    return Group(mesh.get_group(dim), device)


def _placed(part: Tensor, parameter: Any) -> Any:
    """Return a part as the DTensor that it is a part of, or None for a parameter that is whole."""
    if not is_sharded(parameter):
        return None
    from torch.distributed.tensor import DTensor

    shape, stride = parameter.shape, parameter.stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def _sum_of_parts(number: Tensor, parameter: Any) -> int:
    """Add up a number of each part of a tensor; copies of one part count once."""
    if not is_sharded(parameter):
        return int(number)
    from torch.distributed.tensor import DTensor, Partial, Replicate

    adding = [Replicate() if placement.is_replicate() else Partial() for placement in parameter.placements]
    summed = DTensor.from_local(number.reshape(1), parameter.device_mesh, adding, run_check=False)
    return int(summed.full_tensor())


def _coordinate(parameter: Any) -> list[int]:
    """Return where this process is along the dims of the mesh that a parameter is spread over."""
    if not is_sharded(parameter):
        return []
    coordinate = parameter.device_mesh.get_coordinate()
    places = zip(coordinate, parameter.placements, strict=True)
    return [at for at, placement in places if not placement.is_replicate()]
