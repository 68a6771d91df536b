"""The Triton kernels are tested compiled where there is a GPU, and in Triton's interpreter elsewhere."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
