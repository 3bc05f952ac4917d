"""The linears of a checkpoint's language model, one by one: where their rows lie, what they read, what they share.

A fused expert tensor holds many: `experts.gate_up_proj` [E, 2I, H] holds each expert's gate rows, then its up rows;
`experts.down_proj` [E, H, I] one linear an expert. Each goes by the name it has once it is stored alone,
`..experts.3.gate_proj`.
"""

import re
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass

from vllm_gemma4q.architecture import (
    EXPERT_SHARDS,
    FUSED_SHARDS,
    LINEAR_ROLES,
    Role,
    TextArchitecture,
    is_fused_experts,
    is_linear_weight,
    role_of,
)
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo

_NEVER_LINEAR = frozenset({Role.EMBEDDING, Role.NORM, Role.OTHER})
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<linear>[a-z]+_proj)$")


@dataclass(frozen=True)
class Linear:
    """One matrix: rows `first` to `last` (excluded) of a tensor.

    Attributes:
        module: full name without `.weight`.
    """

    module: str
    tensor: TensorInfo
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.last - self.first, self.tensor.row_length

    @property
    def fused(self) -> str:
        """What engines fuse it into, by full name; its own name where it stands alone."""
        return _fused(self.module)

    @property
    def inputs(self) -> tuple[str, int]:
        """The linear's name in a statistics file, and its index among the matrices there."""
        match = _EXPERT.match(self.module)
        if match is None:
            return self.module, 0
        fused = "down_proj" if match["linear"] == "down_proj" else "gate_up_proj"
        return f"{match['experts']}.{fused}", int(match["index"])

    def inputs_among(self, modules: Container[str]) -> tuple[str, int]:
        """`inputs`, of a linear that reads the same where the calibrated model has not this one."""
        name, index = self.inputs
        parent, _, last = self.module.rpartition(".")
        shards = next((shards for shards in FUSED_SHARDS.values() if last in shards), ())
        found = [name, *(f"{parent}.{shard}" for shard in shards if name == self.module)]
        return next((candidate for candidate in found if candidate in modules), name), index


def linears_of(tensor: TensorInfo) -> Iterator[Linear]:
    """The linears of the language model that a tensor holds, in the order of its rows; none for other tensors."""
    if not is_linear_weight(tensor.name, tensor.shape):
        return
    if not is_fused_experts(tensor.name):
        yield Linear(tensor.name.removesuffix(".weight"), tensor, 0, tensor.rows)
        return
    prefix, _, fused = tensor.name.rpartition(".")
    gate, up, down = EXPERT_SHARDS
    parts = (gate, up) if fused == "gate_up_proj" else (down,)
    height = tensor.shape[1] // len(parts)
    for position in range(tensor.shape[0] * len(parts)):
        expert, part = divmod(position, len(parts))
        yield Linear(f"{prefix}.{expert}.{parts[part]}", tensor, position * height, (position + 1) * height)


def linears_of_model(
    tensors: Mapping[str, TensorInfo], architecture: TextArchitecture, roles: Container[Role] = LINEAR_ROLES
) -> dict[str, list[Linear]]:
    """The linears that the configuration asks for, by their tensor's name, in the order of the checkpoint.

    With them k_proj and v_proj that it does not ask for, of layers that share keys and values or whose V equals K:
    engines fuse them with q_proj, and what is fused has one scheme. What else looks like a linear, such as a layer
    past the last or an adapter that was left in the file, is none of the model's.
    """
    wanted = {_fused(name.removesuffix(".weight")) for name, _ in architecture.shapes()}
    experts = {name.rpartition(".")[0] for name in wanted if is_fused_experts(name)}
    found = {}
    for tensor in tensors.values():
        linears = list(linears_of(tensor)) if role_of(tensor.name) in roles else []
        own = [linear for linear in linears if linear.fused in wanted or _experts_of(linear) in experts]
        if own:
            found[tensor.name] = own
    return found


def _fused(module: str) -> str:
    parent, _, last = module.rpartition(".")
    return next((f"{parent}.{name}" for name, shards in FUSED_SHARDS.items() if last in shards), module)


def _experts_of(linear: Linear) -> str:
    match = _EXPERT.match(linear.module)
    return match["experts"] if match else ""


def unquantized_linears(source: Checkpoint, quantized: Collection[str]) -> list[str]:
    """Full names of the linears that stay as they are, sorted; `lm_head` also when it is tied."""
    inside = {linear.module for tensor in source.tensors.values() for linear in linears_of(tensor)}
    outside = {
        name.removesuffix(".weight")
        for name, tensor in source.tensors.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and not is_linear_weight(name, tensor.shape)
        and role_of(name) not in _NEVER_LINEAR
    }
    return sorted((inside | outside | {"lm_head"}).difference(quantized))
