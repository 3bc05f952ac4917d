"""What an EXL3 checkpoint really holds, linear by linear, from its headers; refuse what would serve garbage.

Names, and what is common to all schemes: `module_headers`. A linear `X` is packed where the file has `X.trellis`; bits
and codebook are its own. The output layer is one too, whatever `tie_word_embeddings` says. Nothing here needs vLLM.

Not served: packed vision towers, biases, routers and embeddings.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from gemma4q_kernels.exl3_layout import BLOCK, HALF_WIDTHS, TILE, WIDTHS, codebook_of

from vllm_gemma4q.architecture import FUSED_SHARDS, Role, TextArchitecture, layer_index, role_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.module_headers import FLOATS, Header, Kind, ModuleReader, is_among, relative_name

INT16, HALF = "I16", "F16"
TRELLIS, INPUT_SIGNS, OUTPUT_SIGNS = "trellis", "suh", "svh"
# Signs of old files, packed, and what they are when they are unpacked.
PACKED_SIGNS = {"su": INPUT_SIGNS, "sv": OUTPUT_SIGNS}
MARKERS = frozenset({"mcg", "mul1"})
LM_HEAD = "lm_head"

_LEAVES = frozenset({TRELLIS, INPUT_SIGNS, OUTPUT_SIGNS, *PACKED_SIGNS, *MARKERS})


class Packed(NamedTuple):
    """How one linear is stored; sizes are the model's, without the zeros that fill the last block.

    Attributes:
        width: int16 a tile, 16 for each bit a weight.
    """

    in_features: int
    out_features: int
    width: int
    codebook: str


@dataclass(frozen=True)
class Facts:
    """Which linears are packed, and how. Plain data: pickled to every worker.

    Attributes:
        linears: by the name that the file gives them, each expert's too (`layers.0.experts.3.up_proj`).
        modules: linear modules and `layers.N.experts` that are packed.
        unquantized: the others.
    """

    linears: Mapping[str, Packed]
    modules: frozenset[str]
    unquantized: frozenset[str]

    def is_packed(self, name: str) -> bool:
        """Whether a linear or a layer's experts are packed, by the engine's name, fused or not."""
        return is_among(self.modules, name)

    def shards(self, name: str) -> tuple[Packed | None, ...]:
        """Those of a linear that the engine calls `name`, fused or not; None for values that are the keys."""
        module = relative_name(name)
        last = module.rpartition(".")[2]
        parent = module.removesuffix(last)
        return tuple(self.linears.get(parent + shard) for shard in FUSED_SHARDS.get(last, (last,)))

    def experts(self, name: str) -> dict[str, Packed]:
        """Those of a layer's experts that the engine calls `name`: by `3.up_proj` and so on."""
        prefix = relative_name(name) + "."
        return {key.removeprefix(prefix): packed for key, packed in self.linears.items() if key.startswith(prefix)}


def read_facts(architecture: TextArchitecture, tensors: Mapping[str, Header]) -> Facts:
    """Decide every linear of the language model.

    Args:
        architecture: the expected tensors, in the layout of unquantized checkpoints.
        tensors: dtype and shape by full tensor name, of all shards.

    Raises:
        InputError: a tensor is missing, or has a dtype or shape that the format or the model does not allow; a packed
            linear has tensors that the format does not know, a bias, or an unpacked weight beside it; shards that the
            engine fuses, or experts of a layer, are packed in part; packed tensors belong to no linear of the model.
    """
    return _Reader(architecture, tensors, INT16).read()


class _Reader(ModuleReader):
    """One pass over a checkpoint's headers."""

    def read(self) -> Facts:
        self.linears: dict[str, Packed] = {}
        self.leaves: dict[str, set[str]] = {}
        for name in self.names:
            module, _, leaf = name.rpartition(".")
            self.leaves.setdefault(module, set()).add(leaf)
        self.read_modules()
        if self._is_packed(LM_HEAD):
            shape = (self.architecture.vocab_size, self.architecture.hidden_size)
            self.quantized[LM_HEAD] = shape[0]
            self._read_packed(LM_HEAD, shape)
        self._refuse_orphans()
        return Facts(self.linears, frozenset(self.quantized), frozenset(self.unquantized))

    def linear(self, name: str, shape: tuple[int, ...]) -> Kind:
        module = name.removesuffix(".weight")
        if not self._is_packed(module):
            self.expect(name, FLOATS, shape)
            return Kind(False)
        self._read_packed(module, shape)
        return Kind(True)

    def fused_scales(self, base: str, shape: tuple[int, ...]) -> bool:
        raise InputError(f"tensor {self.full(base)}: got fused {INT16} experts, expected one trellis an expert")

    def other(self, full: str, shape: tuple[int, ...]) -> None:
        name = relative_name(full)
        if name != f"{LM_HEAD}.weight" or not self._is_packed(LM_HEAD):
            self.expect(name, FLOATS, shape)

    def _is_packed(self, module: str) -> bool:
        return not _LEAVES.isdisjoint(self.leaves.get(module, ()))

    def _read_packed(self, module: str, shape: tuple[int, ...]) -> None:
        """Check a packed linear, [out, in] in the model."""
        leaves = self.leaves[module]
        if strange := sorted(leaves - _LEAVES):
            self._refuse(f"{module}.{strange[0]}", f"only {', '.join(sorted(_LEAVES))} beside a trellis")
        try:
            codebook = codebook_of(leaves)
        except ValueError as error:
            raise InputError(f"tensor {self.full(f'{module}.{TRELLIS}')}: {error}") from None
        out_features, in_features = shape
        padded = {INPUT_SIGNS: _padded(in_features), OUTPUT_SIGNS: _padded(out_features)}
        widths = sorted(WIDTHS + HALF_WIDTHS) if codebook == "mul1" else WIDTHS
        tiles = padded[INPUT_SIGNS] // TILE, padded[OUTPUT_SIGNS] // TILE
        trellis = self.expect(f"{module}.{TRELLIS}", (INT16,), *((*tiles, width) for width in widths))
        for old, leaf in PACKED_SIGNS.items():
            if old in leaves and leaf in leaves:
                self._refuse(f"{module}.{old}", f"none beside {module}.{leaf}")
            name, dtype, unit = (old, INT16, TILE) if old in leaves else (leaf, HALF, 1)
            self.expect(f"{module}.{name}", (dtype,), (padded[leaf] // unit,))
        self.linears[module] = Packed(in_features, out_features, trellis.shape[2], codebook)

    def _refuse_orphans(self) -> None:
        for module, leaves in self.leaves.items():
            packed = sorted(leaves & _LEAVES)
            if not packed or module in self.linears:
                continue
            name = f"{module}.{packed[0]}"
            if role_of(self.full(name)) in (Role.VISION, Role.EMBED_VISION, Role.AUDIO):
                self._refuse(name, "an unquantized tower: convert it with 16 bits")
            if not self._is_shared(self.full(name)):
                self._refuse(name, "none: this model has no packed linear there")

    def _is_shared(self, full: str) -> bool:
        """Whether a tensor makes keys or values of a layer that takes another's: engines drop it."""
        if not re.search(r"\.layers\.\d+\.self_attn\.[kv]_proj\.", full):
            return False
        index, layers = layer_index(full), self.architecture.layers
        return index < len(layers) and not layers[index].has_key_value

    def _refuse(self, name: str, expected: str) -> NoReturn:
        header = self.tensors[self.names[name]]
        raise InputError(f"tensor {self.full(name)}: got {header.dtype} {list(header.shape)}, expected {expected}")


def _padded(features: int) -> int:
    return -(-features // BLOCK) * BLOCK
