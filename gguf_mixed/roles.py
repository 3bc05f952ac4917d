"""An inventory summed up by role: what each kind of tensor weighs and what it may become."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, bits_per_weight

from gguf_mixed.errors import InputError
from gguf_mixed.tensors import Inventory, Tensor


@dataclass(frozen=True)
class Fallback:
    """What llama-quantize does with a type that the rows do not fit.

    Attributes:
        requested: the type asked for.
        written: the type in the file, None where llama-quantize stops.
        n_bytes: size of all tensors of the group at `written`, None where it stops.
    """

    requested: GGMLQuantizationType
    written: GGMLQuantizationType | None
    n_bytes: int | None

    @property
    def bpw(self) -> float | None:
        return None if self.written is None else bits_per_weight(self.written)


@dataclass(frozen=True)
class RoleGroup:
    """Tensors of one role and one row length: the same types are legal for all of them."""

    role: str
    tensors: tuple[Tensor, ...]

    @property
    def row_length(self) -> int:
        return self.tensors[0].row_length

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(dict.fromkeys(tensor.shape for tensor in self.tensors))

    @property
    def types(self) -> dict[GGMLQuantizationType, int]:
        """How many tensors have each type."""
        return dict(Counter(tensor.qtype for tensor in self.tensors))

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_elements(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        return 8 * self.n_bytes / self.n_elements

    @property
    def kept_because(self) -> str | None:
        return self.tensors[0].kept_because

    @property
    def legal_types(self) -> Sequence[GGMLQuantizationType]:
        return self.tensors[0].legal_types

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """One for every type that is not legal here; none for a group that is never quantized."""
        if self.kept_because:
            return ()
        return tuple(self._fallback(qtype) for qtype in QUANTIZABLE_TYPES if qtype not in self.legal_types)

    def _fallback(self, requested: GGMLQuantizationType) -> Fallback:
        try:
            written = self.tensors[0].written_type(requested)
        except InputError:
            return Fallback(requested, None, None)
        return Fallback(requested, written, sum(tensor.bytes_as(requested) for tensor in self.tensors))


def group_by_role(inventory: Inventory) -> tuple[RoleGroup, ...]:
    """All tensors by role, largest group first."""
    groups: dict[tuple[str, int, str | None], list[Tensor]] = {}
    for tensor in inventory.tensors.values():
        groups.setdefault((tensor.role, tensor.row_length, tensor.kept_because), []).append(tensor)
    found = (RoleGroup(role, tuple(tensors)) for (role, _, _), tensors in groups.items())
    return tuple(sorted(found, key=lambda group: (-group.n_bytes, group.role)))


def ranges(ids: Iterable[int]) -> str:
    """Ascending ids as text, runs joined: 0-2, 7."""
    runs: list[list[int]] = []
    for index in ids:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
