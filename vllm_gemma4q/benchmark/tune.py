"""Time INT8 tiles on a GPU, check what they compute, and make tile tables of the times.

Weights are taken in turn beyond the cache, calls are captured in CUDA graphs. Each choice's output is compared with a
float64 product on some columns (dense) or pairs (experts) before it is timed: a tile that computes something else is an
error, not a candidate. Tiles that spill, do not fit or do not launch are left out.
"""

import datetime
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemma4q_kernels.grouped_mm.triton import grouped_scaled_mm
from gemma4q_kernels.grouped_mm.triton_routing import Blocks, route
from gemma4q_kernels.int8_scaled_mm.tiles import Provenance, Row, Tile, TileTable, load
from gemma4q_kernels.int8_scaled_mm.triton import launch
from triton.runtime.errors import OutOfResources, PTXASError

from gguf_mixed.atomic_file import write_file
from vllm_gemma4q.benchmark.candidates import Band, choices
from vllm_gemma4q.benchmark.search import Choice, Problem, rows_of
from vllm_gemma4q.benchmark.shapes import Experts, Shape
from vllm_gemma4q.benchmark.timing import Call, copies_beyond_cache, time_calls

Measured = dict[Problem, dict[Choice, float]]

_CHECKED = 64  # columns at either end of the output, or pairs
_ROUTINGS = 8  # of which each takes other experts: together more weights than a cache holds


