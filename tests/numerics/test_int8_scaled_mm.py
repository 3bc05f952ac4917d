"""INT8 W8A8 on the CPU: exact sums, the epilogue's bound, the chooser, packed weights."""

import os
import subprocess
import sys

import pytest
import torch
from gemma4q_kernels.int8_scaled_mm import choose, cpu, linear, pack, pack_linear, quantize_per_token, scaled_mm
from gemma4q_kernels.int8_scaled_mm.cpu import OneDnnWeight, PlainWeight
from gemma4q_kernels.int8_scaled_mm.cpu_few_rows import FewRowsWeight
from gemma4q_kernels.int8_scaled_mm.problem import MAX_K, Problem
from gemma4q_kernels.support import vllm_onednn
from tolerances import INT8_SCALED_MM, rms_error

SHAPES = [(1, 63, 176), (63, 101, 352), (500, 129, 704), (16, 64, 64), (3, 1, 1)]
BACKENDS = ["int_mm", "reference"]


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes over the whole int8 range, scales of a realistic size."""
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    w_q = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    x_scale = torch.rand(m, 1, generator=generator) * 1e-2 + 1e-4
    w_scale = torch.rand(n, generator=generator) * 1e-3 + 1e-5
    return x_q, x_scale, w_q, w_scale


def oracle(x_q: torch.Tensor, x_scale: torch.Tensor, w_q: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Float64 throughout."""
    return (x_q.double() @ w_q.double().t()) * x_scale.double() * w_scale.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_part_is_exact(backend: str, shape: tuple[int, int, int], poisoned_memory: None) -> None:
    x_q, _, w_q, _ = operands(*shape)
    ones = torch.ones(shape[0], 1), torch.ones(shape[1])
    got = scaled_mm(x_q, ones[0], w_q, ones[1], out_dtype=torch.float32, backend=backend)
    assert torch.equal(got.double(), oracle(x_q, ones[0], w_q, ones[1]))


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_sums_are_exact(backend: str, code: int) -> None:
    x_q, w_q = torch.full((5, 704), -128, dtype=torch.int8), torch.full((3, 704), code, dtype=torch.int8)
    got = scaled_mm(x_q, torch.ones(5, 1), w_q, torch.ones(3), out_dtype=torch.float32, backend=backend)
    assert bool((got == -128 * code * 704).all())


