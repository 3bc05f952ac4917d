"""Symmetric INT8 quantization: weights per output channel, activations per token.

Weights follow AMD Quark's Int8PerChannelSpec(symmetric, half_even, MinMax) to the bit, so that a checkpoint written
here and one written by Quark 0.13 are the same checkpoint:

    scale = max(absmax / 127.5, 2**-23)     in bfloat16 for a bfloat16 weight, else in float32; 127.5 = (127 + 128) / 2
    q     = clamp(round_half_even(w * (1 / scale)), -128, 127)                  in float32

The step is thus 0.4 % finer than absmax / 127, and a value at +absmax may lie up to 0.75 steps above the largest
code. A row of zeros has the scale 2**-23 and dequantizes to exact zeros; rows below 127.5 * 2**-23 lose their digits.

Activations follow vLLM's kernels: scale = absmax / 127, q = round_half_even(x * (1 / scale)), never below -127.

Every operation below synchronizes torch's threads. Where the cores are also doing something else, tensors quantized
side by side in threads of their own (after torch.set_num_threads(1)) are many times faster than two threads on one.

Not done here: zero points, groups, calibration.
"""

import torch

WEIGHT_LEVELS = 127.5
WEIGHT_SCALE_MIN = 2.0**-23
TOKEN_LEVELS = 127.0
TOKEN_ABSMAX_MIN = 1e-10

# Float32 scratch. On a CPU it fits the level-2 caches of two cores, so that the weight crosses memory once.
_SCRATCH_ELEMENTS_CPU = 3 << 17
_SCRATCH_ELEMENTS_GPU = 1 << 24


def quantize_per_channel(
    weight: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight to INT8 with one scale an output channel (row).

    Args:
        weight: float [N, K], any strides; on a CPU read once, through 1.5 MB of scratch (or one row).
        out: int8 [N, K] and float32 [N] to write into, contiguous or not.

    Returns:
        int8 [N, K] and float32 [N], with weight ~ q * scale[:, None].

    Raises:
        ValueError: not a float matrix; `out` does not fit; NaN or infinity in the weight (then `out` holds junk).
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: got {weight.dtype} {tuple(weight.shape)}, expected a float matrix [N, K]")
    q, scale = _outputs(weight) if out is None else _checked_outputs(weight, out)
    if not weight.numel():
        scale.fill_(WEIGHT_SCALE_MIN)
        return q, scale
    budget = _SCRATCH_ELEMENTS_CPU if weight.device.type == "cpu" else _SCRATCH_ELEMENTS_GPU
    rows = min(max(1, budget // weight.shape[1]), weight.shape[0])
    scratch = torch.empty(rows, weight.shape[1], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        _quantize_block(block, q[start : start + rows], scale[start : start + rows], scratch[: len(block)])
    if not bool(scale.isfinite().all()):
        raise ValueError(_describe_non_finite(weight, rows))
    return q, scale


def _outputs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(weight.shape, dtype=torch.int8, device=weight.device),
        torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device),
    )


def _checked_outputs(weight: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    expected = ((torch.int8, weight.shape), (torch.float32, weight.shape[:1]))
    for tensor, (dtype, shape) in zip(out, expected, strict=True):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"out: got {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(shape)}")
    return out


def _quantize_block(block: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, scratch: torch.Tensor) -> None:
    """Quantize rows through `scratch`. A NaN or an infinity in a row ends up in its scale.

    Separate amax and amin over float32 are twice as fast as aminmax over it, and as either over bfloat16.
    """
    scratch.copy_(block)
    absmax = torch.maximum(scratch.amax(dim=1), scratch.amin(dim=1).neg_())
    # Quark divides in the dtype of the weight and only then widens, so the scale has that dtype's precision.
    # Not so for float16, whose small scales are subnormal: rounding them could clip a row by tens of steps.
    absmax = absmax if block.dtype == torch.float16 else absmax.to(block.dtype)
    rounded = (absmax / WEIGHT_LEVELS).clamp_min_(WEIGHT_SCALE_MIN)
    scale.copy_(rounded)
    inverse = rounded.float().reciprocal_().unsqueeze(1)
    q.copy_(scratch.mul_(inverse).round_().clamp_(-128.0, 127.0))


def _describe_non_finite(weight: torch.Tensor, rows: int) -> str:
    count, first = 0, None
    for start in range(0, weight.shape[0], rows):
        bad = weight[start : start + rows].isfinite().logical_not_().nonzero()
        if len(bad) and first is None:
            first = (start + int(bad[0, 0]), int(bad[0, 1]))
        count += len(bad)
    if first is None:
        return "weight: got values that overflow float32, expected finite values"
    value = float(weight[first])
    return f"weight: got {count} NaN or infinite values, the first at {list(first)} ({value}), expected finite values"


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to INT8 with one scale a token (row).

    Args:
        x: float [M, K].

    Returns:
        int8 [M, K] and float32 [M, 1], with x ~ q * scale. Rows below 1e-10 become zeros.
        A NaN or an infinity in a row makes that row's scale NaN or infinite: it is not hidden.

    Raises:
        ValueError: not a float matrix.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected a float matrix [M, K]")
    if not x.shape[1]:
        return x.to(torch.int8), x.new_full((x.shape[0], 1), TOKEN_ABSMAX_MIN / TOKEN_LEVELS, dtype=torch.float32)
    wide = x.float()
    absmax = torch.maximum(wide.amax(dim=1, keepdim=True), wide.amin(dim=1, keepdim=True).neg_())
    scale = absmax.clamp_min_(TOKEN_ABSMAX_MIN).div_(TOKEN_LEVELS)
    return (wide * scale.reciprocal()).round_().clamp_(-127.0, 127.0).to(torch.int8), scale
