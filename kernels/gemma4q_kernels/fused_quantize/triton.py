"""The fused steps in Triton for NVIDIA and AMD GPUs, one program a row.

Layouts: inputs with unit stride along a row, outputs contiguous. A row that fits one block stays in registers between
its two passes; a longer one (`gated_quantize` only) is read twice, the second time from the cache.

Float32 operations are not contracted (`enable_fp_fusion=False`): the rounding of codes relies on it.

Not done here: several rows a program, for many rows that are short.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
import torch
import triton
import triton.language as tl

from gemma4q_kernels.fused_quantize.problem import ROUNDINGS, Normed, Problem
from gemma4q_kernels.int8_scaled_mm.quantize import TOKEN_ABSMAX_MIN
from gemma4q_kernels.support import Support, no, triton_support

MAX_BLOCK = 8192  # values of a row that a program holds at a time
_MAX_NORM_WIDTH = MAX_BLOCK
_ABSMAX_MIN = tl.constexpr(TOKEN_ABSMAX_MIN)
# Adding and taking away 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, halves to even.
_ROUND = tl.constexpr(12582912.0)
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


def can_implement(problem: Problem) -> Support:
    """A GPU (or the interpreter); norms of rows that one block holds."""
    support = triton_support(problem.device)
    if support and problem.width_in == problem.width_out > _MAX_NORM_WIDTH:
        return no(f"norms rows of up to {_MAX_NORM_WIDTH} values, got {problem.width_in}")
    return support


@triton.jit
def _magnitudes(x):
    """|x| of float32 as integers: they order like the floats, and NaN above all, which tl.max of floats would lose."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _token_scale(largest):
    """The scale of a row whose greatest magnitude, as an integer, is `largest`."""
    absmax = largest.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(absmax < _ABSMAX_MIN, _ABSMAX_MIN, absmax), 127.0)


@triton.jit
def _codes(x, scale):
    rounded = (x * tl.div_rn(1.0, scale) + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


@triton.jit
def _product(first, second, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """first * second in float32, after ROUNDING roundings to DTYPE."""
    if ROUNDING >= 2:
        first = first.to(DTYPE).to(tl.float32)
    product = first * second
    if ROUNDING >= 1:
        product = product.to(DTYPE).to(tl.float32)
    return product


@triton.jit
def _rms_norm(x, weight, H, eps, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """The norm of a row of H values, the block's rest being zeros."""
    mean_square = tl.div_rn(tl.sum(x * x, axis=0), H.to(tl.float32))
    return _product(x * tl.rsqrt(mean_square + eps), weight, DTYPE, ROUNDING)


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    input_weight_ptr,
    q_ptr,
    scale_ptr,
    sum_ptr,
    H,
    stride_x,
    stride_residual,
    eps,
    ADD: tl.constexpr,
    NORM_INPUT: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: sum = [norm](x) + residual, q and scale of norm(sum) * weight."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < H
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride_x + offsets, mask=mask, other=0.0).to(tl.float32)
    if NORM_INPUT:
        input_weight = tl.load(input_weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = _rms_norm(x, input_weight, H, eps, dtype, ROUNDING)
    if ADD:
        residual = tl.load(residual_ptr + row * stride_residual + offsets, mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * H + offsets, total, mask=mask)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = _rms_norm(x, weight, H, eps, dtype, ROUNDING)
    scale = _token_scale(tl.max(_magnitudes(x), axis=0))
    tl.store(scale_ptr + row, scale)
    tl.store(q_ptr + row * H + offsets, _codes(x, scale), mask=mask)


@triton.jit
def _gated(row_ptr, offsets, WIDTH, SILU: tl.constexpr, ROUNDING: tl.constexpr):
    """act(gate) * up at `offsets` of a row, zeros beyond WIDTH."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    gate = tl.load(row_ptr + offsets, mask=offsets < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + WIDTH + offsets, mask=offsets < WIDTH, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 is sigmoid(2 u), which is stable at both ends.
    slope = gate if SILU else _TWICE_SQRT_2_OVER_PI * (gate + 0.044715 * (gate * gate * gate))
    return _product(gate / (1.0 + tl.exp(-slope)), up, dtype, ROUNDING)


@triton.jit
def gated_quantize_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    WIDTH,
    stride_x,
    SILU: tl.constexpr,
    ROUNDING: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of gate and up: q and scale of act(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    row_ptr = x_ptr + row * stride_x
    if ONE_BLOCK:
        y = _gated(row_ptr, offsets, WIDTH, SILU, ROUNDING)
        scale = _token_scale(tl.max(_magnitudes(y), axis=0))
        tl.store(q_ptr + row * WIDTH + offsets, _codes(y, scale), mask=offsets < WIDTH)
    else:
        largest = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, WIDTH, BLOCK):
            largest = tl.maximum(largest, _magnitudes(_gated(row_ptr, start + offsets, WIDTH, SILU, ROUNDING)))
        scale = _token_scale(tl.max(largest, axis=0))
        for start in range(0, WIDTH, BLOCK):
            y = _gated(row_ptr, start + offsets, WIDTH, SILU, ROUNDING)
            tl.store(q_ptr + row * WIDTH + start + offsets, _codes(y, scale), mask=start + offsets < WIDTH)
    tl.store(scale_ptr + row, scale)


def block_and_warps(width: int) -> tuple[int, int]:
    """Values of a row held at a time, and warps that hold them: 16 values a lane, where the row is long enough."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return block, min(16, max(1, block // 512))


def _outputs(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty((rows, width), dtype=torch.int8, device=device)
    return q, torch.empty((rows, 1), dtype=torch.float32, device=device)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    input_weight: torch.Tensor | None,
    eps: float,
    rounding: str,
) -> Normed:
    """See `gemma4q_kernels.fused_quantize.rms_norm_quantize`."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = _outputs(rows, width, x.device)
    added = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if not rows:
        return Normed(q, scale, added)
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    block, warps = block_and_warps(width)
    rms_norm_quantize_kernel[(rows,)](
        x,
        x if residual is None else residual,  # never read without one, but Triton needs a pointer
        weight.contiguous(),
        weight if input_weight is None else input_weight.contiguous(),
        q,
        scale,
        x if added is None else added,
        width,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        eps,
        ADD=residual is not None,
        NORM_INPUT=input_weight is not None,
        ROUNDING=ROUNDINGS.index(rounding),
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return Normed(q, scale, added)


def gated_quantize(gate_up: torch.Tensor, activation: str, rounding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gemma4q_kernels.fused_quantize.gated_quantize`."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    q, scale = _outputs(rows, width, gate_up.device)
    if rows:
        block, warps = block_and_warps(width)
        gated_quantize_kernel[(rows,)](
            gate_up,
            q,
            scale,
            width,
            gate_up.stride(0),
            SILU=activation == "silu",
            ROUNDING=ROUNDINGS.index(rounding),
            ONE_BLOCK=width <= block,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return q, scale
