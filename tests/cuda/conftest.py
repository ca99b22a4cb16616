"""What only a GPU can show; all else runs on the CPU everywhere."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
