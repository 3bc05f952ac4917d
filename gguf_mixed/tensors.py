"""The tensors of a GGUF model, and what llama-quantize would do to each.

Rules are those of llama.cpp's src/llama-quant.cpp (b11434): `tensor_allows_quantization`, `tensor_type_fallback`,
`tensor_requires_imatrix`. Not modelled: the extra exclusions of the glm5-next architecture, `--leave-output-tensor`,
`--prune-layers`, `--keep-split`, and the types that a stock mix chooses (a plan names every tensor instead).
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gemma4q_kernels.ggml import (
    FLOAT_TYPES,
    QUANTIZABLE_TYPES,
    GGMLQuantizationType,
    NoFallbackError,
    fallback,
    legal_types,
    tensor_bytes,
)

from gguf_mixed.errors import InputError
from gguf_mixed.header import Header, KeyValue, read_header

RequestedTypes = Mapping[str, GGMLQuantizationType]

EMBEDDINGS = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})
OUTPUT = "output.weight"

_NEVER_EXACTLY = frozenset({"position_embd.weight", "token_types.weight"})
_NEVER_CONTAINING = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos",
    ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_ABORTING_TYPES = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
_IMATRIX_TYPES = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_BLOCK = re.compile(r"^blk\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` with the row length first (ggml's order), `start` its first byte in the file `path`."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    path: Path
    start: int

    @property
    def row_length(self) -> int:
        return self.shape[0]

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.qtype, self.shape)

    @property
    def n_matrices(self) -> int:
        """Matrices in the tensor: experts, or 1. An imatrix has this many rows for it."""
        return self.shape[2] if len(self.shape) > 2 else 1

    @property
    def layer(self) -> int | None:
        """Index of its block, None outside the blocks."""
        match = _BLOCK.match(self.name)
        return int(match["index"]) if match else None

    @property
    def role(self) -> str:
        """The name without its block: what the tensors of all layers share."""
        return _BLOCK.sub("", self.name)

    @property
    def kept_because(self) -> str | None:
        """Why llama-quantize copies this tensor whatever is asked, None where it quantizes it."""
        if len(self.shape) < 2:
            return "1-D"
        if not self.name.endswith("weight"):
            return "not named weight"
        if self.name in _NEVER_EXACTLY:
            return self.name
        return next((part for part in _NEVER_CONTAINING if part in self.name), None)

    @property
    def legal_types(self) -> tuple[GGMLQuantizationType, ...]:
        """Types that llama-quantize writes as asked, smallest first."""
        return (self.qtype,) if self.kept_because else legal_types(self.row_length)

    def written_type(self, requested: GGMLQuantizationType) -> GGMLQuantizationType:
        """The type in the output when `requested` is asked for.

        Raises:
            InputError: llama-quantize would stop: no substitute, a type that is no target, or a source of integers.
        """
        if self.kept_because:
            return self.qtype
        if requested not in QUANTIZABLE_TYPES:
            raise InputError(f"tensor {self.name}: nothing can be quantized to {requested.name}")
        try:
            written = fallback(requested, self.row_length)
        except NoFallbackError as error:
            raise InputError(f"tensor {self.name}: {error}") from error
        if written != self.qtype and self.qtype not in QUANTIZABLE_TYPES:
            raise InputError(f"tensor {self.name}: llama-quantize cannot convert {self.qtype.name}")
        return written

    def written_for(self, requested: Sequence[GGMLQuantizationType]) -> tuple[GGMLQuantizationType, ...]:
        """The types in the output when each of `requested` is asked for, smallest first; those that stop are left out.

        Every legal type is its own, so asking for all gives `legal_types`.
        """
        written = set()
        for qtype in requested:
            with contextlib.suppress(NoFallbackError):
                written.add(fallback(qtype, self.row_length))
        return tuple(qtype for qtype in self.legal_types if qtype in written)

    def bytes_as(self, requested: GGMLQuantizationType) -> int:
        """Bytes in the output, without alignment, when `requested` is asked for."""
        return tensor_bytes(self.written_type(requested), self.shape)

    def requires_imatrix(self, requested: GGMLQuantizationType) -> bool:
        """Whether llama-quantize stops without imatrix data for this tensor.

        It exempts embeddings and the output from its own list, but then ggml aborts on a shorter one. A Q2_K tensor
        needs data too when the base type is Q2_K_S, which nothing here uses.
        """
        if self.kept_because:
            return False
        exempt = self.name in EMBEDDINGS or self.name == OUTPUT
        return self.written_type(requested).name in (_ABORTING_TYPES if exempt else _IMATRIX_TYPES)


@dataclass(frozen=True)
class Inventory:
    """All tensors of a model by name, over all its files, in file order."""

    path: Path
    headers: tuple[Header, ...]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {
            entry.name: Tensor(entry.name, entry.shape, entry.qtype, header.path, entry.start)
            for header in self.headers
            for entry in header.tensors
        }

    @property
    def metadata(self) -> dict[str, KeyValue]:
        """That of the first file: the one llama.cpp reads."""
        return self.headers[0].metadata

    @property
    def architecture(self) -> str:
        value = self.headers[0].get("general.architecture")
        return value if isinstance(value, str) else "unknown"

    @property
    def n_elements(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        return sum(header.file_bytes for header in self.headers)

    @property
    def header_only(self) -> bool:
        return any(header.header_only for header in self.headers)

    @property
    def already_quantized(self) -> bool:
        """Whether llama-quantize would want --allow-requantize."""
        quantizable = (tensor for tensor in self.tensors.values() if not tensor.kept_because)
        return any(tensor.qtype not in FLOAT_TYPES for tensor in quantizable)


def read_inventory(path: Path) -> Inventory:
    """Read the headers of a model: one file, or the first of a split one, whose others must lie beside it.

    Raises:
        InputError: see `read_header`; a split that is not the first, is missing, or repeats a tensor; no tensors.
    """
    first = read_header(path)
    count = first.get("split.count")
    headers = [first]
    if isinstance(count, int) and count > 1:
        headers += [read_header(other) for other in _other_splits(first, count)]
        _check_splits(headers)
    if not any(header.tensors for header in headers):
        raise InputError(f"{path.name}: holds no tensors")
    return Inventory(path, tuple(headers))


def written_types(inventory: Inventory, requested: RequestedTypes) -> dict[str, GGMLQuantizationType]:
    """Type of every tensor in the output. Tensors that are not asked for keep theirs.

    Raises:
        InputError: a type for a tensor that the model lacks, or see `Tensor.written_type`.
    """
    for name in requested:
        if name not in inventory.tensors:
            raise InputError(f"tensor {name}: assigned a type, but {inventory.path.name} has no such tensor")
    return {
        name: tensor.written_type(requested[name]) if name in requested else tensor.qtype
        for name, tensor in inventory.tensors.items()
    }


def _other_splits(first: Header, count: int) -> list[Path]:
    match = _SPLIT.match(first.path.name)
    number = first.get("split.no")
    if number != 0:
        raise InputError(f"{first.path.name}: is file {number} (split.no) of {count}, expected the first, 0")
    if match is None or int(match["count"]) != count:
        raise InputError(f"{first.path.name}: has {count} files, expected a name ending in -00001-of-{count:05}.gguf")
    return [first.path.with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf") for index in range(2, count + 1)]


def _check_splits(headers: list[Header]) -> None:
    seen: set[str] = set()
    for index, header in enumerate(headers):
        if header.get("split.no") != index:
            raise InputError(f"{header.path.name}: split.no is {header.get('split.no')}, expected {index}")
        for entry in header.tensors:
            if entry.name in seen:
                raise InputError(f"{header.path.name}: tensor {entry.name} is in an earlier file too")
            seen.add(entry.name)
    expected = headers[0].get("split.tensors.count")
    if expected != len(seen):
        raise InputError(f"{headers[0].path.name}: {len(seen)} tensors in {len(headers)} files, expected {expected}")
