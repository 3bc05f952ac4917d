"""Modules of a quantized checkpoint by their headers: what the readers of all schemes share.

vLLM trusts `config.json`: a list of modules that it cannot read, a missing scale or too few experts leave parameters
uninitialized without a word. Readers decide by headers instead, and refuse what these cannot mean.

Names: a "module" is relative to the language model's root (`layers.0.self_attn.q_proj`), which the checkpoint calls
`model.language_model.` or `model.` and the engine `language_model.model.` or `model.`; all experts of a layer are one
module, `layers.0.experts`. They are stored one by one (`experts.3.up_proj.weight`) or fused, 3-D, quantized with scales
beside them or not. Nothing here needs vLLM.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from typing import NamedTuple, Protocol

from vllm_gemma4q.architecture import (
    EXPERT_SHARDS,
    FUSED_SHARDS,
    Role,
    TextArchitecture,
    is_fused_experts,
    is_linear_weight,
    role_of,
)
from vllm_gemma4q.errors import InputError

FLOATS = ("BF16", "F16", "F32")
WEIGHT_SCALE = "weight_scale"
RESTORE = "`gemma4q restore QUANT BASE DST` mends it"
# How files name the weight scales of a fused expert tensor, after the tensor's own name.
FUSED_WEIGHT_SCALES = (".weight_scale", "_weight_scale", "_scale", ".scale")

_ROOT = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|model\.)")
_EXPERTS = re.compile(r"^layers\.\d+\.experts(?=\.)")
_EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")


class Header(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Kind(NamedTuple):
    """How a weight is stored: quantized or not, and then with one scale a row or one for all."""

    quantized: bool
    by_row: bool = False


def relative_name(name: str) -> str:
    """A tensor's or module's name without the language model's root; names outside it are returned unchanged."""
    return name if role_of(name) in (Role.VISION, Role.EMBED_VISION, Role.AUDIO) else _ROOT.sub("", name, count=1)


def fused_expert_part(name: str) -> str | None:
    """The fused expert tensor, `gate_up_proj` or `down_proj`, that a tensor is or belongs to as a scale; else None."""
    match = re.search(r"\.experts\.(gate_up_proj|down_proj)(?:[._]|$)", name)
    return match[1] if match else None


def is_one_expert(name: str) -> bool:
    """Whether a tensor belongs to one expert that is stored alone."""
    return _EXPERT_INDEX.search(name) is not None


def is_among(modules: Container[str], name: str) -> bool:
    """Whether a linear or a layer's experts are among the modules, by the engine's name, fused or not.

    Shards agree, so any that exists speaks for all: layers where V equals K have no v_proj.
    """
    module = relative_name(name)
    last = module.rpartition(".")[2]
    parent = module.removesuffix(last)
    return any(parent + shard in modules for shard in FUSED_SHARDS.get(last, (last,)))


