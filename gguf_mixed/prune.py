"""A Gemma 4 mixture with fewer experts: which tensors of a GGUF are sliced, and what the file turns out to be.

The expert is the slowest axis of everything that it has, so those that stay are ranges of bytes, of any type:

    ffn_gate_up_exps.weight, ffn_down_exps.weight     [row, rows, experts]; the former may be two, gate and up
    ffn_down_exps.scale                               [experts]: per_expert_scale of the router
    ffn_gate_inp.weight                               [row, experts]: the router
    ffn_gate_inp.scale                                [row]: router.scale, kept whole

Nothing is quantized again. Of the keys, `expert_count` changes, and `expert_used_count` where another is asked for; the
rest and their order are as they were, `general.size_label` too. A split model becomes one file, and of a model that is
only a header comes a header, as plans need no more. Not done: maps that leave layers with different numbers of experts
(llama.cpp has one `expert_count`), models with layers without experts.
Source: src/models/gemma4.cpp and src/llama-model.cpp of llama.cpp (b11434) for names and shapes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gemma4q_kernels.ggml import GGMLQuantizationType, block_size
from gguf.constants import GGUFValueType

from gguf_mixed.drop_map import RetainedExperts, read_drop_map
from gguf_mixed.errors import InputError
from gguf_mixed.ggml_header import assemble, copied_keys, key_bytes
from gguf_mixed.header import pad, without_trailing_ones
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.tensors import Inventory, Tensor, read_inventory

ARCHITECTURE = "gemma4"
COUNT, TOP_K, LAYERS = (f"{ARCHITECTURE}.{key}" for key in ("expert_count", "expert_used_count", "block_count"))

_SPLIT_KEYS = frozenset({"split.no", "split.count", "split.tensors.count"})
_ROUTER = "ffn_gate_inp.weight"
_WHOLE = frozenset({"ffn_gate_inp.scale"})
_DOWN = "ffn_down_exps.weight"
_OF_EXPERTS = re.compile(r"ffn_(gate|up|gate_up|down)_exps\.(weight|scale|input_scale)")
_LIKE_EXPERTS = re.compile(r"_exps\b|ffn_gate_inp\b")


@dataclass(frozen=True)
class Mixture:
    """A model with experts in every layer.

    Attributes:
        num_experts: of each layer.
        n_layers: layers of the model.
        top_k: experts that each token uses.
    """

    inventory: Inventory
    num_experts: int
    n_layers: int
    top_k: int

    @classmethod
    def read(cls, path: Path) -> "Mixture":
        """Read a model's headers.

        Raises:
            InputError: see `read_inventory`; another architecture, no experts, a layer without them, or tensors of
                experts that are not known or have another number of them.
        """
        inventory = read_inventory(path)
        if inventory.architecture != ARCHITECTURE:
            raise InputError(f"{path.name}: architecture {inventory.architecture}, expected {ARCHITECTURE}")
        if COUNT not in inventory.metadata or inventory.metadata[COUNT].value == 0:
            raise InputError(f"{path.name}: a dense model: it has no {COUNT}, so there is nothing to prune")
        mixture = cls(inventory, *(_count(inventory, key) for key in (COUNT, LAYERS, TOP_K)))
        for layer in range(mixture.n_layers):
            for role in (_ROUTER, _DOWN):
                if f"blk.{layer}.{role}" not in inventory.tensors:
                    raise InputError(f"tensor blk.{layer}.{role}: missing, expected experts in every layer")
        for tensor in inventory.tensors.values():
            _check_tensor(tensor, mixture)
        return mixture

    def retained(self, drop_map: Path, top_k: int | None = None) -> RetainedExperts:
        """Read a drop map for this model.

        Args:
            top_k: experts that each token will use, None: as many as before.

        Raises:
            InputError: see `read_drop_map`.
        """
        return read_drop_map(drop_map, self.num_experts, self.n_layers, self.top_k if top_k is None else top_k)


@dataclass(frozen=True)
class Prune:
    """A mixture and what a drop map leaves of it, and the file that comes of them.

    Attributes:
        top_k: experts that each token uses from now on, None: as many as before.

    Raises:
        InputError: layers would keep different numbers of experts, or fewer than `top_k`.
    """

    mixture: Mixture
    retained: RetainedExperts
    top_k: int | None = None

    def __post_init__(self) -> None:
        counts = self.retained.counts
        if not self.retained.is_uniform:
            raise InputError(
                f"the drop map keeps {min(counts)} to {max(counts)} experts a layer, expected one number for all: "
                "llama.cpp has a single expert_count, and a router would choose experts of zeros put in their place"
            )
        if not 1 <= self.top_k_after <= self.num_experts:
            raise InputError(f"top_k {self.top_k_after}: expected 1 to {self.num_experts}, the experts that stay")

    @property
    def inventory(self) -> Inventory:
        """The model before."""
        return self.mixture.inventory

    @property
    def num_experts(self) -> int:
        """Experts that stay in each layer."""
        return self.retained.counts[0]

    @property
    def top_k_after(self) -> int:
        """Experts that each token uses from now on."""
        return self.mixture.top_k if self.top_k is None else self.top_k

    def kept(self, tensor: Tensor) -> Sequence[int] | None:
        """Ids of the experts that stay in a tensor of the model, ascending; None where it is not sliced."""
        return self.retained.kept[tensor.layer] if tensor.layer is not None and is_sliced(tensor) else None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors by name, in its order, with the shapes that they will have."""
        return {name: self._pruned(tensor) for name, tensor in self.inventory.tensors.items()}

    @property
    def written(self) -> dict[str, GGMLQuantizationType]:
        """Type of every tensor, which pruning does not change."""
        return {name: tensor.qtype for name, tensor in self.tensors.items()}

    @property
    def file_type(self) -> int | None:
        """The label `general.file_type`, which pruning does not change."""
        label = self.inventory.headers[0].get("general.file_type")
        return label if isinstance(label, int) else None

    @cached_property
    def header(self) -> bytes:
        """Everything before the data, padding included.

        Raises:
            InputError: the model cannot be read any more.
        """
        first = self.inventory.headers[0]
        try:
            keys = copied_keys(first, exactly=True)
        except OSError as error:
            raise InputError(f"{first.path.name}: cannot be read: {error.strerror or error}") from error
        changed = {COUNT: self.num_experts, TOP_K: self.top_k_after}
        keys |= {key: key_bytes(key, value) for key, value in changed.items()}
        if len(self.inventory.headers) > 1:
            keys = {key: raw for key, raw in keys.items() if key not in _SPLIT_KEYS}
        listed = [(name, tensor.shape, tensor.qtype) for name, tensor in self.tensors.items()]
        return assemble(list(keys.values()), listed, first.alignment)

    @property
    def data_bytes(self) -> int:
        """Size of the data with its padding, as it is or would be where the model is only a header."""
        alignment = self.inventory.headers[0].alignment
        return sum(pad(tensor.n_bytes, alignment) for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """The output's size: that of its header where the model is only a header."""
        return len(self.header) + (0 if self.inventory.header_only else self.data_bytes)

    def imatrix(self, imatrix: Imatrix) -> Imatrix:
        """The imatrix of the pruned model: the entries of experts sliced, others as they are.

        The input of a router does not change, so its entry does not either.

        Raises:
            InputError: an entry is of another model or has another number of experts, see `Imatrix.matches`.
        """
        imatrix.matches(self.inventory)
        return imatrix.slice_experts(self._kept_in_imatrix, self.mixture.num_experts)

    def _kept_in_imatrix(self, name: str) -> Sequence[int] | None:
        tensor = self.inventory.tensors[name]
        return None if tensor.role == _ROUTER else self.kept(tensor)

    def _pruned(self, tensor: Tensor) -> Tensor:
        if not is_sliced(tensor):
            return tensor
        return replace(tensor, shape=without_trailing_ones((*tensor.shape[:-1], self.num_experts)))


def is_sliced(tensor: Tensor) -> bool:
    """Whether a tensor holds something of each expert."""
    return tensor.role == _ROUTER or _OF_EXPERTS.fullmatch(tensor.role) is not None


def _check_tensor(tensor: Tensor, mixture: Mixture) -> None:
    if not is_sliced(tensor):
        if _LIKE_EXPERTS.search(tensor.role) and tensor.role not in _WHOLE:
            raise InputError(f"tensor {tensor.name}: not known from {ARCHITECTURE}, so how to slice it is not either")
        return
    if tensor.layer is None or tensor.layer >= mixture.n_layers:
        raise InputError(f"tensor {tensor.name}: the model has layers 0..{mixture.n_layers - 1}")
    if tensor.shape[-1] != mixture.num_experts:
        raise InputError(f"tensor {tensor.name}: shape {list(tensor.shape)}, expected {mixture.num_experts} at its end")
    if len(tensor.shape) == 1 and block_size(tensor.qtype) > 1:
        raise InputError(f"tensor {tensor.name}: {tensor.qtype.name} blocks hold several experts: it cannot be sliced")


def _count(inventory: Inventory, key: str) -> int:
    entry = inventory.metadata.get(key)
    if entry is None or entry.kind is not GGUFValueType.UINT32 or not isinstance(entry.value, int) or entry.value < 1:
        found = "nothing" if entry is None else f"{entry.value!r} ({entry.kind.name})"
        raise InputError(f"{inventory.path.name}: {key}: got {found}, expected a positive number (UINT32)")
    return entry.value
