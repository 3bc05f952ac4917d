"""The parts of a model: each weight with everything that is stored for it, and where it stands in the grid.

A part is one linear, one norm, or all experts of a layer where they are stored in one tensor. Scales, signs and markers
belong to the weight that they are of: its bytes and bits count them. A column of the grid is a kind of module, the same
in every layer; what is outside of the layers stands by its role.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_gemma4q.architecture import Role


class Column(StrEnum):
    """Kinds of modules in a decoder layer, in the order of the grid."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    EXPERTS_IN = "experts gate·up"
    EXPERTS_OUT = "experts down"
    ROUTER = "router"
    INPUT_GATE = "input gate"
    INPUT_PROJECTION = "input projection"
    NORMS = "norms"
    OTHER = "other"


LINEAR_COLUMNS: Mapping[str, Column] = {
    "q_proj": Column.Q, "k_proj": Column.K, "v_proj": Column.V, "o_proj": Column.O,
    "gate_proj": Column.GATE, "up_proj": Column.UP, "down_proj": Column.DOWN,
    "per_layer_input_gate": Column.INPUT_GATE, "per_layer_projection": Column.INPUT_PROJECTION,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One weight.

    Attributes:
        name: full name of the module, or of the tensor in a GGUF.
        layer: index of its decoder layer; None outside of them.
        column: kind of module; None outside of the layers.
        dtype: as the header names it, or `EXL3 4 bit`.
        shape: as stored; a trellis by its linear's.
        parameters: weights of the model, without scales and padding.
        n_bytes: everything that is stored for it.
        scales: what is stored beside the weight, such as `weight_scale F32 [64]`.
    """

    name: str
    role: Role
    layer: int | None
    column: Column | None
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    n_bytes: int
    is_quantized: bool
    scales: tuple[str, ...] = ()

    @property
    def bits(self) -> float | None:
        """Bits stored a weight; None where nothing but scales is stored."""
        return 8 * self.n_bytes / self.parameters if self.parameters else None
