"""What every test of this folder runs in."""

from collections.abc import Iterator

import pytest
import torch
from gemma4q_kernels.support import triton_interpreted


@pytest.fixture(autouse=True)
def tensors_on_the_gpu() -> Iterator[None]:
    """New tensors are on the GPU, and `torch.empty` is NaN there: an element left unwritten shows."""
    assert not triton_interpreted()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device("cuda"):
        assert torch.empty(1).isnan()
        yield
    torch.use_deterministic_algorithms(False)
