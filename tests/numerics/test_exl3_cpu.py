"""EXL3 on a CPU: the reference's bits for every format, layout and block size, and no dense weight in memory."""

from typing import Any

import pytest
import torch
from exl3_weights import FORMATS, dense, packed
from gemma4q_kernels.exl3 import Exl3Weight, cpu, linear
from tolerances import EXL3_LINEAR, rms_error
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numba, few rows are multiplied elsewhere (`test_exl3_cpu_few_rows.py`)."""
    monkeypatch.setattr(cpu, "_has_numba", lambda: False)


class LargestTensor(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


@pytest.mark.parametrize(("codebook", "width"), FORMATS)
def test_every_format_has_the_bits_of_the_reference(codebook: str, width: int, poisoned_memory: None) -> None:
    weight = packed(codebook, width, 16, 24)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dense(weight, dtype), dense(weight, dtype, "reference"))


@pytest.mark.parametrize(("codebook", "width"), FORMATS)
def test_every_format_is_multiplied(codebook: str, width: int, poisoned_memory: None) -> None:
    weight, x = packed(codebook, width, 16, 8), torch.randn(3, 256)
    expected = linear(x, [weight], backend="reference")
    assert rms_error(linear(x, [weight]), expected) <= EXL3_LINEAR[torch.float32]
    flipped = weight.trellis.clone()
    flipped[-1, -1, -1] ^= 1
    broken = Exl3Weight(flipped, weight.suh, weight.svh, codebook)
    assert rms_error(linear(x, [broken]), expected) > EXL3_LINEAR[torch.float32]


@pytest.mark.parametrize("blocks", [1, 2, 100])
@pytest.mark.parametrize("threads_for_matrix", [1, 1000], ids=["matrix", "vector"])
def test_sizes_of_blocks_change_nothing(
    blocks: int, threads_for_matrix: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    weight, x = packed("mcg", 48, 16, 40), torch.randn(5, 256)
    monkeypatch.setattr(cpu, "_BLOCK_WEIGHTS", blocks * 128 * 128 // torch.get_num_threads())
    monkeypatch.setattr(cpu, "_THREADS_FOR_MATRIX", threads_for_matrix)
    assert torch.equal(dense(weight), dense(weight, backend="reference"))
    expected = linear(x, [weight], backend="reference")
    assert rms_error(linear(x, [weight]), expected) <= EXL3_LINEAR[torch.float32]


def test_any_layout_in_memory_will_do() -> None:
    weight, x = packed("mul1", 80, 16, 8), torch.randn(2, 256)
    expected, product = dense(weight, backend="reference"), linear(x, [weight])
    odd = torch.empty(weight.trellis.numel() + 1, dtype=torch.int16)[1:].view(weight.trellis.shape)
    strided = torch.empty((80, 16, 8), dtype=torch.int16).permute(1, 2, 0)
    for trellis in (odd.copy_(weight.trellis), strided.copy_(weight.trellis)):
        other = Exl3Weight(trellis, weight.suh, weight.svh, "mul1")
        assert torch.equal(dense(other), expected) and torch.equal(linear(x, [other]), product)


def test_inputs_are_left_as_they_are() -> None:
    weight, x = packed("mcg", 64, 8, 8), torch.randn(1, 128)
    tensors = (weight.trellis, weight.suh, weight.svh, x)
    before = [tensor.clone() for tensor in tensors]
    linear(x, [weight])
    dense(weight)
    assert all(map(torch.equal, tensors, before))


def test_linear_never_holds_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed("mcg", 64, 64, 128), torch.randn(1, 1024)
    monkeypatch.setattr(cpu, "_BLOCK_WEIGHTS", 2**17 // torch.get_num_threads())
    with LargestTensor() as largest:
        linear(x, [weight])
    assert largest.nbytes == 8 * 2**17  # a sixteenth of the weight, and its scratch
    with LargestTensor() as largest:
        dense(weight, torch.float32)
    assert largest.nbytes == 4 * 1024 * 2048
