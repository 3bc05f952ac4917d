"""What an FP8 static checkpoint really holds, module by module, from its headers; refuse what would serve garbage.

vLLM trusts `config.json`: where a list of ignored modules says something else than the files do, codes are copied into
BF16 parameters, or parameters stay uninitialized, without a word. Here the dtype of a weight decides.

Names are those of `quark_int8.facts`: a "module" is relative to the language model's root, all experts of a layer are
one module. Layouts of experts: one tensor an expert, fused 3-D with scales, and fused 3-D unquantized. A scale
whose module is not quantized is a leftover: dropped where the list of ignored modules covers the module, else
refused, since the weight might still need it. Nothing here needs vLLM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_gemma4q.architecture import (
    EXPERT_SHARDS,
    FUSED_SHARDS,
    LINEAR_ROLES,
    TextArchitecture,
    is_fused_experts,
    is_linear_weight,
    role_of,
)
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.format import INPUT_SCALE, WEIGHT_DTYPE, WEIGHT_SCALE
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.quark_int8.facts import FLOATS, Header, fused_expert_part, relative_name

CODES = frozenset({WEIGHT_DTYPE, "F8_E5M2"})
# How files name the scales of a fused expert tensor, after the tensor's own name.
FUSED_WEIGHT_SCALES = (".weight_scale", "_weight_scale", "_scale", ".scale")
FUSED_INPUT_SCALES = (".input_scale", "_input_scale")
RESTORE = "`gemma4q restore QUANT BASE DST` mends it"

_SCALE = re.compile(r"(?:[._]weight_scale|[._]input_scale|\.(?:gate_up_proj|down_proj)_scale)$")
_EXPERT = re.compile(r"^(layers\.\d+\.experts)\.(\d+)\.")
_EXPERTS = re.compile(r"^(layers\.\d+\.experts)(?=\.)")
_SCALAR = ((), (1,))


@dataclass(frozen=True)
class Facts:
    """Which modules are FP8 and which are not. Plain data: pickled to every worker.

    Attributes:
        fp8: linear modules and `layers.N.experts` stored in E4M3, with the rows of their weight: what a scale of the
            whole tensor is spread over. Experts have 0.
        channel_experts: those of them that are experts with one weight scale a row.
        unquantized: the other linear modules and `layers.N.experts`.
        leftovers: full names of scales whose modules are not quantized.
        num_experts: experts of a layer; 0 in dense models.
    """

    fp8: Mapping[str, int]
    channel_experts: frozenset[str]
    unquantized: frozenset[str]
    leftovers: frozenset[str]
    num_experts: int

    def is_fp8(self, name: str) -> bool:
        """Whether a linear or a layer's experts are FP8, by the engine's name, fused or not.

        Shards agree, so any that exists speaks for all: layers where V equals K have no v_proj.
        """
        module = relative_name(name)
        last = module.rpartition(".")[2]
        parent = module.removesuffix(last)
        return any(parent + shard in self.fp8 for shard in FUSED_SHARDS.get(last, (last,)))


def read_facts(architecture: TextArchitecture, tensors: Mapping[str, Header], ignored: IgnoreList) -> Facts:
    """Decide every module of the language model.

    Args:
        architecture: the expected tensors, in the layout of unquantized checkpoints.
        tensors: dtype and shape by full tensor name, of all shards.
        ignored: what config.json says is not quantized.

    Raises:
        InputError: a tensor is missing, or has a dtype, shape or scale that this scheme does not allow; shards that
            the engine fuses disagree; something that is never quantized (towers, router, embeddings) is; or a
            leftover scale's module is not on the list.
    """
    return _Reader(architecture, tensors, ignored).read()


def disagreements(architecture: TextArchitecture, facts: Facts, ignored: IgnoreList) -> list[str]:
    """Modules that the list of ignored ones and the headers see differently, by full name, in a stable order."""
    modules = sorted({*facts.fp8, *facts.unquantized})
    return [architecture.root + module for module in modules if ignored.covers(module) == (module in facts.fp8)]


@dataclass
class _Reader:
    """One pass over a checkpoint's headers."""

    architecture: TextArchitecture
    tensors: Mapping[str, Header]
    ignored: IgnoreList
    fp8: dict[str, int] = field(default_factory=dict)
    channel_experts: set[str] = field(default_factory=set)
    unquantized: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names = {relative_name(name): name for name in self.tensors}
        self.expert_names: dict[str, list[str]] = {}
        for name in self.names:
            if match := _EXPERTS.match(name):
                self.expert_names.setdefault(match[1], []).append(name)

    def read(self) -> Facts:
        self._refuse_quantized_others()
        for full, shape in self.architecture.shapes():
            name = relative_name(full)
            if is_fused_experts(full):
                if name.endswith("gate_up_proj"):
                    self._experts(name.removesuffix(".gate_up_proj"), *shape)
            elif is_linear_weight(full, shape):
                self._keep(name.removesuffix(".weight"), self._linear(name, shape)[0], shape[0])
            else:
                self._expect(name, FLOATS, shape)
        self._check_fused_shards()
        return Facts(
            self.fp8,
            frozenset(self.channel_experts),
            frozenset(self.unquantized),
            frozenset(self._leftovers()),
            self.architecture.num_experts or 0,
        )

    def _keep(self, module: str, is_fp8: bool, rows: int) -> None:
        if is_fp8:
            self.fp8[module] = rows
        else:
            self.unquantized.add(module)

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

    def _linear(self, name: str, shape: tuple[int, ...]) -> tuple[bool, bool]:
        """Check a weight and its scales; whether it is FP8, and whether each row has its own scale."""
        if self._expect(name, (WEIGHT_DTYPE, *FLOATS), shape).dtype != WEIGHT_DTYPE:
            return False, False
        module, rows = name.removesuffix(".weight"), shape[:1]
        scale = self._expect(f"{module}.{WEIGHT_SCALE}", FLOATS, *_SCALAR, rows, (*rows, 1))
        self._expect(f"{module}.{INPUT_SCALE}", FLOATS, *_SCALAR)
        return True, tuple(scale.shape) not in _SCALAR

    def _experts(self, module: str, experts: int, gate_up: int, hidden: int) -> None:
        names = self.expert_names.get(module, [])
        indexed = [name for name in names if _EXPERT.match(name) and name.endswith(".weight")]
        fused = [name for name in names if fused_expert_part(name) and not _SCALE.search(name)]
        if indexed and fused:
            raise InputError(f"tensor {self._full(fused[0])}: got fused experts, expected none beside {indexed[0]}")
        sizes = (experts, gate_up, hidden)
        kinds = self._indexed_experts(module, indexed, sizes) if indexed else self._fused_experts(module, sizes)
        self._refuse_mix({kind[0]: name for kind, name in kinds.items()}, "experts of a layer")
        if len(kinds) > 1:
            raise InputError(
                f"tensor {self._full(kinds[True, True])}: got a scale a row, expected one for all rows, "
                f"like {self._full(kinds[True, False])}: experts of a layer share one scheme"
            )
        self._keep(module, next(iter(kinds))[0], 0)
        if (True, True) in kinds:
            self.channel_experts.add(module)

    def _indexed_experts(
        self, module: str, indexed: list[str], sizes: tuple[int, int, int]
    ) -> dict[tuple[bool, bool], str]:
        experts, gate_up, hidden = sizes
        for name in indexed:
            match = _EXPERT.match(name)
            if match and int(match[2]) >= experts:
                raise InputError(f"tensor {self._full(name)}: got expert {match[2]}, expected 0..{experts - 1}")
        kinds: dict[tuple[bool, bool], str] = {}
        for expert in range(experts):
            for shard in EXPERT_SHARDS:
                name = f"{module}.{expert}.{shard}.weight"
                shape = (hidden, gate_up // 2) if shard == "down_proj" else (gate_up // 2, hidden)
                kinds.setdefault(self._linear(name, shape), name)
        return kinds

    def _fused_experts(self, module: str, sizes: tuple[int, int, int]) -> dict[tuple[bool, bool], str]:
        experts, gate_up, hidden = sizes
        kinds: dict[tuple[bool, bool], str] = {}
        shapes = {"gate_up_proj": (experts, gate_up, hidden), "down_proj": (experts, hidden, gate_up // 2)}
        for part, shape in shapes.items():
            base = f"{module}.{part}"
            name = f"{base}.weight" if f"{base}.weight" in self.names else base
            is_fp8 = self._expect(name, (WEIGHT_DTYPE, *FLOATS), shape).dtype == WEIGHT_DTYPE
            kind = (is_fp8, is_fp8 and self._fused_scales(base, shape))
            kinds.setdefault(kind, name)
        return kinds

    def _fused_scales(self, base: str, shape: tuple[int, ...]) -> bool:
        """Check both scales of a fused expert tensor; whether each row has its own."""
        experts, rows = shape[:2]
        each = (*_SCALAR, (experts,), (experts, 1), (experts, 1, 1))
        apart = ((experts, 2), (experts, 2, 1)) if base.endswith("gate_up_proj") else ()
        channel = ((experts, rows), (experts, rows, 1))
        weight_scale = self._first(base, FUSED_WEIGHT_SCALES)
        is_channel = tuple(self._expect(weight_scale, FLOATS, *each, *apart, *channel).shape) in channel
        self._expect(self._first(base, FUSED_INPUT_SCALES), FLOATS, *each)
        return is_channel

    def _first(self, base: str, suffixes: tuple[str, ...]) -> str:
        found = [base + suffix for suffix in suffixes if base + suffix in self.names]
        return found[0] if found else base + suffixes[0]

    def _check_fused_shards(self) -> None:
        decided = {*self.fp8, *self.unquantized}
        for module in sorted(decided):
            parent, _, last = module.rpartition(".")
            for fused, shards in FUSED_SHARDS.items():
                if last == shards[0]:
                    siblings = [f"{parent}.{shard}" for shard in reversed(shards)]
                    kinds = {name in self.fp8: f"{name}.weight" for name in siblings if name in decided}
                    self._refuse_mix(kinds, f"shards of {fused}")

    def _refuse_mix(self, kinds: Mapping[bool, str], what: str) -> None:
        if len(kinds) == 2:
            rounded, kept = self._full(kinds[True]), self._full(kinds[False])
            raise InputError(
                f"tensor {kept}: got {self.tensors[kept].dtype}, expected {WEIGHT_DTYPE} like {rounded}: "
                f"{what} share one scheme"
            )

    def _refuse_quantized_others(self) -> None:
        for name, header in self.tensors.items():
            role = role_of(name)
            if header.dtype in CODES and role not in LINEAR_ROLES:
                raise InputError(
                    f"tensor {name}: got {header.dtype}, expected {FLOATS[0]}: {role} is never quantized; {RESTORE}"
                )

    def _leftovers(self) -> list[str]:
        """Scales of modules that are not quantized, all covered by the list of ignored modules."""
        found = []
        for relative, full in self.names.items():
            match = _SCALE.search(relative)
            if not match or self._is_quantized(relative, relative[: match.start()]):
                continue
            module = full[: len(full) - len(relative) + match.start()]
            if not self.ignored.covers(module) and not self._is_virtual(relative):
                raise InputError(
                    f"tensor {full}: got a scale, but its module is not quantized and not on the list of ignored "
                    f"modules; {RESTORE}"
                )
            found.append(full)
        return found

    def _is_quantized(self, relative: str, module: str) -> bool:
        experts = _EXPERTS.match(relative)
        if experts:
            return experts[1] in self.fp8
        # Layers that share keys and values keep theirs in the file, quantized, and no engine loads them.
        weight = self.names.get(f"{module}.weight")
        return module in self.fp8 or (weight is not None and self.tensors[weight].dtype == WEIGHT_DTYPE)

    def _is_virtual(self, relative: str) -> bool:
        """Whether a scale belongs to a v_proj that does not exist, because values are the keys."""
        layer = re.match(r"layers\.(\d+)\.self_attn\.v_proj\.", relative)
        return layer is not None and not self.architecture.layers[int(layer[1])].has_value
