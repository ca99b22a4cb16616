"""What only a GPU can show; the tests of callbacks run there too, with LIGHTNING_PRUNE_ACCELERATOR=gpu."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
