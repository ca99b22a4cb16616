"""Pieces that can be taken out of a model for real: channels, heads, layers, with all that is coupled to them.

Which slices of which tensors belong together, the model itself shows when it is traced; these nouns say which kinds
of groups are pruned, how the scores of their weights become one, and which sizes are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.core.allocation import check_min_keep
from lightning_prune.core.checks import check_choice, check_count

REDUCTIONS = ("mean", "sum", "max")
NORMALIZATIONS = ("mean", "max", "none")
HEADS = ("dim", "whole", "keep")
UNITS = ("block", "branch")


@dataclass(frozen=True)
class Channel:
    """Coupled channels: neurons, filters, features, with everything that reads or writes them.

    The score of a channel is that of all weights in its slices: Li et al. 2016 (arXiv:1608.08710) for single layers,
    Fang et al. 2023, DepGraph (arXiv:2301.12900), section 3.3, for coupled ones.

    Cost: the model is traced once on fake tensors, and before anything is cut compared with the masked one in a float64
        copy; one to three CPU seconds for a ResNet-50 or a ViT-B.

    When: a model that is smaller and faster on any hardware, best with a `Budget`.

    Args:
        reduction: how the scores of coupled weights become one, "mean", "sum" or "max".
        normalize: what the scores of each group of channels are divided by, so that groups of unlike scale can
            compete in a global scope: their "mean", their "max", or "none".
        multiple_of: channels are kept in multiples of it where a group has at least four times as many, since kernels
            are fastest there; smaller groups in multiples of half of it, a quarter, and so on. At least 1.
        min_keep: channels that each group keeps at least; a whole number, or a fraction of them below 1.
        heads: how attention loses width: evenly in the "dim" of all heads, in "whole" heads, or not at all, "keep".

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> Channel(heads="whole").prunes("head"), Channel().prunes("head")
        (True, False)
        >>> [Channel().step(size) for size in (64, 16, 6)]
        [8, 4, 1]
    """

    reduction: str = "mean"
    normalize: str = "mean"
    multiple_of: int = 8
    min_keep: int | float = 1
    heads: str = "dim"

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        check_count("multiple_of", self.multiple_of, minimum=1)
        check_min_keep(self.min_keep)
        check_choice("heads", self.heads, HEADS)

    def prunes(self, role: str) -> bool:
        """Whether groups of a role ("channel", "head", "head_dim", "part") are pruned."""
        return role == "channel" or role == {"dim": "head_dim", "whole": "head"}.get(self.heads)

    def step(self, size: int) -> int:
        """Return what the number of channels kept of `size` is a multiple of."""
        step = self.multiple_of
        while step > 1 and size < 4 * step:
            step //= 2
        return step


@dataclass(frozen=True)
class Head:
    """Whole attention heads, and nothing else. Michel et al. 2019 (arXiv:1905.10650).

    Where several query heads share a key, they go together.

    Cost: as for `Channel`.

    When: transformers with more heads than they need; `Channel(heads="dim")` narrows all of them evenly.

    Args:
        reduction: how the scores of a head's weights become one, "mean", "sum" or "max".
        normalize: what the scores of each layer's heads are divided by: their "mean", their "max", or "none".
        min_keep: heads that each attention keeps at least; a whole number, or a fraction of them below 1.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> Head().prunes("head"), Head().prunes("channel"), Head().step(12)
        (True, False, 1)
    """

    reduction: str = "mean"
    normalize: str = "mean"
    min_keep: int | float = 1

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        check_min_keep(self.min_keep)

    def prunes(self, role: str) -> bool:
        """Whether groups of a role are pruned: heads only."""
        return role == "head"

    def step(self, size: int) -> int:
        """Return 1: any number of heads will do."""
        return 1


@dataclass(frozen=True)
class Layer:
    """Whole residual blocks, or single branches of them: depth. Those go first that change what they add to least.

    Men et al. 2024, ShortGPT (arXiv:2403.03853), eq. 1: the block influence 1 - E[cos(x, f(x))] of block f on its input
    x, measured on calibration data. The block is replaced by the identity. For a branch, which is an attention or an
    MLP that is added to the residual stream s, it is 1 - E[cos(s, s + f(s))]; Siddiqui et al. 2024 (arXiv:2407.16286)
    compare the two, and find that branches can go where whole blocks cannot.

    That is with the default `criterion`, `Magnitude()`, for which reports say "block influence". Any other one ranks
    them by the scores of the weights in their linear, convolution and attention layers, as Kim et al. 2024, Shortened
    LLaMA (arXiv:2402.02834), do: by magnitude it is `Magnitude(p=2)`. All compete in one ranking, `Global()`; the first
    four blocks and the last two, which they keep by rule in their best variants, stay where `exclude` names them.

    Cost: the model is traced as for `Channel`; one forward pass for each calibration batch, and one number per block.

    When: after training, residual networks that are to be less deep, language models above all.

    Args:
        unit: what goes as one piece, a "block" or a "branch".
        min_keep: how many are kept at least; a whole number, or a fraction of them below 1.
        reduction: how the scores of a `criterion` become one, "mean", "sum" or "max"; with the mean, large blocks are
            not favoured.

    Raises:
        ValueError: an unknown unit or reduction; `min_keep` is negative, or a fraction of 1 or more.

    Example:
        >>> Layer(min_keep=2)
        Layer(unit='block', min_keep=2, reduction='mean')
    """

    unit: str = "block"
    min_keep: int | float = 1
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        check_min_keep(self.min_keep)
        check_choice("reduction", self.reduction, REDUCTIONS)

    def prunes(self, role: str) -> bool:
        """Whether groups of a role are pruned: those of the unit."""
        return role == self.unit

    def step(self, size: int) -> int:
        """Return 1: any number will do."""
        return 1
