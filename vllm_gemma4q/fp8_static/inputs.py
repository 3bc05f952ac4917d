"""input_scale of every linear, from a statistics file.

q, k and v of a layer read the same input, and so do gate and up: their distributions, hence their scales, are equal.
All experts of a layer share one scale for gate and up, and one for down: the largest of what each expert would get
alone. That is what vLLM's kernels take, whatever the file says, and it is the fallback for experts that calibration
never reached. In a floating-point format it costs the others next to nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_gemma4q.calibration.statistics import Inputs, Statistics
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.magnitudes import Magnitudes, from_histogram
from vllm_gemma4q.fp8_static.scales import NEUTRAL_SCALE, Rule, choose_scale
from vllm_gemma4q.linears import Linear


@dataclass(frozen=True)
class InputScale:
    """One linear's.

    Attributes:
        scale: float32 value.
        saturated: share of the calibrated values above 448 * scale, 0 to 1.
        fallback: why the scale is not the linear's own, empty where it is.
    """

    scale: float
    saturated: float
    fallback: str = ""


UNREACHED = "no calibration token reached this expert: the largest scale of the layer's experts"
ONLY_ZEROS = "calibration saw nothing but zeros: 1"


def input_scales(linears: Iterable[Linear], statistics: Statistics, rule: Rule) -> dict[str, InputScale]:
    """By module.

    Raises:
        InputError: the statistics are of another model, or no token reached a linear (of an MoE layer: any expert).
    """
    known: dict[str, list[InputScale]] = {}
    result = {}
    for linear in linears:
        name, index = linear.inputs_among(statistics.modules)
        if name not in known:
            known[name] = _choose(name, statistics.inputs(name), linear.shape[1], rule)
        if index >= len(known[name]):
            raise InputError(f"statistics of {name}: got {len(known[name])} experts, expected more than {index}")
        result[linear.module] = known[name][index]
    return result


def fallbacks(scales: Mapping[str, InputScale]) -> dict[str, list[str]]:
    """Modules whose scale is not their own, by reason."""
    reasons: dict[str, list[str]] = {}
    for module, chosen in scales.items():
        if chosen.fallback:
            reasons.setdefault(chosen.fallback, []).append(module)
    return reasons


def _choose(name: str, inputs: Inputs, columns: int, rule: Rule) -> list[InputScale]:
    if inputs.absmax.shape[1] != columns:
        raise InputError(f"statistics of {name}: got {inputs.absmax.shape[1]} channels, expected {columns}")
    if not inputs.count.any():
        raise InputError(f"statistics of {name}: no token reached it; calibrate with more text")
    rows = [
        from_histogram(histogram, float(absmax))
        for histogram, absmax in zip(inputs.histogram, inputs.absmax.max(axis=1), strict=True)
    ]
    largest = max(choose_scale(row, rule) for row in rows)
    reasons = ["" if count else UNREACHED for count in inputs.count]
    if not largest:
        return [InputScale(NEUTRAL_SCALE, 0.0, reason or ONLY_ZEROS) for reason in reasons]
    return [InputScale(largest, _share(row, largest), reason) for row, reason in zip(rows, reasons, strict=True)]


def _share(magnitudes: Magnitudes, scale: float) -> float:
    total = magnitudes.counts.sum()
    return magnitudes.clipped(scale) / float(total) if total else 0.0
