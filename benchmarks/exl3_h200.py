"""EXL3 on one H200, one run: decoding rows, dense weights and the search of trellises, beside the goals.

    python benchmarks/exl3_h200.py [--quick] [--output benchmarks/results/exl3_h200.json]

Gemma 4 31B's linears at 4 bits a weight and M = 1, 4, 8, 16, 64 and 512, "mcg"; the largest of them also at 2, 3, 3.5
and 6 bits. CUDA-graph replay, medians, weights in turn beyond the L2 cache. Every output is compared with the
definition on one block of columns before it is timed. Beside them:

- copy:      bytes a second of a large copy within memory, read and written
- bf16 copy: of a dense matrix of the same size, for `reconstruct`
- bf16:      `F.linear` with the dense weight, for `linear`
- search:    milliseconds a tile, 4096 normally distributed tiles, not in a graph

Not measured: ExLlamaV3's own kernels, accuracy, end-to-end speed.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from exl3_h200_goals import linear_goals, reconstruct_goals  # noqa: E402
from gemma4q_kernels.exl3 import Exl3Weight, linear, reconstruct  # noqa: E402
from gemma4q_kernels.exl3.packing import WINDOWS  # noqa: E402
from h200_goals import Figure  # noqa: E402
from result_file import require_nvidia, write_goals  # noqa: E402

from vllm_gemma4q.benchmark.shapes import Shape, sizes_of  # noqa: E402
from vllm_gemma4q.benchmark.timing import Call, copies_beyond_cache, time_calls  # noqa: E402

M_VALUES = (1, 4, 8, 16, 64, 512)
FORMATS = (("mcg", 64),)
MORE_FORMATS = (("mcg", 32), ("mcg", 48), ("mul1", 56), ("mul1", 64), ("mcg", 96))
COPY_BYTES = 2 << 30
SEARCHED_TILES = 4096
BLOCK = 128
# The most that bfloat16 outputs may differ from the definition's in float64, root mean square: one rounding, or the
# weights' as well where they are made dense in bfloat16.
BOUND = 2.0**-7


def median(calls: Sequence[Call], device: torch.device, budget: float) -> float:
    return statistics.median(time_calls(calls, device, budget))


def copy_bandwidth(device: torch.device, budget: float) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median([partial(target.copy_, source)], device, budget)


def packed(shape: Shape, codebook: str, width: int, device: torch.device) -> Exl3Weight:
    """A random weight: any bits are a valid trellis."""
    size = (shape.k // 16, shape.n // 16, width)
    trellis = torch.randint(-(2**15), 2**15, size, dtype=torch.int16, device=device)
    suh, svh = (torch.randn(features, device=device).sign() for features in (shape.k, shape.n))
    return Exl3Weight(trellis, suh.half(), (svh * 0.02).half(), codebook)


def check(what: str, out: torch.Tensor, x: torch.Tensor, weight: Exl3Weight) -> None:
    """Stop where the last block of columns is not what the definition says."""
    tiles = BLOCK // 16
    part = Exl3Weight(weight.trellis[:, -tiles:], weight.suh, weight.svh[-BLOCK:], weight.codebook)
    expected = linear(x.float(), [part], backend="reference").double()
    error = (out[:, -BLOCK:].double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    if not error <= BOUND:  # NaN is no pass
        raise SystemExit(f"{what}: got a relative error of {error:.2g} against float64, expected at most {BOUND:.2g}")


def linears(
    shape: Shape, codebook: str, width: int, m_values: Sequence[int], device: torch.device, budget: float
) -> Iterator[tuple[int, float, float]]:
    """M, seconds of ours, seconds of `F.linear` in bfloat16."""
    copies = copies_beyond_cache(shape.n * shape.k * width // 128, device)
    weights = [packed(shape, codebook, width, device) for _ in range(copies)]
    dense_copies = copies_beyond_cache(2 * shape.n * shape.k, device)
    dense = [torch.randn(shape.n, shape.k, dtype=torch.bfloat16, device=device) for _ in range(dense_copies)]
    for m in m_values:
        x = torch.randn(m, shape.k, dtype=torch.bfloat16, device=device)
        check(f"{shape} {codebook} {width} M={m}", linear(x, weights[:1], backend="triton"), x, weights[0])
        ours = median([partial(linear, x, [weight], backend="triton") for weight in weights], device, budget)
        yield m, ours, median([partial(F.linear, x, weight) for weight in dense], device, budget)


def reconstructs(shape: Shape, codebook: str, width: int, device: torch.device, budget: float) -> tuple[float, float]:
    """Seconds to make a weight dense in bfloat16, and to copy it."""
    weight = packed(shape, codebook, width, device)
    arguments = (weight.trellis, weight.suh, weight.svh, codebook)
    run = partial(reconstruct, *arguments, dtype=torch.bfloat16, backend="triton")
    source = run()
    x = torch.eye(BLOCK, shape.k, dtype=torch.bfloat16, device=device)
    check(f"reconstruct {shape} {codebook} {width}", source[:BLOCK], x, weight)
    target = torch.empty_like(source)
    return median([run], device, budget), median([partial(target.copy_, source)], device, budget)


def search_seconds(codebook: str, width: int, device: torch.device) -> float:
    """A tile, of many at once."""
    from gemma4q_kernels.exl3.viterbi_triton import search

    tiles = torch.randn(SEARCHED_TILES, WINDOWS, device=device)
    search(tiles, width, codebook)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    search(tiles, width, codebook)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / SEARCHED_TILES


def measure(
    shapes: Sequence[Shape],
    m_values: Sequence[int],
    device: torch.device,
    budget: float,
    say: Callable[[str], object],
) -> tuple[list[Figure], dict[str, Any]]:
    """All figures of linears with their goals, and what they were computed from."""
    bandwidth = copy_bandwidth(device, budget)
    say(f"copy: {bandwidth / 1e12:.2f} TB/s")
    figures: list[Figure] = []
    raw: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "linears": [], "reconstruct": []}
    largest = max(shapes, key=lambda shape: shape.n * shape.k)
    for shape in shapes:
        for codebook, width in FORMATS + (MORE_FORMATS if shape == largest else ()):
            facts = {**dataclasses.asdict(shape), "codebook": codebook, "bits": width / 16}
            found: list[Figure] = []
            for m, ours, bf16 in linears(shape, codebook, width, m_values, device, budget):
                raw["linears"].append({**facts, "m": m, "us": ours * 1e6, "bf16_us": bf16 * 1e6})
                found += linear_goals(shape, width, m, ours, bf16, bandwidth)
            ours, copied = reconstructs(shape, codebook, width, device, budget)
            raw["reconstruct"].append({**facts, "us": ours * 1e6, "copy_us": copied * 1e6})
            found += reconstruct_goals(shape, width, ours, copied)
            for figure in found:
                say(str(figure))
            figures += found
    return figures, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="a timing")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "exl3_h200.json")
    arguments = parser.parse_args()
    require_nvidia("exl3_h200")
    device, say = torch.device("cuda"), partial(print, flush=True)
    shapes = sizes_of("31B").linears
    figures, raw = measure(shapes[: 1 if arguments.quick else None], M_VALUES, device, arguments.seconds, say)
    raw["search"] = []
    for codebook, width in (("mcg", 48), ("mcg", 64), ("mcg", 128)):
        raw["search"].append({"codebook": codebook, "bits": width / 16})
        raw["search"][-1]["ms_a_tile"] = search_seconds(codebook, width, device) * 1e3
        say(json.dumps(raw["search"][-1]))
    write_goals(arguments.output, device, figures, raw)


if __name__ == "__main__":
    main()
