"""weight_scale of every linear: measured, chosen, and made to suit the loader of fused linears."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_gemma4q.checkpoint.rewrite import Progress
from vllm_gemma4q.fp8_static.magnitudes import Magnitudes
from vllm_gemma4q.fp8_static.measure import measure
from vllm_gemma4q.fp8_static.scales import Rule, align, choose_scale
from vllm_gemma4q.linears import Linear


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


def weight_scales(linears: Iterable[Linear], rule: Rule, progress: Progress) -> dict[str, WeightScale]:
    """By module; reads every weight once.

    Raises:
        InputError: NaN or infinity in a weight.
    """
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.fused, []).append(linear)
    result = {}
    for group, found in zip(groups.values(), measure(groups.values(), progress), strict=True):
        for linear, chosen in zip(group, _choose(found, rule), strict=True):
            result[linear.module] = chosen
    return result


def _choose(group: Sequence[Magnitudes], rule: Rule) -> list[WeightScale]:
    scales = align([choose_scale(magnitudes, rule) for magnitudes in group])
    return [
        WeightScale(scale, found.absmax, int(found.clipped(scale)), int(found.underflowed(scale)))
        for found, scale in zip(group, scales, strict=True)
    ]