class ModuleReader(ABC):
    """One pass over a checkpoint's headers.

    Args:
        architecture: the expected tensors, in the layout of unquantized checkpoints.
        tensors: dtype and shape by full tensor name, of all shards.
        codes: the dtype of quantized weights.

    Attributes:
        quantized: modules that are, with the rows of a linear's weight or the number of a layer's experts.
        by_row: those of them that are experts with one weight scale a row.
        unquantized: the other linear modules and `layers.N.experts`.
    """

    def __init__(self, architecture: TextArchitecture, tensors: Mapping[str, Header], codes: str) -> None:
        self.architecture = architecture
        self.tensors = tensors
        self.codes = codes
        self.names = {relative_name(name): name for name in tensors}
        self.expert_names: dict[str, list[str]] = {}
        for name in self.names:
            if match := _EXPERTS.match(name):
                self.expert_names.setdefault(match[0], []).append(name)
        self.quantized: dict[str, int] = {}
        self.by_row: set[str] = set()
        self.unquantized: set[str] = set()

    @abstractmethod
    def linear(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Check a weight and its scales, by relative name."""

    @abstractmethod
    def fused_scales(self, base: str, shape: tuple[int, ...]) -> bool:
        """Check the scales of a quantized fused expert tensor; whether each row has its own."""

    @abstractmethod
    def other(self, full: str, shape: tuple[int, ...]) -> None:
        """Check a tensor that is no linear's weight, by full name."""

    def is_expert_weight(self, name: str) -> bool:
        """Whether a tensor below a layer's experts says how they are stored."""
        return True

    def read_modules(self) -> None:
        """Decide every module. Raises InputError (see the schemes' `read_facts`)."""
        for full, shape in self.architecture.shapes():
            name = relative_name(full)
            if is_fused_experts(full):
                if name.endswith("gate_up_proj"):
                    self._experts(name.removesuffix(".gate_up_proj"), *shape)
            elif is_linear_weight(full, shape):
                self._keep(name.removesuffix(".weight"), self.linear(name, shape), shape[0])
            else:
                self.other(full, shape)
        self._check_fused_shards()

    def _keep(self, module: str, kind: Kind, size: int) -> None:
        if kind.quantized:
            self.quantized[module] = size
        else:
            self.unquantized.add(module)

    def full(self, name: str) -> str:
        """A tensor's full name, whether it is there or not."""
        known = self.names.get(name)
        return known if known is not None else (name if name.startswith("lm_head") else self.architecture.root + name)

    def expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Header:
        """The header of a tensor that must be there, with one of these dtypes and shapes."""
        wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
        if name not in self.names:
            raise InputError(f"tensor {self.full(name)}: got nothing (missing), expected {wanted}")
        header = self.tensors[self.names[name]]
        if header.dtype not in dtypes or tuple(header.shape) not in shapes:
            raise InputError(f"tensor {self.full(name)}: got {header.dtype} {list(header.shape)}, expected {wanted}")
        return header

    def is_quantized(self, name: str, *shapes: tuple[int, ...]) -> bool:
        """Whether a weight that must be there, with one of these shapes, is."""
        return self.expect(name, (self.codes, *FLOATS), *shapes).dtype == self.codes

    def first(self, base: str, suffixes: tuple[str, ...]) -> str:
        """The name with the first of the suffixes that is there, or the name to miss."""
        found = [base + suffix for suffix in suffixes if base + suffix in self.names]
        return found[0] if found else base + suffixes[0]

    def _experts(self, module: str, experts: int, gate_up: int, hidden: int) -> None:
        names = [name for name in self.expert_names.get(module, []) if self.is_expert_weight(name)]
        indexed = [name for name in names if is_one_expert(name)]
        fused = [name for name in names if fused_expert_part(name)]
        if indexed and fused:
            raise InputError(f"tensor {self.full(fused[0])}: got fused experts, expected none beside {indexed[0]}")
        sizes = (experts, gate_up, hidden)
        kinds = self._indexed_experts(module, indexed, sizes) if indexed else self._fused_experts(module, sizes)
        self._refuse_mix({kind.quantized: name for kind, name in kinds.items()}, "experts of a layer")
        if len(kinds) > 1:
            raise InputError(
                f"tensor {self.full(kinds[Kind(True, True)])}: got a scale a row, expected one for all rows, "
                f"like {self.full(kinds[Kind(True, False)])}: experts of a layer share one scheme"
            )
        [kind] = kinds
        self._keep(module, kind, experts)
        if kind.by_row:
            self.by_row.add(module)

    def _indexed_experts(self, module: str, indexed: list[str], sizes: tuple[int, int, int]) -> dict[Kind, str]:
        experts, gate_up, hidden = sizes
        for name in indexed:
            match = _EXPERT_INDEX.search(name)
            if match and int(match[1]) >= experts:
                raise InputError(f"tensor {self.full(name)}: got expert {match[1]}, expected 0..{experts - 1}")
        kinds: dict[Kind, str] = {}
        for expert in range(experts):
            for shard in EXPERT_SHARDS:
                name = f"{module}.{expert}.{shard}.weight"
                shape = (hidden, gate_up // 2) if shard == "down_proj" else (gate_up // 2, hidden)
                kinds.setdefault(self.linear(name, shape), name)
        return kinds

    def _fused_experts(self, module: str, sizes: tuple[int, int, int]) -> dict[Kind, str]:
        experts, gate_up, hidden = sizes
        kinds: dict[Kind, str] = {}
        shapes = {"gate_up_proj": (experts, gate_up, hidden), "down_proj": (experts, hidden, gate_up // 2)}
        for part, shape in shapes.items():
            base = f"{module}.{part}"
            name = f"{base}.weight" if f"{base}.weight" in self.names else base
            quantized = self.is_quantized(name, shape)
            kinds.setdefault(Kind(quantized, quantized and self.fused_scales(base, shape)), name)
        return kinds

    def _check_fused_shards(self) -> None:
        decided = {*self.quantized, *self.unquantized}
        for module in sorted(decided):
            parent, _, last = module.rpartition(".")
            for fused, shards in FUSED_SHARDS.items():
                if last == shards[0]:
                    siblings = [f"{parent}.{shard}" for shard in reversed(shards)]
                    kinds = {name in self.quantized: f"{name}.weight" for name in siblings if name in decided}
                    self._refuse_mix(kinds, f"shards of {fused}")

    def _refuse_mix(self, kinds: Mapping[bool, str], what: str) -> None:
        if len(kinds) == 2:
            rounded, kept = self.full(kinds[True]), self.full(kinds[False])
            dtype = self.tensors[kept].dtype
            raise InputError(
                f"tensor {kept}: got {dtype}, expected {self.codes} like {rounded}: {what} share one scheme"
            )
