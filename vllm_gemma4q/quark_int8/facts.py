"""What a W8A8 INT8 checkpoint really holds, module by module, from its headers; refuse what would serve garbage.

vLLM trusts `config.json`: an exclude rule that it cannot read, a missing scale or too few experts leave
parameters uninitialized without a word. Here the headers decide, and what they cannot mean is an error.

Names: a "module" is relative to the language model's root (`layers.0.self_attn.q_proj`), which the checkpoint
calls `model.language_model.` or `model.` and the engine `language_model.model.` or `model.`; all experts of a
layer are one module, `layers.0.experts`. Three layouts of experts are known: one tensor an expert
(`experts.3.up_proj.weight`), fused 3-D int8 with scales, and fused 3-D unquantized. Nothing here needs vLLM.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

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
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.quark_int8.scheme import is_excluded

INT8 = "I8"
FLOATS = ("BF16", "F16", "F32")
SCALE = "weight_scale"
ZERO_POINT = "weight_zero_point"
# How files name the scales of a fused expert tensor, after the tensor's own name.
FUSED_SCALE_SUFFIXES = (".weight_scale", "_weight_scale", "_scale", ".scale")

_ROOT = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|model\.)")
_EXPERTS = re.compile(r"^layers\.\d+\.experts(?=\.)")
_EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")
_UNTOUCHED = frozenset({Role.VISION, Role.EMBED_VISION, Role.AUDIO, Role.ROUTER, Role.EMBEDDING, Role.LM_HEAD})


class Header(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Facts:
    """Which modules are int8 and which are not. Plain data: pickled to every worker.

    Attributes:
        int8: linear modules and `layers.N.experts` stored as int8 with scales.
        unquantized: the other linear modules and `layers.N.experts`.
        int8_norms: norms that the quantizer rounded too; their weights are dequantized while loading.
    """

    int8: frozenset[str]
    unquantized: frozenset[str]
    int8_norms: frozenset[str]

    def is_int8(self, name: str) -> bool:
        """Whether a linear or a layer's experts are int8, by the engine's name, fused or not.

        Shards agree, so any that exists speaks for all: layers where V equals K have no v_proj.
        """
        module = relative_name(name)
        last = module.rpartition(".")[2]
        parent = module.removesuffix(last)
        return any(parent + shard in self.int8 for shard in FUSED_SHARDS.get(last, (last,)))


def relative_name(name: str) -> str:
    """A tensor's or module's name without the language model's root; names outside it are returned unchanged."""
    return name if role_of(name) in (Role.VISION, Role.EMBED_VISION, Role.AUDIO) else _ROOT.sub("", name, count=1)


def read_facts(architecture: TextArchitecture, tensors: Mapping[str, Header]) -> Facts:
    """Decide every module of the language model.

    Args:
        architecture: the expected tensors, in the layout of unquantized checkpoints.
        tensors: dtype and shape by full tensor name, of all shards.

    Raises:
        InputError: a tensor is missing, or has a dtype, shape or scale that this scheme does not allow; shards that
            the engine fuses disagree; or something that is never quantized (towers, router, embeddings) is.
    """
    return _Reader(architecture, tensors).read()


def disagreements(architecture: TextArchitecture, facts: Facts, exclude: Iterable[str]) -> list[str]:
    """Modules that an `exclude` list and the headers see differently, by full name, in a stable order."""
    rules = tuple(exclude)
    found = []
    for module in sorted(facts.int8 | facts.unquantized):
        if is_excluded(_aliases(architecture.root, module), rules) == (module in facts.int8):
            found.append(architecture.root + module)
    return found


def _aliases(root: str, module: str) -> list[str]:
    """Every name by which a list may mean a module: the checkpoint's, the engine's, fused and per expert."""
    parent, _, last = module.rpartition(".")
    names = [module]
    names += [f"{parent}.{fused}" for fused, shards in FUSED_SHARDS.items() if last in shards]
    if last == "experts":
        names += [f"{module}.gate_up_proj", f"{module}.down_proj"]
        names += [f"{module}.0.{shard}" for shard in EXPERT_SHARDS]
    return [prefix + name for name in names for prefix in (root, "language_model.model.", "model.")]


