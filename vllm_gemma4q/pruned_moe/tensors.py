"""Which tensors of a Gemma 4 MoE checkpoint hold something for each expert, and whether all of them are there.

By layer, with E experts, whatever the root of the names and the format of the weights:

    experts.{e}.*              one expert's own: weights, scales, packed or not
    experts.*                  all experts', expert first: [E, ..]
    router.proj.*              [E, ..]
    router.per_expert_scale*   [E]

A tensor of one element below `experts` or `router` is shared by all. `router.scale` belongs to the layer's input.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_gemma4q.checkpoint import TensorInfo
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.restore.names import canonical

_PLACE = re.compile(r"^layers\.(?P<layer>\d+)\.(?P<part>experts|router)\.(?:(?P<expert>\d+)\.)?(?P<rest>.+)$")
_OF_THE_INPUT = "scale"
_REQUIRED = ("router.proj.weight", "router.per_expert_scale")


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor of experts or of a router belongs.

    Attributes:
        expert: of a tensor that is one expert's own.
        name: within the layer, for a tensor of all experts; what follows the number, for one of one expert.
    """

    layer: int
    expert: int | None
    name: str


def place_of(name: str) -> Place | None:
    """None for tensors that a prune leaves as they are.

    Raises:
        InputError: experts in a place that Gemma 4 does not have.
    """
    match = _PLACE.match(canonical(name))
    if match is None:
        if ".experts." in name:
            raise InputError(f"tensor {name}: got experts outside the decoder layers, expected ..layers.N.experts")
        return None
    part, expert, rest = match["part"], match["expert"], match["rest"]
    if part == "router" and (rest == _OF_THE_INPUT or expert is not None):
        return None
    return Place(int(match["layer"]), None if expert is None else int(expert), rest if expert else f"{part}.{rest}")


def is_shared(tensor: TensorInfo) -> bool:
    """Whether a tensor of all experts is one value for all of them."""
    return math.prod(tensor.shape) == 1


@dataclass
class _Layer:
    """What was found: tensors of all experts, and the modules of each that is stored alone."""

    fused: set[str] = field(default_factory=set)
    modules: dict[int, set[str]] = field(default_factory=dict)


def check_experts(tensors: Iterable[TensorInfo], num_experts: int, n_layers: int) -> None:
    """Every layer has a router and weights for exactly `num_experts`, in whatever format.

    Raises:
        InputError: naming the tensor, what was found and what was expected.
    """
    layers = [_Layer() for _ in range(n_layers)]
    for tensor in tensors:
        place = place_of(tensor.name)
        if place is None:
            continue
        if place.layer >= n_layers:
            raise InputError(f"tensor {tensor.name}: the model has layers 0..{n_layers - 1}")
        if place.expert is None:
            _check_first_axis(tensor, num_experts)
            layers[place.layer].fused.add(place.name)
        elif place.expert >= num_experts:
            raise InputError(f"tensor {tensor.name}: the model has experts 0..{num_experts - 1}")
        else:
            layers[place.layer].modules.setdefault(place.expert, set()).add(place.name.partition(".")[0])
    for index, layer in enumerate(layers):
        _check_complete(index, layer, num_experts)


def _check_first_axis(tensor: TensorInfo, num_experts: int) -> None:
    if not is_shared(tensor) and tensor.shape[:1] != (num_experts,):
        raise InputError(
            f"tensor {tensor.name}: got shape {list(tensor.shape)}, expected [{num_experts}, ..]: one entry an expert"
        )


def _check_complete(index: int, layer: _Layer, num_experts: int) -> None:
    for name in _REQUIRED:
        if name not in layer.fused:
            raise InputError(f"tensor layers.{index}.{name}: missing, expected [{num_experts}, ..]")
    if not layer.modules:
        if not any(name.startswith("experts.") for name in layer.fused):
            raise InputError(f"tensor layers.{index}.experts.gate_up_proj: missing, expected [{num_experts}, ..]")
        return
    modules = set.union(*layer.modules.values())
    for expert in range(num_experts):
        missing = modules - layer.modules.get(expert, set())
        if missing:
            raise InputError(f"tensor layers.{index}.experts.{expert}.{min(missing)}: missing, other experts have it")
