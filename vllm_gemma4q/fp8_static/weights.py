"""weight_scale of every linear: measured, chosen, and made to suit the loader of fused linears."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gguf_mixed.tasks import Attempt, Executor
from vllm_gemma4q.checkpoint.rewrite import Progress
from vllm_gemma4q.fp8_static.magnitudes import Magnitudes
from vllm_gemma4q.fp8_static.measure import measure, n_bytes
from vllm_gemma4q.fp8_static.scales import Rule, align, choose_scale
from vllm_gemma4q.linears import Linear

_PART_BYTES = 1 << 28


@dataclass(frozen=True)
class WeightScale:
    """One linear's.

    Attributes:
        scale: float32 value.
        absmax: largest magnitude of the weight.
        clipped: weights above 448 * scale, which become the largest code.
        underflowed: weights that are not zero and become zero.
    """

    scale: float
    absmax: float
    clipped: int
    underflowed: int


def weight_scales(
    linears: Iterable[Linear], rule: Rule, progress: Progress, workers: Executor | None = None
) -> dict[str, WeightScale]:
    """By module; reads every weight once.

    Args:
        workers: read the weights, a part each; None: this process does.

    Raises:
        InputError: NaN or infinity in a weight.
    """
    fused: dict[str, list[Linear]] = {}
    for linear in linears:
        fused.setdefault(linear.fused, []).append(linear)
    groups = list(fused.values())
    if workers is None:
        found = [_choose(each, rule) for each in measure(groups, progress)]
    else:
        found = _by_tasks(workers, groups, rule, progress)
    return {
        linear.module: chosen
        for group, scales in zip(groups, found, strict=True)
        for linear, chosen in zip(group, scales, strict=True)
    }


@dataclass(frozen=True)
class _Part:
    """Groups of linears that one task reads."""

    groups: Sequence[Sequence[Linear]]
    rule: Rule

    def __str__(self) -> str:
        return f"weight scales from {self.groups[0][0].module} on"


def _by_tasks(
    workers: Executor, groups: Iterable[Sequence[Linear]], rule: Rule, progress: Progress
) -> list[list[WeightScale]]:
    parts = [_Part(part, rule) for part in _parts(groups)]
    with contextlib.closing(workers.run(_carry_out, parts, progress)) as results:
        found = dict(results)
    return [scales for place in range(len(parts)) for scales in found[place]]


def _carry_out(part: _Part, attempt: Attempt) -> list[list[WeightScale]]:
    # As in a conversion, one thread counts while another reads: more would wait for each other.
    torch.set_num_threads(1)
    return [_choose(each, part.rule) for each in measure(part.groups, attempt.progress)]


def _parts(groups: Iterable[Sequence[Linear]]) -> Iterator[list[Sequence[Linear]]]:
    """Consecutive groups of at least `_PART_BYTES` together."""
    part: list[Sequence[Linear]] = []
    size = 0
    for group in groups:
        part.append(group)
        size += sum(map(n_bytes, group))
        if size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _choose(group: Sequence[Magnitudes], rule: Rule) -> list[WeightScale]:
    scales = align([choose_scale(magnitudes, rule) for magnitudes in group])
    return [
        WeightScale(scale, found.absmax, int(found.clipped(scale)), int(found.underflowed(scale)))
        for found, scale in zip(group, scales, strict=True)
    ]
