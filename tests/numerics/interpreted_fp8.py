"""The FP8 Triton kernel on CPU tensors; run with TRITON_INTERPRET=1 set before Triton is imported.

Codes widened to float16, as on GPUs without FP8 instructions. Prints one line for each case that passed.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma4q_kernels.fp8_scaled_mm import E4M3, reference, scaled_mm
from tolerances import FP8_SCALED_MM, rms_error

SHAPES = ((1, 63, 176), (63, 65, 352), (70, 131, 129), (5, 7, 1))
BOUND = FP8_SCALED_MM[torch.float32]


def check(m: int, n: int, k: int) -> None:
    bits = torch.randint(0, 256, (m + n, k), dtype=torch.uint8)
    codes = torch.where(bits & 0x7F == 0x7F, 0, bits).view(E4M3)
    x_q, w_q, x_scale, w_scale, bias = codes[:m], codes[m:], torch.tensor(0.3), torch.rand(n) + 0.1, torch.randn(n)

    def run(x_scale: torch.Tensor) -> torch.Tensor:
        return scaled_mm(x_q, x_scale, w_q, w_scale, bias=bias, out_dtype=torch.float32, backend="triton")

    expected = reference.scaled_mm(x_q, x_scale, w_q, w_scale, bias, torch.float64)
    assert rms_error(run(x_scale), expected) <= BOUND
    assert rms_error(run(x_scale * 1.1), expected) > BOUND


def check_every_code() -> None:
    """One code a row times one: each of the 256 comes out as it is, NaN as NaN."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).reshape(256, 1)
    one = torch.ones(1, 1).to(E4M3)
    out = scaled_mm(every, torch.tensor(1.0), one, torch.ones(1), out_dtype=torch.float32, backend="triton")
    assert torch.equal(out.nan_to_num(9.0), every.float().nan_to_num(9.0))


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN from here on
    for m, n, k in SHAPES:
        check(m, n, k)
        print("scaled_mm", m, n, k)
    check_every_code()
    print("every code")


if __name__ == "__main__":
    main()
