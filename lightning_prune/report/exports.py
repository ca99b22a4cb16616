"""What came of writing a model into a file, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.report.costs import Latency


@dataclass(frozen=True)
class Exported:
    """A model that was written into a file.

    Args:
        format: "safetensors", "compressed", "onnx" or "pt2".
        path: of the file.
        num_bytes: of it, with all files that belong to it.
        state_bytes: of the model's tensors, tied ones once.
        error: largest difference between the outputs of the model and of the file, relative to the largest output;
            None where a file holds weights only.
        tolerance: that was allowed.
        before: how long a call of the model takes; None where it was not measured.
        after: how long the same takes with the file, in turns.
    """

    format: str
    path: str
    num_bytes: int
    state_bytes: int
    error: float | None = None
    tolerance: float | None = None
    before: Latency | None = None
    after: Latency | None = None

    @property
    def density(self) -> float:
        """The size of the file as a fraction of the model's tensors."""
        return self.num_bytes / self.state_bytes if self.state_bytes else 0.0
