"""What a W8A8 INT8 checkpoint really holds, module by module, from its headers; refuse what would serve garbage.

Names, and what is common to all schemes: `module_headers`. Every weight, also one expert's, has one scale a row, as a
vector or a column. Nothing here needs vLLM.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_gemma4q.architecture import EXPERT_SHARDS, FUSED_SHARDS, LINEAR_ROLES, Role, TextArchitecture, role_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.module_headers import (
    FLOATS,
    FUSED_WEIGHT_SCALES,
    RESTORE,
    WEIGHT_SCALE,
    Header,
    Kind,
    ModuleReader,
    is_among,
    relative_name,
)
from vllm_gemma4q.quark_int8.scheme import is_excluded

INT8 = "I8"
ZERO_POINT = "weight_zero_point"

_UNTOUCHED = frozenset({Role.VISION, Role.EMBED_VISION, Role.AUDIO, Role.ROUTER, Role.EMBEDDING, Role.LM_HEAD})


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
        """Whether a linear or a layer's experts are int8, by the engine's name, fused or not."""
        return is_among(self.int8, name)


def read_facts(architecture: TextArchitecture, tensors: Mapping[str, Header]) -> Facts:
    """Decide every module of the language model.

    Args:
        architecture: the expected tensors, in the layout of unquantized checkpoints.
        tensors: dtype and shape by full tensor name, of all shards.

    Raises:
        InputError: a tensor is missing, or has a dtype, shape or scale that this scheme does not allow; shards that
            the engine fuses disagree; or something that is never quantized (towers, router, embeddings) is.
    """
    return _Reader(architecture, tensors, INT8).read()


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


class _Reader(ModuleReader):
    """One pass over a checkpoint's headers."""

    def read(self) -> Facts:
        self.int8_norms: set[str] = set()
        self._refuse_quantized_others()
        self.read_modules()
        return Facts(frozenset(self.quantized), frozenset(self.unquantized), frozenset(self.int8_norms))

    def linear(self, name: str, shape: tuple[int, ...]) -> Kind:
        scale = f"{name.removesuffix('.weight')}.{WEIGHT_SCALE}"
        if self.is_quantized(name, shape):
            rows = shape[:1]
            self.expect(scale, FLOATS, rows, (*rows, 1), *([(1,), ()] if len(shape) == 1 else []))
            return Kind(True, True)
        if scale in self.names:
            raise InputError(f"tensor {self.full(scale)}: got a scale, expected none: {self.full(name)} is not int8")
        return Kind(False)

    def fused_scales(self, base: str, shape: tuple[int, ...]) -> bool:
        rows = shape[:2]
        self.expect(self.first(base, FUSED_WEIGHT_SCALES), FLOATS, rows, (*rows, 1))
        return True

    def other(self, full: str, shape: tuple[int, ...]) -> None:
        name = relative_name(full)
        if role_of(full) is Role.NORM and name.endswith(".weight"):
            if self.linear(name, shape).quantized:
                self.int8_norms.add(name.removesuffix(".weight"))
        else:
            self.expect(name, FLOATS, shape)

    def _refuse_quantized_others(self) -> None:
        for name, header in self.tensors.items():
            role = role_of(name)
            is_rounded = name.endswith(".weight") and header.dtype not in FLOATS
            if role in _UNTOUCHED and (is_rounded or name.endswith(f".{WEIGHT_SCALE}")):
                raise InputError(
                    f"tensor {name}: got {header.dtype}, expected {FLOATS[0]}: {role} is never quantized; {RESTORE}"
                )
            if role in LINEAR_ROLES and name.endswith((".input_scale", ".input_zero_point")):
                raise InputError(f"tensor {name}: got a static activation scale, expected none (dynamic per token)")
