"""What the accuracy benchmark does beside its grid of sparsities: patterns, channels, heads and blocks."""

from __future__ import annotations

PATTERN, ROWS, CHANNELS, BLOCKS = (
    "2 of each 4 weights",
    "half of the neurons and filters of each layer, as masks",
    "channels, to half of the MACs",
    "half of all heads or blocks",
)
HALF = ["pruning.sparsity=null", "pruning/budget=macs"]
CRITERIA = (
    *("activation_variance", "apoz", "mean_activation", "geometric_median"),
    *("saliency", "taylor", "fisher", "random"),
)
OTHERS = {
    **{
        m: (PATTERN, [f"pruning={m}"]) for m in ("n_of_m", "sr_ste", "rigl_2_4", "wanda_2_4", "sparsegpt_2_4")
    },
    "rows": (ROWS, ["pruning=rows"]),
    **{
        m: (CHANNELS, [f"pruning={m}", *HALF])
        for m in ("global_structured", "local_structured", "reconstruct_channels", "sparse_learning")
    },
    "reconstruct_channels by second_order_taylor": (
        CHANNELS,
        ["pruning=reconstruct_channels", "pruning/criterion=second_order_taylor", *HALF],
    ),
    "network_slimming": (CHANNELS, ["pruning=network_slimming", *HALF]),
    **{
        f"global_structured by {c}": (
            CHANNELS,
            ["pruning=global_structured", f"pruning/criterion={c}", *HALF],
        )
        for c in CRITERIA
    },
    "heads": (BLOCKS, ["pruning=heads", "pruning.sparsity=0.5"]),
    "depth": (BLOCKS, ["pruning=depth", "pruning.sparsity=0.5"]),
}
"""What the grid of sparsities does not hold: what goes, and what the command line says."""


def others(setting: str) -> list[str]:
    """Return what of `OTHERS` fits a setting's network: channels of convolutions, heads and blocks of a GPT."""
    is_gpt, has_norms = "gpt" in setting, "resnet" in setting
    fit = {PATTERN: True, ROWS: True, CHANNELS: has_norms or "lenet5" in setting, BLOCKS: is_gpt}
    return [m for m, (what, _) in OTHERS.items() if fit[what] and (has_norms or m != "network_slimming")]
