"""Bits of every linear for a target that may be fractional: whole numbers, given out by ExLlamaV3's rule.

All linears start at the target rounded down. Linears that share a Hessian, or that an engine fuses, form a group and
rise together, a bit at a time, as long as the whole stays within the target:

    attention     q, k and v of a layer; its o         first
    dense MLP     gate and up of a layer; its down     then
    experts       all linears of a layer's experts     last

Among groups of the same kind, layers nearest to either end of the model come first, since their errors cost most; a
group too large for what is left is passed over for a smaller one. Weights count with the zeros that pad them to 128.

Source: exllamav3 `conversion/allocation.py` since 1.1 (2026-07). Before, layers rose in order; the counts are the same:
at 3.5 bits the 31B has 4 bits in all attention, 18 of 60 gate and up and 17 of 60 down. Not done: `--hq`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma4q_kernels.exl3_layout import BLOCK

from vllm_gemma4q.architecture import Role, layer_index, role_of
from vllm_gemma4q.linears import Linear

MIN_BITS, MAX_BITS = 1, 8
_RANKS: Mapping[Role, int] = {Role.ATTENTION: 0, Role.MLP: 1, Role.EXPERTS: 2}


@dataclass
class _Group:
    """Linears that have the same bits; `place` orders groups, the first to rise first."""

    place: tuple[int, ...]
    modules: list[str]
    weights: int = 0


def padded(features: int) -> int:
    """Features in whole blocks of the Hadamard transform."""
    return -(-features // BLOCK) * BLOCK


def padded_weights(linear: Linear) -> int:
    """Weights that are stored for a linear."""
    return math.prod(map(padded, linear.shape))


def allocate(linears: Iterable[Linear], bpw: float) -> dict[str, int]:
    """Bits a weight by module, in the order given.

    Args:
        linears: attention, dense MLP and experts of decoder layers.
        bpw: 1 to 8, of the trellis alone, averaged over all weights; never exceeded.
    """
    linears = list(linears)
    total = sum(map(padded_weights, linears))
    left = int(bpw * float(total)) - math.floor(bpw) * total
    bits = dict.fromkeys((linear.module for linear in linears), math.floor(bpw))
    groups = sorted(_groups(linears), key=lambda group: group.place)
    rising = True
    while rising:
        rising = False
        for group in groups:
            if group.weights <= left and bits[group.modules[0]] < MAX_BITS:
                left -= group.weights
                rising = True
                for module in group.modules:
                    bits[module] += 1
    return bits


def mean_bits(linears: Iterable[Linear], bits: Mapping[str, int]) -> float:
    """What an allocation comes to."""
    weights = {linear.module: padded_weights(linear) for linear in linears}
    return sum(bits[module] * count for module, count in weights.items()) / sum(weights.values())


def _groups(linears: Sequence[Linear]) -> Iterable[_Group]:
    last = max((layer_index(linear.module) for linear in linears), default=0)
    groups: dict[str, _Group] = {}
    for linear in linears:
        role, layer = role_of(linear.module), layer_index(linear.module)
        name = linear.module.partition(".experts.")[0] + ".experts" if role is Role.EXPERTS else linear.fused
        is_second = name.endswith(("o_proj", "down_proj"))
        place = (_RANKS[role], min(layer, last - layer), layer, is_second)
        group = groups.setdefault(name, _Group(place, []))
        group.modules.append(linear.module)
        group.weights += padded_weights(linear)
    return groups.values()
