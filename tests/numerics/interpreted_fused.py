"""The fused quantization kernels on CPU tensors; run with TRITON_INTERPRET=1 set before Triton is imported.

Against the unfused reference. Inputs are float32 and float16: the interpreter truncates bfloat16 stores. Prints one
line for each case that passed.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma4q_kernels.fused_quantize import ROUNDINGS, gated_quantize, rms_norm_quantize
from gemma4q_kernels.int8_scaled_mm import quantize_per_token
from tolerances import FUSED_CODES_DIFFERING, FUSED_RESIDUAL, FUSED_SCALE, rms_error

Quantized = tuple[torch.Tensor, torch.Tensor]
NORM_SHAPES = ((1, 1), (3, 2817))
GATED_SHAPES = ((3, 7), (1, 8200))
DTYPES = (torch.float32, torch.float16)
ACTIVATIONS = ("gelu_tanh", "silu")


def agrees(got: Quantized, expected: Quantized) -> bool:
    """Scales alike, codes at most one apart, and that rarely."""
    apart = (got[0].int() - expected[0].int()).abs()
    rare = (apart > 0).double().mean() <= FUSED_CODES_DIFFERING
    close = ((got[1] - expected[1]).abs() <= FUSED_SCALE * expected[1]).all()
    return bool(apart.max() <= 1 and rare and close)


def check_norm(rows: int, width: int, dtype: torch.dtype, rounding: str) -> None:
    x, residual = (torch.randn(rows, width) * 3).to(dtype), torch.randn(rows, width).to(dtype)
    weight, input_weight = ((torch.rand(width) + 0.5).to(dtype) for _ in range(2))
    for added, before in ((None, None), (residual, None), (residual, input_weight)):

        def run(backend: str, x: torch.Tensor = x, weight: torch.Tensor = weight, added=added, before=before):  # type: ignore[no-untyped-def]
            return rms_norm_quantize(x, weight, added, input_weight=before, rounding=rounding, backend=backend)

        got, expected = run("triton"), run("reference")
        assert agrees(got[:2], expected[:2])
        assert not agrees(run("triton", weight=weight * 1.1)[:2], expected[:2])
        strided = run("triton", x=x.t().contiguous().t(), added=None if added is None else added.t().contiguous().t())
        assert all(torch.equal(a, b) for a, b in zip(strided, got, strict=True) if b is not None)
        if added is None:
            assert got.residual is None
            continue
        assert got.residual.dtype == dtype
        assert rms_error(got.residual, expected.residual) <= FUSED_RESIDUAL[dtype]
        assert rms_error(got.residual, (expected.residual * 1.1).to(dtype)) > FUSED_RESIDUAL[dtype]
        if before is None:
            assert torch.equal(got.residual, x + residual)


def check_gated(rows: int, width: int, dtype: torch.dtype, rounding: str) -> None:
    gate_up = (torch.randn(rows, 2 * width) * 3).to(dtype)
    for activation in ACTIVATIONS:
        got, expected = (
            gated_quantize(gate_up, activation, rounding=rounding, backend=b) for b in ("triton", "reference")
        )
        assert agrees(got, expected)
        halves = gate_up * torch.tensor([1.0, 1.1]).repeat_interleave(width).to(dtype)
        assert not agrees(gated_quantize(halves, activation, rounding=rounding, backend="triton"), expected)


def check_rule() -> None:
    """Given the same float32 row, codes and scales are those of `quantize_per_token`, to the bit."""
    rows, width = 4, 300
    up = torch.randn(rows, width) * torch.logspace(-3, 3, rows).unsqueeze(1)
    up[0] = 0
    up[1, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0])
    up[1, 7:] = 0
    gate = torch.full_like(up, 32.0)  # whose sigmoid is 1 in float32
    expected = quantize_per_token(up * 32)
    for got in (gated_quantize(torch.cat([gate, up], dim=1), a, backend="triton") for a in ACTIVATIONS):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert expected[0][1, :7].tolist() == [127, 0, 2, 2, 0, -2, -127]


def check_roundings_differ() -> None:
    x, weight = torch.randn(32, 100).half(), (torch.rand(100) + 0.5).half()
    gate_up = torch.randn(32, 200).half()
    for run in (
        lambda rounding: rms_norm_quantize(x, weight, rounding=rounding, backend="triton")[:2],
        lambda rounding: gated_quantize(gate_up, rounding=rounding, backend="triton"),
    ):
        scales = [run(rounding)[1] for rounding in ROUNDINGS]
        assert not torch.equal(scales[0], scales[1]) and not torch.equal(scales[1], scales[2])


def check_non_finite_rows() -> None:
    x = torch.ones(3, 100)
    x[0, 33], x[1, 99] = -float("nan"), float("nan")
    assert rms_norm_quantize(x, torch.ones(100), backend="triton").scale.flatten().isfinite().tolist() == [0, 0, 1]
    x[1, 99] = float("inf")
    assert gated_quantize(x, backend="triton")[1].flatten().isfinite().tolist() == [False, False, True]
    extreme = torch.tensor([[-1e30, 1e30, -200.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    q, scale = gated_quantize(extreme, backend="triton")
    assert q.tolist() == [[0, 127, 0, 0]] and scale.isfinite().all()


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN from here on
    assert torch.empty(1).isnan()
    for check, shapes in ((check_norm, NORM_SHAPES), (check_gated, GATED_SHAPES)):
        for rows, width in shapes:
            for dtype in DTYPES:
                for rounding in ROUNDINGS:
                    check(rows, width, dtype, rounding)
                    print(check.__name__, rows, width, dtype, rounding)
    for last in (check_rule, check_roundings_differ, check_non_finite_rows):
        last()
        print(last.__name__)
    assert rms_norm_quantize(torch.ones(0, 8), torch.ones(8), torch.ones(0, 8), backend="triton").q.shape == (0, 8)
    assert gated_quantize(torch.ones(0, 8), backend="triton")[0].shape == (0, 4)
    print("no rows")


if __name__ == "__main__":
    main()