@pytest.mark.parametrize("dtype", INT8_SCALED_MM, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_output(backend: str, shape: tuple[int, int, int], dtype: torch.dtype, poisoned_memory: None) -> None:
    x_q, x_scale, w_q, w_scale = operands(*shape)
    bias = torch.linspace(-1, 1, shape[1])
    got = scaled_mm(x_q, x_scale, w_q, w_scale, bias=bias, out_dtype=dtype, backend=backend)
    assert got.dtype == dtype and got.shape == shape[:2]
    assert rms_error(got, oracle(x_q, x_scale, w_q, w_scale) + bias) <= INT8_SCALED_MM[dtype]
    corrupted = scaled_mm(x_q, x_scale, w_q, w_scale * 1.1, out_dtype=dtype, backend=backend)
    assert rms_error(corrupted, oracle(x_q, x_scale, w_q, w_scale)) > INT8_SCALED_MM[dtype]


def test_any_strides() -> None:
    x_q, x_scale, w_q, w_scale = operands(63, 101, 352)
    expected = scaled_mm(x_q, x_scale, w_q, w_scale)
    assert torch.equal(expected, scaled_mm(x_q, x_scale, w_q.t().contiguous().t(), w_scale))
    assert torch.equal(expected, scaled_mm(x_q.t().contiguous().t(), x_scale.flatten(), w_q, w_scale.unsqueeze(1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices(backend: str) -> None:
    x_q, _, w_q, _ = operands(16, 64, 128)
    ones = torch.ones(16, 1), torch.ones(21)
    x, w = x_q[:, 1::2], w_q[1::3, 1::2]
    got = scaled_mm(x, ones[0], w, ones[1], out_dtype=torch.float32, backend=backend)
    assert torch.equal(got.double(), oracle(x, ones[0], w, ones[1]))


def test_empty_batch() -> None:
    _, _, w_q, w_scale = operands(1, 5, 8)
    assert linear(torch.empty(0, 8), w_q, w_scale).shape == (0, 5)
    assert pack(w_q, w_scale).linear(torch.empty(0, 8)).shape == (0, 5)


@pytest.mark.parametrize("dtype", INT8_SCALED_MM, ids=str)
def test_linear_quantizes_per_token(dtype: torch.dtype) -> None:
    _, _, w_q, w_scale = operands(1, 33, 176)
    x = torch.randn(2, 7, 176, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = linear(x, w_q, w_scale)
    assert got.shape == (2, 7, 33) and got.dtype == dtype
    expected = oracle(*quantize_per_token(x.view(14, 176)), w_q, w_scale).view(2, 7, 33)
    assert rms_error(got, expected) <= INT8_SCALED_MM[dtype]


def has_exact_onednn() -> bool:
    """Whether vLLM's oneDNN can be used: not on x86 without VNNI."""
    return bool(OneDnnWeight.can_implement(Problem(torch.device("cpu"), 1, 64, 64, torch.float32)))


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_onednn_is_exact(shape: tuple[int, int, int], dtype: torch.dtype, poisoned_memory: None) -> None:
    x_q, x_scale, w_q, w_scale = operands(*shape)
    if not has_exact_onednn():
        with pytest.raises(ValueError, match="onednn refuses: vLLM's oneDNN saturates on this CPU"):
            pack(w_q, w_scale, backend="onednn")
        return
    packed = pack(w_q, torch.ones(shape[1]), torch.float32, backend="onednn")
    ones = torch.ones(shape[0], 1)
    assert torch.equal(packed.scaled_mm(x_q, ones).double(), oracle(x_q, ones, w_q, torch.ones(shape[1])))

    bias = torch.linspace(-1, 1, shape[1])
    packed = pack(w_q, w_scale.clone(), dtype, backend="onednn")
    expected = oracle(x_q, x_scale, w_q, w_scale)
    del w_q  # the packed weight stands alone
    assert rms_error(packed.scaled_mm(x_q, x_scale, bias), expected + bias) <= INT8_SCALED_MM[dtype]
    assert rms_error(packed.scaled_mm(x_q, x_scale * 1.1), expected) > INT8_SCALED_MM[dtype]


def test_packed_and_plain_weights_agree() -> None:
    _, _, w_q, w_scale = operands(1, 33, 176)
    x = torch.randn(7, 176, generator=torch.Generator().manual_seed(1))
    best, plain = pack(w_q, w_scale, torch.float32), pack(w_q, w_scale, torch.float32, backend="plain")
    assert isinstance(plain, PlainWeight)
    assert isinstance(best, OneDnnWeight) == has_exact_onednn()
    assert rms_error(best.linear(x), plain.linear(x)) <= INT8_SCALED_MM[torch.float32]


@pytest.mark.engine
@pytest.mark.parametrize("rows", [1, 5, 33, 130])
@pytest.mark.parametrize("shape", [(32, 96), (64, 544), (512, 1024)], ids=str)
def test_layout_for_few_rows(shape: tuple[int, int], rows: int, poisoned_memory: None) -> None:
    """Any number of rows, few or not. On a CPU without AMX this is the layout that `pack` chooses."""
    _, _, w_q, w_scale = operands(1, *shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.linspace(-1, 1, shape[0])
    packed = pack_linear(w_q, w_scale, rows=1)
    assert isinstance(packed, FewRowsWeight) == bool(vllm_onednn() and torch.cpu._is_amx_tile_supported())
    expected = oracle(*quantize_per_token(x), w_q, w_scale)
    bound = INT8_SCALED_MM[torch.bfloat16]
    assert rms_error(packed.linear(x), expected) <= bound < rms_error(packed.linear(x), expected * 1.1)
    assert rms_error(packed.linear(x, bias), expected + bias) <= bound


def test_layout_for_few_rows_hides_no_nan() -> None:
    _, _, w_q, w_scale = operands(1, 32, 96)
    x = torch.ones(3, 96, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    out = pack_linear(w_q, w_scale, rows=1).linear(x)
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()


@pytest.mark.parametrize(
    ("n", "k", "dtype", "rows"),
    [
        (33, 64, torch.bfloat16, 1),
        (32, 48, torch.bfloat16, 1),
        (32, 64, torch.float32, 1),
        (32, 64, torch.bfloat16, 65),
    ],
)
def test_other_shapes_get_another_layout(n: int, k: int, dtype: torch.dtype, rows: int) -> None:
    _, _, w_q, w_scale = operands(1, n, k)
    packed = pack_linear(w_q, w_scale, dtype, rows=rows)
    assert not isinstance(packed, FewRowsWeight)
    assert packed.linear(torch.ones(2, k, dtype=dtype)).shape == (2, n)


def test_auto_on_a_cpu() -> None:
    choice = choose("cpu", 1, 64, 64, torch.bfloat16)
    assert choice.name in BACKENDS and "triton" not in dict(choice.refusals)


def test_auto_lists_what_was_refused() -> None:
    choice = choose("meta", 1, 64, 64, torch.bfloat16)
    assert choice.name == "reference"
    assert [name for name, _ in choice.refusals] == ["triton", "int_mm"]
    assert all("meta" in reason for _, reason in choice.refusals)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", 1, 64, 64, torch.bfloat16, "triton"), r"M=1 N=64 K=64 .*triton: .*TRITON_INTERPRET=1.*device cpu"),
        (("cuda", 16, 64, 64, torch.bfloat16, "int_mm"), r"int_mm: .*needs M > 16, got M = 16"),
        (("cuda", 17, 63, 64, torch.bfloat16, "int_mm"), r"int_mm: .*got N = 63, K = 64"),
        (("cpu", 1, 64, 64, torch.bfloat16, "cutlass"), r"got 'cutlass', expected 'auto' or one of"),
        (("cpu", 1, 64, MAX_K + 1, torch.bfloat16, "auto"), rf"K: got {MAX_K + 1}, expected at most {MAX_K}"),
        (("cpu", 1, 64, 64, torch.int32, "auto"), r"out_dtype: got torch.int32"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_refusals_name_the_value(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*arguments)  # type: ignore[arg-type]


def test_explicit_backend_never_falls_back() -> None:
    x_q, x_scale, w_q, w_scale = operands(1, 8, 8)
    with pytest.raises(ValueError, match="triton:"):
        scaled_mm(x_q, x_scale, w_q, w_scale, backend="triton")
    with pytest.raises(ValueError, match="expected 'auto', 'onednn' or 'plain'"):
        pack(w_q, w_scale, backend="int_mm")


def test_operands_that_do_not_fit() -> None:
    x_q, x_scale, w_q, w_scale = operands(3, 5, 8)
    with pytest.raises(ValueError, match=r"x_q: got torch.int8 \(3, 7\), expected int8 \[M, 8\]"):
        scaled_mm(x_q[:, :7], x_scale, w_q, w_scale)
    with pytest.raises(ValueError, match=r"w_scale: got torch.float64 \(5,\)"):
        scaled_mm(x_q, x_scale, w_q, w_scale.double())
    with pytest.raises(ValueError, match=r"x_scale: got torch.float32 \(2, 1\)"):
        scaled_mm(x_q, x_scale[:2], w_q, w_scale)
    with pytest.raises(ValueError, match=r"bias: got torch.float32 \(4,\), expected float \[5\]"):
        scaled_mm(x_q, x_scale, w_q, w_scale, bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"w_q: got torch.uint8"):
        scaled_mm(x_q, x_scale, w_q.to(torch.uint8), w_scale)
    with pytest.raises(ValueError, match=r"x: got torch.float32 \(3, 7\), expected float \[.., 8\]"):
        linear(torch.zeros(3, 7), w_q, w_scale)


SATURATING = """
import torch
from gemma4q_kernels.int8_scaled_mm import choose, pack, scaled_mm
x, w = torch.full((7, 704), 127, dtype=torch.int8), torch.full((5, 704), 127, dtype=torch.int8)
out = scaled_mm(x, torch.ones(7, 1), w, torch.ones(5), out_dtype=torch.float32)
assert (out == 704 * 127 * 127).all(), out
packed = pack(w, torch.ones(5), torch.float32).scaled_mm(x, torch.ones(7, 1))
assert (packed == 704 * 127 * 127).all(), packed
print(int((torch._int_mm(x, w.t()) == 704 * 127 * 127).all()), choose("cpu", 7, 5, 704, torch.float32).name)
"""


def test_a_cpu_that_saturates_is_found_out() -> None:
    """oneDNN without VNNI (here: told not to use it) is silently wrong; the result must be right all the same."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", SATURATING], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exact, name = done.stdout.split()
    assert name == ("int_mm" if exact == "1" else "reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 2816), (17, 33), (5, 1), (0, 8), (3, 0)], ids=str)
def test_rows_are_quantized_alike_by_vllm(shape: tuple[int, int], dtype: torch.dtype, poisoned_memory: None) -> None:
    assert vllm_onednn()  # loads the operators
    x = (torch.randn(shape) * 3).to(dtype)
    for got, expected in zip(cpu.quantize_per_token(x), quantize_per_token(x), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_is_not_hidden_by_vllm(value: float) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = value
    x[2] = 0
    q, scale = cpu.quantize_per_token(x)
    assert not bool(scale[1].isfinite()) and bool(scale[0].isfinite())
    assert bool((q[2].float() * scale[2] == 0).all())
    x[1, 5] = 0.0
    assert bool((cpu.quantize_per_token(x)[0][2] == 0).all())
