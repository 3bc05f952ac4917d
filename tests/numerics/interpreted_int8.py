"""The INT8 Triton kernels on CPU tensors; run with TRITON_INTERPRET=1 set before Triton is imported.

Outputs are float32: the interpreter truncates bfloat16 stores. Prints one line for each case that passed.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma4q_kernels.int8_scaled_mm import linear, quantize_per_token, scaled_mm
from gemma4q_kernels.int8_scaled_mm import triton as kernels
from gemma4q_kernels.int8_scaled_mm.tiles import Tile, plan
from gemma4q_kernels.support import architecture
from tolerances import INT8_SCALED_MM, rms_error

SHAPES = ((1, 63, 176), (63, 65, 352), (130, 131, 704), (17, 129, 64), (5, 7, 1))
# M, N, K, parts of K: uneven parts, one step a part, parts left with nothing, a remainder in the last part.
SPLITS = ((1, 63, 176, 2), (16, 65, 352, 3), (5, 129, 704, 4), (17, 40, 704, 11), (3, 33, 1, 2), (7, 64, 320, 4))
SMALL = Tile(block_m=16, block_n=32, block_k=64, num_warps=1, num_stages=2)
BOUND = INT8_SCALED_MM[torch.float32]


def check_scaled_mm(m: int, n: int, k: int) -> None:
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w_q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    x_scale, w_scale, bias = torch.rand(m, 1) + 0.1, torch.rand(n) + 0.1, torch.randn(n)
    exact = x_q.double() @ w_q.double().t()

    def run(x_scale: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return scaled_mm(x_q, x_scale, w_q, w_scale, bias=bias, out_dtype=torch.float32, backend="triton")

    assert torch.equal(run(torch.ones(m, 1), torch.ones(n), None).double(), exact)
    expected = exact * x_scale.double() * w_scale.double() + bias.double()
    assert rms_error(run(x_scale, w_scale, bias), expected) <= BOUND
    assert rms_error(run(x_scale * 1.1, w_scale, bias), expected) > BOUND
    strided = scaled_mm(
        x_q.t().contiguous().t(), x_scale, w_q.t().contiguous().t(), w_scale, out_dtype=torch.float32, backend="triton"
    )
    assert torch.equal(strided, run(x_scale, w_scale, None))


def check_split(m: int, n: int, k: int, splits: int) -> None:
    """Any number of parts gives the same bits, twice, and leaves nothing unwritten; a part that is lost shows."""
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w_q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    x_scale, w_scale, bias = torch.rand(m, 1) + 0.1, torch.rand(n) + 0.1, torch.randn(n)
    ones = torch.ones(m, 1), torch.ones(n)
    integers = kernels.launch(x_q, ones[0], w_q, ones[1], None, torch.float32, SMALL, splits)
    assert torch.equal(integers.double(), x_q.double() @ w_q.double().t())
    whole, first, second = (
        kernels.launch(x_q, x_scale, w_q, w_scale, bias, torch.float32, SMALL, parts) for parts in (1, splits, splits)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, whole)
    part = max(1, -(-k // SMALL.block_k // splits)) * SMALL.block_k
    lost = kernels.launch(x_q[:, part:], ones[0], w_q[:, part:], ones[1], None, torch.float32, SMALL, splits)
    assert not torch.equal(lost, integers)


def check_chosen_split() -> None:
    """What the tables choose for a decoding shape is divided, and right."""
    m, n, k = 1, 96, 2816
    assert plan(architecture(torch.device("cpu")), m, n, k)[1] > 1
    check_scaled_mm(m, n, k)


def check_quantization(m: int, k: int, dtype: torch.dtype) -> None:
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m).unsqueeze(1)).to(dtype)
    x[0] = 0
    for values in (x, x.t().contiguous().t()):
        q, scale = kernels.quantize_per_token(values)
        expected_q, expected_scale = quantize_per_token(values)
        assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    assert kernels.quantize_per_token(ties)[0].tolist() == [[127, 0, 2, 2, 0, -2, -127]]


def check_linear(m: int, n: int, k: int) -> None:
    x, w_q, w_scale = torch.randn(m, k), torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n)
    got = linear(x, w_q, w_scale, backend="triton")
    assert rms_error(got, linear(x, w_q, w_scale, backend="reference")) <= BOUND


def check_non_finite_tokens() -> None:
    x = torch.ones(3, 100)
    x[0, 33], x[1, 99] = -float("nan"), -float("inf")
    assert kernels.quantize_per_token(x)[1].flatten().isfinite().tolist() == [False, False, True]


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN from here on
    assert torch.empty(1).isnan()
    for m, n, k in SHAPES:
        check_scaled_mm(m, n, k)
        print("scaled_mm", m, n, k)
    for m, n, k, splits in SPLITS:
        check_split(m, n, k, splits)
        print("split", m, n, k, splits)
    check_chosen_split()
    print("chosen split")
    for m, k in ((1, 1), (5, 704), (3, 2500)):
        for dtype in (torch.float32, torch.bfloat16):
            check_quantization(m, k, dtype)
            print("quantize_per_token", m, k, dtype)
    check_linear(5, 33, 176)
    print("linear")
    check_non_finite_tokens()
    print("non-finite tokens")


if __name__ == "__main__":
    main()