@dataclass(frozen=True)
class Tuner:
    """One device and how to time on it.

    Attributes:
        in_use: the table that serves the device now: its choices are candidates too.
        compute_units: those of the table to be made, which decide what a `split_k` of "auto" means.
        is_usable: whether a tile is worth timing, from what it compiles to.
        budget: seconds a timing. done: called after each.
        dtype: of outputs (float32 in Triton's interpreter, which truncates bfloat16).
    """

    device: torch.device
    in_use: TileTable
    compute_units: int
    is_usable: Callable[[Tile], bool]
    budget: float = 0.03
    done: Callable[[], object] = lambda: None
    dtype: torch.dtype = torch.bfloat16
    _memo: dict[tuple[Problem, Tile, int], float | None] = field(default_factory=dict, init=False)

    def plan(self, bands: Sequence[Band], sizes: Sequence[tuple[int, int]], amd: bool) -> dict[Problem, list[Choice]]:
        """Choices to time at each problem."""
        planned = {}
        for band in bands:
            problems = [Problem(m, n, k) for m in band.timed for n, k in sizes]
            usable = [c for c in choices(band, amd, self.in_use.rows, problems) if self.is_usable(c.tile)]
            planned.update(dict.fromkeys(problems, usable))
        return planned

    def dense(self, shapes: Sequence[Shape], planned: dict[Problem, list[Choice]]) -> Measured:
        """Seconds of each choice at each problem of linears.

        Raises:
            ValueError: a tile that computes something else.
        """
        measured: Measured = {}
        for shape in shapes:
            copies = copies_beyond_cache(shape.n * shape.k, self.device)
            weights = [_int8((shape.n, shape.k), self.device) for _ in range(copies)]
            for problem in planned:
                if (problem.n, problem.k) == (shape.n, shape.k):
                    measured[problem] = dict(self._dense_times(problem, weights, planned[problem]))
        return measured

    def experts(self, sizes: Sequence[Experts], planned: dict[Problem, list[Choice]]) -> Measured:
        """The same of both multiplications of experts; M is the mean number of pairs an expert."""
        measured: Measured = {}
        for experts in sizes:
            for n, k, is_first in (
                (2 * experts.width, experts.hidden, True),
                (experts.hidden, experts.width, False),
            ):
                weight = _int8((experts.count, n, k), self.device)
                for problem in planned:
                    if (problem.n, problem.k) == (n, k):
                        found = self._expert_times(problem, experts, weight, is_first, planned[problem])
                        measured.setdefault(problem, {}).update(found)
        return measured

    def _dense_times(
        self, problem: Problem, weights: Sequence[torch.Tensor], planned: Sequence[Choice]
    ) -> Iterator[tuple[Choice, float]]:
        x = _int8((problem.m, problem.k), self.device)
        x_scale, w_scale = torch.ones(problem.m, 1, device=x.device), torch.ones(problem.n, device=x.device)
        # Both edges; columns repeat where there are fewer. The kernel rounds to float32, then to its output.
        columns = torch.arange(-_CHECKED, _CHECKED, device=x.device) % problem.n
        expected = (x.double() @ weights[0][columns].double().t()).float().to(self.dtype)
        for choice in planned:
            splits = self._splits(problem, choice)
            key = (problem, choice.tile, splits)
            if key not in self._memo:
                calls = [
                    partial(launch, x, x_scale, w, w_scale, None, self.dtype, choice.tile, splits) for w in weights
                ]
                self._memo[key] = self._timed(
                    choice, problem, calls, lambda first: torch.equal(first()[:, columns], expected)
                )
            self.done()
            seconds = self._memo[key]
            if seconds is not None:
                yield choice, seconds

    def _splits(self, problem: Problem, choice: Choice) -> int:
        """Parts of K that a table with this choice would make."""
        row = Row(tile=choice.tile, split_k=choice.split_k)
        return self.in_use.model_copy(update={"rows": (row,), "compute_units": self.compute_units}).plan(*problem)[1]

    def _expert_times(
        self, problem: Problem, experts: Experts, weight: torch.Tensor, is_first: bool, planned: Sequence[Choice]
    ) -> Iterator[tuple[Choice, float]]:
        # One pair an expert on average is what decoding has at most: a single token, most experts without a pair.
        tokens = 1 if problem.m == 1 else max(1, problem.m * experts.count // experts.top_k)
        ids = [_routing(tokens, experts, self.device) for _ in range(_ROUTINGS)]
        pairs = tokens * experts.top_k
        x = _int8((tokens if is_first else pairs, problem.k), self.device)
        x_scale, w_scale = torch.ones(len(x), 1, device=x.device), torch.ones(weight.shape[:2], device=x.device)
        out = torch.empty((pairs, problem.n), dtype=self.dtype, device=x.device)
        topk = None if is_first else torch.ones(pairs, device=x.device)
        some = torch.arange(min(pairs, _CHECKED), device=x.device)
        columns = torch.arange(-_CHECKED, 0, device=x.device) % problem.n
        chosen = weight[ids[0].view(-1)[some].long()][:, columns].double()
        rows = x[some // (pairs // len(x))].double()
        expected = torch.einsum("ijk,ik->ij", chosen, rows).float().to(self.dtype)
        blocks: dict[int, list[Blocks]] = {}
        for choice in planned:
            tile = choice.tile
            if tile.block_m not in blocks:
                blocks[tile.block_m] = [route(each, experts.count, None, tile.block_m) for each in ids]
            calls = [
                partial(grouped_scaled_mm, x, x_scale, weight, w_scale, each, out, tile, topk)
                for each in blocks[tile.block_m]
            ]

            def is_right(first: Call) -> bool:
                out.fill_(float("nan"))
                first()
                return torch.equal(out[some][:, columns], expected)

            seconds = self._timed(choice, problem, calls, is_right)
            self.done()
            if seconds is not None:
                yield choice, seconds

    def _timed(
        self, choice: Choice, problem: Problem, calls: Sequence[Any], is_right: Callable[[Any], bool]
    ) -> float | None:
        """Median seconds a call; None where the tile cannot be launched."""
        try:
            right = is_right(calls[0])
        except (OutOfResources, PTXASError):
            return None
        if not right:
            raise ValueError(f"{choice.tile} at M, N, K = {tuple(problem)}: got other sums than float64's")
        return statistics.median(time_calls(calls, self.device, self.budget))


def _int8(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _routing(tokens: int, experts: Experts, device: torch.device) -> torch.Tensor:
    """[T, k] distinct experts a token, all equally likely."""
    return torch.rand(tokens, experts.count, device=device).topk(experts.top_k, dim=1).indices.to(torch.int32)


def make_table(
    times: Measured,
    bands: Sequence[Band],
    one_block_m: bool,
    *,
    architecture: str,
    compute_units: int,
    gpu: str,
    versions: dict[str, str],
) -> TileTable:
    """The table that the times call for, with its provenance."""
    method = (
        f"gemma4q tune: {sum(map(len, times.values()))} timings at {len(times)} problems, random int8 values, graph "
        "replay, weights beyond the cache; each choice checked against float64; rows by least mean slowdown"
    )
    provenance = Provenance(
        gpu=gpu, estimated=False, date=datetime.date.today().isoformat(), versions=versions, method=method
    )
    rows = rows_of(times, [band.limit for band in bands], one_block_m)
    return TileTable(format=1, architecture=architecture, compute_units=compute_units, provenance=provenance, rows=rows)


def write_table(folder: Path, table: TileTable) -> Path:
    """Write `<architecture>.json`, a line a row, so that no reader sees half of it; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table.architecture}.json"
    content = table.model_dump(mode="json", exclude={"rows"})
    rows = ",\n    ".join(json.dumps(row.model_dump(mode="json", exclude_defaults=True)) for row in table.rows)
    head = json.dumps(content, indent=2).removesuffix("\n}")
    write_file(path, f'{head},\n  "rows": [\n    {rows}\n  ]\n}}\n')
    if load(path) != table:
        raise ValueError(f"{path}: reads back as another table than was written")
    return path
