"""INT8 on one H200, one run: ours and its peers side by side, and the goals beside the figures.

    python benchmarks/int8_h200.py [--quick] [--output benchmarks/results/int8_h200.json]

Gemma 4 31B's linears at M = 1, 16 (decoding), 1024 and 4096; 26B-A4B's experts at 1, 32 and 4096 tokens; the fused
quantizations at 8192 tokens. CUDA-graph replay, medians, weights in turn beyond the L2 cache. Each INT8 output is
compared with float64 on some columns before it is timed. Peers of the linears, all from quantized operands:

- cublaslt: int8 with a 64 MiB workspace, the best of its suggestions; int32 out, no scales (so it does less)
- int_mm:   `torch._int_mm`: cublasLt without a workspace; int32 out, no scales; M > 16 only
- fp8:      `torch._scaled_mm`, scales a row and a column, bfloat16 out
- vllm:     vLLM 0.32's Triton kernel, from its algorithm (peer_triton.py)
- bf16:     `F.linear`

vLLM is not needed. A peer that cannot run is listed with the reason. Not measured: accuracy, end-to-end speed.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import peer_triton  # noqa: E402
from gemma4q_kernels.fused_quantize import gated_quantize, rms_norm_quantize  # noqa: E402
from gemma4q_kernels.grouped_mm import moe_int8  # noqa: E402
from gemma4q_kernels.int8_scaled_mm import scaled_mm  # noqa: E402
from gemma4q_kernels.int8_scaled_mm.triton import quantize_per_token  # noqa: E402
from h200_goals import Figure, experts_goals, fused_goals, linear_goals  # noqa: E402
from peer_cublaslt import CublasLt  # noqa: E402
from result_file import require_nvidia, write_goals  # noqa: E402

from vllm_gemma4q.benchmark.shapes import Shape, sizes_of  # noqa: E402
from vllm_gemma4q.benchmark.timing import Call, copies_beyond_cache, time_calls  # noqa: E402

GPU = torch.device("cuda")
M_VALUES, MOE_TOKENS, FUSED_TOKENS = (1, 16, 1024, 4096), (1, 32, 4096), 8192
EXPERTS, TOP_K, HIDDEN, WIDTH = 128, 8, 2816, 704
COPY_BYTES = 2 << 30
CHECKED = 64

Seconds = dict[str, float]
Reasons = dict[str, str]


def median(calls: Sequence[Call], budget: float) -> float:
    return statistics.median(time_calls(calls, GPU, budget))


def copy_bandwidth(budget: float) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device=GPU).random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median([partial(target.copy_, source)], budget)


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=GPU)


def linears(shape: Shape, m_values: Sequence[int], budget: float) -> Iterator[tuple[int, Seconds, Reasons]]:
    """M, seconds by contender, and why others did not run."""
    copies = copies_beyond_cache(shape.n * shape.k, GPU)
    weights = [int8(shape.n, shape.k) for _ in range(copies)]
    bf16 = [weight.bfloat16() for weight in weights]
    fp8 = [weight.to(torch.float8_e4m3fn) for weight in bf16]
    for m in m_values:
        x = int8(m, shape.k)
        x_scale, w_scale = torch.rand(m, 1, device=GPU) + 0.1, torch.rand(shape.n, device=GPU) + 0.1
        exact = _exact(x, weights[0])
        scaled = (exact.float() * x_scale * w_scale[_columns(shape.n)]).bfloat16()
        accumulator = torch.empty(m, shape.n, dtype=torch.int32, device=GPU)
        x_bf16, w_row = x.bfloat16(), w_scale.reshape(1, -1)
        x_fp8 = x_bf16.to(torch.float8_e4m3fn)
        fp8_mm = partial(
            torch._scaled_mm, scale_a=x_scale, scale_b=w_row, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        candidates: dict[str, tuple[list[Call], torch.Tensor | None]] = {
            "gemma4q": ([partial(scaled_mm, x, x_scale, w, w_scale, backend="triton") for w in weights], scaled),
            "vllm": ([partial(peer_triton.scaled_mm, x, x_scale, w, w_scale) for w in weights], scaled),
            "int_mm": ([partial(torch._int_mm, x, w.t()) for w in weights], exact),
            "fp8": ([partial(fp8_mm, x_fp8, w.t()) for w in fp8], None),
            "bf16": ([partial(F.linear, x_bf16, w) for w in bf16], None),
        }
        seconds: Seconds = {}
        reasons: Reasons = {}
        for name, (calls, expected) in candidates.items():
            try:
                out = calls[0]()
            except (RuntimeError, ValueError) as error:
                reasons[name] = str(error).splitlines()[0]
                continue
            if expected is not None:
                _check(f"{name} M={m} {shape}", out, expected)
            seconds[name] = median(calls, budget)
        _cublaslt(x, weights, accumulator, exact, seconds, reasons, budget)
        yield m, seconds, reasons


def _columns(n: int) -> torch.Tensor:
    return torch.arange(-CHECKED, CHECKED, device=GPU) % n


def _exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.double() @ weight[_columns(len(weight))].double().t()).to(torch.int32)


def _check(what: str, out: Any, expected: torch.Tensor) -> None:
    """Stop where integers differ at all, or bfloat16 by more than a rounding."""
    got = out[:, _columns(out.shape[1])]
    if not torch.allclose(got.double(), expected.double(), rtol=2**-7 if got.is_floating_point() else 0.0, atol=0.0):
        raise SystemExit(f"{what}: got other values than float64")


@cache
def _library() -> CublasLt:
    return CublasLt()


def _cublaslt(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    out: torch.Tensor,
    exact: torch.Tensor,
    seconds: Seconds,
    reasons: Reasons,
    budget: float,
) -> None:
    """The best of cublasLt's suggestions, each timed briefly first."""
    try:
        products = _library().products(len(x), len(weights[0]), x.shape[1])
        if not products:
            raise RuntimeError(f"no algorithm for int8 at M = {len(x)}")
        brief = []
        for product in products:
            out.zero_()  # or what the one before wrote would pass for its own
            product(x, weights[0], out)
            _check("cublaslt", out, exact)
            brief.append(median([partial(product, x, weight, out) for weight in weights], budget / len(products)))
        best = products[brief.index(min(brief))]
        seconds["cublaslt"] = median([partial(best, x, weight, out) for weight in weights], budget)
    except (OSError, AttributeError, RuntimeError) as error:
        reasons["cublaslt"] = str(error).splitlines()[0]