class _Reader:
    """One pass over a checkpoint's headers."""

    def __init__(self, architecture: TextArchitecture, tensors: Mapping[str, Header]) -> None:
        self.architecture = architecture
        self.tensors = tensors
        self.names = {relative_name(name): name for name in tensors}
        self.expert_names: dict[str, list[str]] = {}
        for name in self.names:
            if match := _EXPERTS.match(name):
                self.expert_names.setdefault(match[0], []).append(name)
        self.int8: set[str] = set()
        self.unquantized: set[str] = set()
        self.int8_norms: set[str] = set()

    def read(self) -> Facts:
        self._refuse_quantized_others()
        for full, shape in self.architecture.shapes():
            name = relative_name(full)
            if is_fused_experts(full):
                if name.endswith("gate_up_proj"):
                    self._experts(name.removesuffix(".gate_up_proj"), *shape)
            elif is_linear_weight(full, shape):
                self._keep(name.removesuffix(".weight"), self._linear(name, shape))
            elif role_of(full) is Role.NORM and name.endswith(".weight"):
                if self._linear(name, shape):
                    self.int8_norms.add(name.removesuffix(".weight"))
            else:
                self._expect(name, FLOATS, shape)
        self._check_fused_shards()
        return Facts(frozenset(self.int8), frozenset(self.unquantized), frozenset(self.int8_norms))

    def _keep(self, module: str, is_int8: bool) -> None:
        (self.int8 if is_int8 else self.unquantized).add(module)

    def _full(self, name: str) -> str:
        known = self.names.get(name)
        return known if known is not None else (name if name.startswith("lm_head") else self.architecture.root + name)

    def _expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Header:
        """The header of a tensor that must be there, with one of these dtypes and shapes."""
        wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
        if name not in self.names:
            raise InputError(f"tensor {self._full(name)}: got nothing (missing), expected {wanted}")
        header = self.tensors[self.names[name]]
        if header.dtype not in dtypes or tuple(header.shape) not in shapes:
            raise InputError(f"tensor {self._full(name)}: got {header.dtype} {list(header.shape)}, expected {wanted}")
        return header

    def _linear(self, name: str, shape: tuple[int, ...]) -> bool:
        """Check a weight and its scale; True where it is int8."""
        module = name.removesuffix(".weight")
        is_int8 = self._expect(name, (INT8, *FLOATS), shape).dtype == INT8
        scale = f"{module}.{SCALE}"
        if is_int8:
            rows = shape[:1]
            self._expect(scale, FLOATS, rows, (*rows, 1), *([(1,), ()] if len(shape) == 1 else []))
        elif scale in self.names:
            raise InputError(f"tensor {self._full(scale)}: got a scale, expected none: {self._full(name)} is not int8")
        return is_int8

    def _experts(self, module: str, experts: int, gate_up: int, hidden: int) -> None:
        names = self.expert_names.get(module, [])
        indexed = [name for name in names if _EXPERT_INDEX.search(name)]
        fused = [name for name in names if fused_expert_part(name)]
        if indexed and fused:
            raise InputError(f"tensor {self._full(fused[0])}: got fused experts, expected none beside {indexed[0]}")
        if indexed:
            self._keep(module, self._indexed_experts(module, indexed, (experts, gate_up // 2, hidden)))
        else:
            self._keep(module, self._fused_experts(module, (experts, gate_up, hidden)))

    def _indexed_experts(self, module: str, indexed: list[str], sizes: tuple[int, int, int]) -> bool:
        experts, inner, hidden = sizes
        for name in indexed:
            index = _EXPERT_INDEX.search(name)
            if index and int(index[1]) >= experts:
                raise InputError(f"tensor {self._full(name)}: got expert {index[1]}, expected 0..{experts - 1}")
        kinds: dict[bool, str] = {}
        for expert in range(experts):
            for shard in EXPERT_SHARDS:
                name = f"{module}.{expert}.{shard}.weight"
                shape = (hidden, inner) if shard == "down_proj" else (inner, hidden)
                kinds.setdefault(self._linear(name, shape), name)
        self._refuse_mix(kinds, "experts of a layer")
        return True in kinds

    def _fused_experts(self, module: str, sizes: tuple[int, int, int]) -> bool:
        experts, gate_up, hidden = sizes
        kinds: dict[bool, str] = {}
        shapes = {"gate_up_proj": (experts, gate_up, hidden), "down_proj": (experts, hidden, gate_up // 2)}
        for part, shape in shapes.items():
            base = f"{module}.{part}"
            name = f"{base}.weight" if f"{base}.weight" in self.names else base
            is_int8 = self._expect(name, (INT8, *FLOATS), shape).dtype == INT8
            kinds.setdefault(is_int8, name)
            if is_int8:
                scales = [base + suffix for suffix in FUSED_SCALE_SUFFIXES if base + suffix in self.names]
                rows = shape[:2]
                self._expect(scales[0] if scales else f"{base}.{SCALE}", FLOATS, rows, (*rows, 1))
        self._refuse_mix(kinds, "experts of a layer")
        return True in kinds

    def _check_fused_shards(self) -> None:
        decided = self.int8 | self.unquantized
        for module in sorted(decided):
            parent, _, last = module.rpartition(".")
            for fused, shards in FUSED_SHARDS.items():
                if last == shards[0]:
                    siblings = [f"{parent}.{shard}" for shard in reversed(shards)]
                    kinds = {name in self.int8: f"{name}.weight" for name in siblings if name in decided}
                    self._refuse_mix(kinds, f"shards of {fused}")

    def _refuse_mix(self, kinds: Mapping[bool, str], what: str) -> None:
        if len(kinds) == 2:
            rounded, kept = self._full(kinds[True]), self._full(kinds[False])
            dtype = self.tensors[kept].dtype
            raise InputError(f"tensor {kept}: got {dtype}, expected I8 like {rounded}: {what} share one scheme")

    def _refuse_quantized_others(self) -> None:
        for name, header in self.tensors.items():
            role = role_of(name)
            is_rounded = name.endswith(".weight") and header.dtype not in FLOATS
            if role in _UNTOUCHED and (is_rounded or name.endswith(f".{SCALE}")):
                raise InputError(f"tensor {name}: got {header.dtype}, expected {FLOATS[0]}: {role} is never quantized")
            if role in LINEAR_ROLES and name.endswith((".input_scale", ".input_zero_point")):
                raise InputError(f"tensor {name}: got a static activation scale, expected none (dynamic per token)")


def fused_expert_part(name: str) -> str | None:
    """The fused expert tensor, `gate_up_proj` or `down_proj`, that a tensor is or belongs to as a scale; else None."""
    match = re.search(r"\.experts\.(gate_up_proj|down_proj)(?:[._]|$)", name)
    return match[1] if match else None
