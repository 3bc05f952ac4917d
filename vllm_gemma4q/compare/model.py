"""One model of a comparison: which it is, what it is stored as, how large it is. Headers and configurations only.

Bits a weight are 8 x bytes / parameters of the text model:
    parameters  every parameter of the language model: embedding, attention, MLP, router, the experts that it has,
                norms, per-layer inputs. The output layer is the embedding in Gemma 4 and not counted again, whether a
                format stores it twice (EXL3) or not. Not counted: vision and audio.
    bytes       all that the file stores for these: weights, scales, trellises, the output layer where there is one.
                Not counted: headers, alignment, llama.cpp's table of rotations.
So a BF16 checkpoint has 16 and the figures of all formats have one denominator. Pruned models are counted by what is
left: their bits a weight do not fall with the experts, sizes on disk and in memory do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf_mixed.identity import model_sha256
from gguf_mixed.tensors import OUTPUT, Inventory, read_inventory
from vllm_gemma4q.architecture import Role, TextArchitecture, parse_text_architecture, role_of
from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.checkpoint import Checkpoint, open_checkpoint
from vllm_gemma4q.compare.outline import Outline, outline_of_config, outline_of_gguf
from vllm_gemma4q.compare.provenance import Provenance, of_checkpoint, of_gguf
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.engines import KvDtype, Request, default_engines
from vllm_gemma4q.vram.source import Source, open_source
from vllm_gemma4q.vram.table import Row, rows_of

GGUF = ".gguf"
_NOT_TEXT = frozenset({Role.VISION, Role.EMBED_VISION, Role.AUDIO})
_COMPUTED = "rope_freqs.weight"  # llama.cpp's, computed from the configuration
_EXPERTS = "ffn_down_exps.weight"


@dataclass(frozen=True)
class Model:
    """One checkpoint folder or GGUF file.

    Attributes:
        path: as the user gave it.
        name: of the folder or file.
        scheme: the format, for people.
        sha256: what result files name it by.
        experts: of each layer that has some.
        disk_bytes: of the files with weights, vision included where they hold it.
        text_bytes, parameters: see the module.
        source: what memory is computed from.
    """

    path: Path
    name: str
    scheme: str
    sha256: str
    outline: Outline
    experts: tuple[int, ...]
    disk_bytes: int
    text_bytes: int
    parameters: int
    source: Source
    provenance: Provenance

    @property
    def is_gguf(self) -> bool:
        return self.source.gguf_parts is not None

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.text_bytes / self.parameters

    @property
    def identity(self) -> dict[str, str]:
        """As result files have it."""
        return {"name": self.name, "sha256": self.sha256}

    def memory(self, tokens: int) -> list[Row]:
        """Weights and KV cache of one request in each engine that loads the format, vLLM first where it does."""
        return rows_of([self.source], default_engines(self.source, KvDtype.AUTO), Request(), [tokens])


def memory_bytes(row: Row, tokens: int) -> int:
    """Weights and KV cache; what an engine takes beside them is left out, for it is not known of all."""
    return sum(row.weights.values()) + row.caches[tokens]


def open_models(paths: Sequence[Path]) -> list[Model]:
    """Models of one base, in the order given; those of one name are called by their folder's name, too.

    Raises:
        InputError: see `open_model`; two are of different shapes, or are the same.
    """
    models = [open_model(path) for path in paths]
    for index, model in enumerate(models):
        if found := model.outline.difference(models[0].outline):
            key, got, expected = found
            raise InputError(
                f"{model.path}: {key}: got {got}, expected {expected} as in {models[0].path}: not one base"
            )
        same = [other.path for other in models[:index] if other.sha256 == model.sha256]
        if same:
            raise InputError(f"{model.path}: got the same model as {same[0]}, expected another")
    names = [model.name for model in models]
    return [model if names.count(model.name) == 1 else _renamed(model) for model in models]


def open_model(path: Path) -> Model:
    """A checkpoint folder or a `.gguf` file.

    Raises:
        InputError: see `open_checkpoint`, `parse_text_architecture`, `read_inventory` and `open_source`.
    """
    source = open_source(path)
    return _open_gguf(path, source) if path.suffix == GGUF else _open_folder(path, source)


def describe_experts(models: Sequence[Model]) -> list[str]:
    """Schemes, with the number of experts where models differ in it."""
    differ = len({model.experts for model in models}) > 1
    return [f"{model.scheme}, {_count(model.experts)} experts" if differ else model.scheme for model in models]


def _open_folder(path: Path, source: Source) -> Model:
    checkpoint = open_checkpoint(path)
    architecture = parse_text_architecture(checkpoint.config)
    provenance = of_checkpoint(checkpoint)
    identity = model_identity(checkpoint)
    return Model(
        path=path,
        name=identity["name"],
        scheme=provenance.scheme or source.scheme,
        sha256=identity["sha256"],
        outline=outline_of_config(architecture),
        experts=tuple(layer.num_experts for layer in architecture.layers if layer.num_experts is not None),
        disk_bytes=sum(shard.stat().st_size for shard in checkpoint.shards),
        text_bytes=_text_bytes(checkpoint),
        parameters=_parameters(architecture),
        source=source,
        provenance=provenance,
    )


def _open_gguf(path: Path, source: Source) -> Model:
    inventory = read_inventory(path)
    counted = {name: tensor for name, tensor in inventory.tensors.items() if name != _COMPUTED}
    return Model(
        path=path,
        name=path.name,
        scheme=source.scheme,
        sha256=model_sha256(inventory),
        outline=outline_of_gguf(inventory),
        experts=_gguf_experts(inventory),
        disk_bytes=inventory.file_bytes,
        text_bytes=sum(tensor.n_bytes for tensor in counted.values()),
        parameters=sum(tensor.n_elements for name, tensor in counted.items() if name != OUTPUT),
        source=source,
        provenance=of_gguf(inventory),
    )


def _text_bytes(checkpoint: Checkpoint) -> int:
    text = (tensor for name, tensor in checkpoint.tensors.items() if role_of(name) not in _NOT_TEXT)
    return sum(tensor.end - tensor.start for tensor in text)


def _parameters(architecture: TextArchitecture) -> int:
    """Quantized files pack several weights into an element, so the configuration is what is counted."""
    return sum(math.prod(shape) for name, shape in architecture.shapes() if role_of(name) is not Role.LM_HEAD)


def _gguf_experts(inventory: Inventory) -> tuple[int, ...]:
    tensors = [tensor for tensor in inventory.tensors.values() if tensor.role == _EXPERTS]
    return tuple(tensor.n_matrices for tensor in sorted(tensors, key=lambda tensor: tensor.layer or 0))


def _count(experts: Sequence[int]) -> str:
    least, most = min(experts, default=0), max(experts, default=0)
    return str(most) if least == most else f"{least} to {most}"


def _renamed(model: Model) -> Model:
    return replace(model, name=f"{model.path.resolve().parent.name}/{model.name}")


def model_report(model: Model, tokens: int) -> dict[str, Any]:
    """What `--json` says of a model but for its figures."""
    return {
        "path": str(model.path),
        **model.identity,
        "scheme": model.scheme,
        "experts": list(model.experts) or None,
        "disk_bytes": model.disk_bytes,
        "text_bytes": model.text_bytes,
        "parameters": model.parameters,
        "bits_a_weight": model.bits,
        "memory": [_memory_report(row, tokens) for row in model.memory(tokens)],
    }


def _memory_report(row: Row, tokens: int) -> Mapping[str, Any]:
    return {
        "engine": row.engine,
        "weights_bytes": sum(row.weights.values()),
        "kv_cache_bytes": row.caches[tokens],
        "total_bytes": memory_bytes(row, tokens),
    }