def experts(budget: float) -> Iterator[tuple[int, float]]:
    """Tokens, and seconds of 26B-A4B's experts from bfloat16 to bfloat16, everything but the router included."""
    w13, w2 = int8(EXPERTS, 2 * WIDTH, HIDDEN), int8(EXPERTS, HIDDEN, WIDTH)
    s13, s2 = (torch.rand(weight.shape[:2], device=GPU) * 1e-3 for weight in (w13, w2))
    for tokens in MOE_TOKENS:
        hidden = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=GPU)
        calls: list[Call] = []
        for _ in range(8):  # other experts each time: together more than the cache holds
            weights, ids = torch.rand(tokens, EXPERTS, device=GPU).topk(TOP_K, dim=1)
            routing = weights.softmax(dim=1), ids.to(torch.int32)
            calls.append(partial(moe_int8, hidden, w13, s13, w2, s2, *routing, backend="triton"))
        yield tokens, median(calls, budget)


def fused(budget: float) -> Iterator[tuple[str, int, float, float]]:
    """Name, bytes moved at least, seconds fused, seconds of the same in torch with a Triton quantization behind."""
    for hidden in (5376, 2816):
        copies = copies_beyond_cache(FUSED_TOKENS * hidden * 2, GPU)
        xs, residuals = (
            [torch.randn(FUSED_TOKENS, hidden, dtype=torch.bfloat16, device=GPU) for _ in range(copies)]
            for _ in range(2)
        )
        weight = torch.rand(hidden, dtype=torch.bfloat16, device=GPU)
        pairs = list(zip(xs, residuals, strict=True))
        ours = [partial(rms_norm_quantize, x, weight, residual, backend="triton") for x, residual in pairs]
        theirs = [partial(_unfused_norm, x, weight, residual) for x, residual in pairs]
        n_bytes = FUSED_TOKENS * hidden * 7  # x, residual and their sum in bfloat16, and int8
        yield f"add, RMS norm, int8 [{hidden}]", n_bytes, median(ours, budget), median(theirs, budget)
    for width in (21504, 2112):
        copies = copies_beyond_cache(FUSED_TOKENS * width * 4, GPU)
        gates = [torch.randn(FUSED_TOKENS, 2 * width, dtype=torch.bfloat16, device=GPU) for _ in range(copies)]
        ours = [partial(gated_quantize, gate_up, backend="triton") for gate_up in gates]
        theirs = [partial(_unfused_gate, gate_up) for gate_up in gates]
        n_bytes = FUSED_TOKENS * width * 5  # gate and up in bfloat16, and int8
        yield f"gelu_tanh, int8 [{width}]", n_bytes, median(ours, budget), median(theirs, budget)


def _unfused_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> object:
    total = x + residual
    return quantize_per_token(F.rms_norm(total, weight.shape, weight, 1e-6)), total


def _unfused_gate(gate_up: torch.Tensor) -> object:
    gate, up = gate_up.chunk(2, dim=1)
    return quantize_per_token(F.gelu(gate, approximate="tanh") * up)


def measure(budget: float, quick: bool, say: Callable[[str], object]) -> tuple[list[Figure], dict[str, Any]]:
    """All figures with their goals, and what they were computed from."""
    bandwidth = copy_bandwidth(budget)
    say(f"copy: {bandwidth / 1e12:.2f} TB/s")
    figures: list[Figure] = []
    raw: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "linears": [], "experts": [], "fused": []}

    def add(found: list[Figure]) -> None:
        figures.extend(found)
        for figure in found:
            say(str(figure))

    shapes = sizes_of("31B").linears
    for shape in shapes[:1] if quick else shapes:
        for m, seconds, reasons in linears(shape, M_VALUES, budget):
            facts = {**dataclasses.asdict(shape), "m": m}
            raw["linears"].append({**facts, "us": {k: v * 1e6 for k, v in seconds.items()}, "not_run": reasons})
            say(json.dumps(raw["linears"][-1]))
            add(linear_goals(shape, m, seconds, bandwidth))
    for tokens, each in experts(budget):
        raw["experts"].append({"tokens": tokens, "us": each * 1e6})
        add(experts_goals(tokens, TOP_K, HIDDEN, WIDTH, each))
    for name, n_bytes, ours, theirs in fused(budget):
        raw["fused"].append({"name": name, "us": ours * 1e6, "unfused_us": theirs * 1e6})
        add(fused_goals(name, n_bytes, ours, theirs, bandwidth))
    return figures, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="a timing")
    parser.add_argument("--quick", action="store_true", help="one shape of the linears")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "int8_h200.json")
    arguments = parser.parse_args()
    require_nvidia("int8_h200")
    figures, raw = measure(arguments.seconds, arguments.quick, partial(print, flush=True))
    write_goals(arguments.output, GPU, figures, raw)


if __name__ == "__main__":
    main()
