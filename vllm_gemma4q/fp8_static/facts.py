"""What an FP8 static checkpoint really holds, module by module, from its headers; refuse what would serve garbage.

Names, and what is common to all schemes: `module_headers`. A weight has one scale, or one a row; its input has one.

A scale whose module is not quantized is a leftover: dropped where the list of ignored modules covers the module, else
refused, since the weight might still need it. Nothing here needs vLLM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_gemma4q.architecture import EXPERT_SHARDS, LINEAR_ROLES, TextArchitecture, role_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.fp8_static.format import INPUT_SCALE, WEIGHT_DTYPE
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.module_headers import (
    FLOATS,
    FUSED_WEIGHT_SCALES,
    RESTORE,
    WEIGHT_SCALE,
    Header,
    Kind,
    ModuleReader,
    fused_expert_part,
    is_among,
    relative_name,
)

CODES = frozenset({WEIGHT_DTYPE, "F8_E5M2"})
FUSED_INPUT_SCALES = (".input_scale", "_input_scale")

_SCALE = re.compile(r"(?:[._]weight_scale|[._]input_scale|\.(?:gate_up_proj|down_proj)_scale)$")
_EXPERTS = re.compile(r"^(layers\.\d+\.experts)(?=\.)")
_SCALAR = ((), (1,))


@dataclass(frozen=True)
class Facts:
    """Which modules are FP8 and which are not. Plain data: pickled to every worker.

    Attributes:
        fp8: linear modules and `layers.N.experts` stored in E4M3, with what a scale of the whole tensor is spread
            over: the rows of a linear's weight, the number of a layer's experts.
        channel_experts: those of them that are experts with one weight scale a row.
        unquantized: the other linear modules and `layers.N.experts`.
        leftovers: full names of scales whose modules are not quantized.
    """

    fp8: Mapping[str, int]
    channel_experts: frozenset[str]
    unquantized: frozenset[str]
    leftovers: frozenset[str]

    def is_fp8(self, name: str) -> bool:
        """Whether a linear or a layer's experts are FP8, by the engine's name, fused or not."""
        return is_among(self.fp8, name)


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


class _Reader(ModuleReader):
    """One pass over a checkpoint's headers."""

    def __init__(self, architecture: TextArchitecture, tensors: Mapping[str, Header], ignored: IgnoreList) -> None:
        super().__init__(architecture, tensors, WEIGHT_DTYPE)
        self.ignored = ignored

    def read(self) -> Facts:
        self._refuse_quantized_others()
        self.read_modules()
        leftovers = frozenset(self._leftovers())
        return Facts(self.quantized, frozenset(self.by_row), frozenset(self.unquantized), leftovers)

    def is_expert_weight(self, name: str) -> bool:
        return not _SCALE.search(name)

    def linear(self, name: str, shape: tuple[int, ...]) -> Kind:
        if not self.is_quantized(name, shape):
            return Kind(False)
        module, rows = name.removesuffix(".weight"), shape[:1]
        scale = self.expect(f"{module}.{WEIGHT_SCALE}", FLOATS, *_SCALAR, rows, (*rows, 1))
        self.expect(f"{module}.{INPUT_SCALE}", FLOATS, *_SCALAR)
        return Kind(True, tuple(scale.shape) not in _SCALAR)

    def fused_scales(self, base: str, shape: tuple[int, ...]) -> bool:
        experts, rows = shape[:2]
        each = (*_SCALAR, (experts,), (experts, 1), (experts, 1, 1))
        apart = ((experts, 2), (experts, 2, 1)) if base.endswith("gate_up_proj") else ()
        channel = ((experts, rows), (experts, rows, 1))
        weight_scale = self.expect(self.first(base, FUSED_WEIGHT_SCALES), FLOATS, *each, *apart, *channel)
        self.expect(self.first(base, FUSED_INPUT_SCALES), FLOATS, *each)
        return tuple(weight_scale.shape) in channel

    def other(self, full: str, shape: tuple[int, ...]) -> None:
        self.expect(relative_name(full), FLOATS, shape)

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
            if not match or self._has_weight(relative, relative[: match.start()]):
                continue
            module = full[: len(full) - len(relative) + match.start()]
            if not self.ignored.covers(module) and not self._is_virtual(relative):
                raise InputError(
                    f"tensor {full}: got a scale, but its module is not quantized and not on the list of ignored "
                    f"modules; {RESTORE}"
                )
            found.append(full)
        return found

    def _has_weight(self, relative: str, module: str) -> bool:
        """Whether a scale's module is quantized. Raises InputError: a scale of experts without a weight of its own."""
        if experts := _EXPERTS.match(relative):
            if experts[1] not in self.quantized:
                return False
            weight_is_fused = f"{experts[1]}.0.{EXPERT_SHARDS[0]}.weight" not in self.names
            if not (weight_is_fused if fused_expert_part(relative) else f"{module}.weight" in self.names):
                raise InputError(f"tensor {self.full(relative)}: got a scale, expected none: there is no such weight")
            return True
        # Layers that share keys and values keep theirs in the file, quantized, and no engine loads them.
        weight = self.names.get(f"{module}.weight")
        return module in self.quantized or (weight is not None and self.tensors[weight].dtype == WEIGHT_DTYPE)

    def _is_virtual(self, relative: str) -> bool:
        """Whether a scale belongs to a v_proj that does not exist, because values are the keys."""
        match = re.match(r"layers\.([0-9]+)\.self_attn\.v_proj\.", relative)
        layers = self.architecture.layers
        return match is not None and int(match[1]) < len(layers) and not layers[int(match[1])].has_value
