"""What memory is asked about: a checkpoint folder, a GGUF file, or a published model in a planned format.

Only headers and configurations are read. A GGUF holds the language model alone; its vision tower is another file
(`mmproj`) and not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_mixed.header import Header
from gguf_mixed.tensors import OUTPUT, Inventory, read_inventory
from vllm_gemma4q.architecture import MAX_LAYERS, TextArchitecture, parse_text_architecture
from vllm_gemma4q.benchmark.shapes import MODELS
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.vram.kv_cache import CachedLayer, CacheShape, cache_shape
from vllm_gemma4q.vram.planned import PUBLISHED_CONTEXT, Scheme, planned_tensors, published_config
from vllm_gemma4q.vram.weights import TRELLIS, Part, StoredTensor

GGUF_ARCHITECTURE = "gemma4"
_TOKEN_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Source:
    """A model in one format.

    Attributes:
        scheme: what its weights are, for people.
        longest: tokens that the model was made for.
        architecture, tensors: of safetensors, real or planned; None and empty for a GGUF.
        gguf_parts: bytes that llama.cpp puts on the GPU; None for safetensors.
        fp8_cache: whether the checkpoint itself asks for an FP8 KV cache.
    """

    name: str
    scheme: str
    cache: CacheShape
    longest: int
    architecture: TextArchitecture | None = None
    tensors: tuple[StoredTensor, ...] = ()
    gguf_parts: Mapping[Part, int] | None = None
    fp8_cache: bool = False

    @property
    def is_exl3(self) -> bool:
        return any(tensor.name.endswith(TRELLIS) for tensor in self.tensors)

    @property
    def has_vision(self) -> bool:
        """Whether vLLM makes room in its batches for pictures and videos."""
        return any("vision_tower." in tensor.name for tensor in self.tensors)


def open_source(path: Path) -> Source:
    """A checkpoint folder, or a GGUF file.

    Raises:
        InputError: see `open_checkpoint`, `parse_text_architecture` and `read_inventory`; a GGUF that is no Gemma 4 or
            lacks a key that sizes need.
    """
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if not path.is_dir():
        raise InputError(f"{path}: got no such folder, expected a checkpoint folder, a .gguf file or {_names()}")
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    architecture = parse_text_architecture(config)
    tensors = tuple(
        StoredTensor(tensor.name, tensor.shape, tensor.end - tensor.start) for tensor in checkpoint.tensors.values()
    )
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise InputError(f"config.json: quantization_config is {quantization!r}, expected an object")
    return Source(
        name=str(path),
        scheme=str(quantization.get("quant_method", "unquantized")),
        cache=cache_shape(architecture, config),
        longest=_longest(config),
        architecture=architecture,
        tensors=tensors,
        fp8_cache=quantization.get("kv_cache_scheme") is not None,
    )


def plan_source(model: str, scheme: Scheme, bits: float = 0, head_bits: float = 0) -> Source:
    """A published model in a planned format.

    Raises:
        InputError: no such model.
    """
    if model not in MODELS:
        raise InputError(f"{model}: got an unknown model, expected a checkpoint folder, a .gguf file or {_names()}")
    config = published_config(MODELS[model])
    architecture = parse_text_architecture(config)
    label = f"exl3 {bits:g} h{head_bits:g}" if scheme is Scheme.EXL3 else scheme.value
    tensors = tuple(planned_tensors(architecture, scheme, bits, head_bits))
    cache = cache_shape(architecture, config)
    return Source(model, label, cache, _longest(config), architecture=architecture, tensors=tensors)


def _names() -> str:
    return " or ".join(MODELS)


def _longest(config: Mapping[str, Any]) -> int:
    value = config.get("text_config", config).get("max_position_embeddings", PUBLISHED_CONTEXT)
    if type(value) is not int or value < 1:
        raise InputError(f"config.json: max_position_embeddings is {value!r}, expected a positive integer")
    return value


def _open_gguf(path: Path) -> Source:
    inventory = read_inventory(path)
    header = inventory.headers[0]
    if inventory.architecture != GGUF_ARCHITECTURE:
        raise InputError(
            f"{path.name}: general.architecture: got {inventory.architecture!r}, expected {GGUF_ARCHITECTURE!r}"
        )
    return Source(
        name=str(path),
        scheme="GGUF",
        cache=_gguf_cache(header),
        longest=_integer(header, "context_length"),
        gguf_parts=_gguf_parts(inventory),
    )


def _gguf_parts(inventory: Inventory) -> dict[Part, int]:
    """llama.cpp keeps the embedding in host memory, and puts it on the GPU too where it is the output layer."""
    sizes = {name: tensor.n_bytes for name, tensor in inventory.tensors.items()}
    embedding = sizes.pop(_TOKEN_EMBEDDING, 0)
    head = sizes.pop(OUTPUT, embedding)
    return {Part.BODY: sum(sizes.values()), Part.HEAD: head}


def _gguf_cache(header: Header) -> CacheShape:
    layers = _integer(header, "block_count")
    if not 0 < layers <= MAX_LAYERS:
        raise InputError(
            f"{header.path.name}: {GGUF_ARCHITECTURE}.block_count: got {layers}, expected 1 to {MAX_LAYERS}"
        )
    shared = _integer(header, "attention.shared_kv_layers", 0)
    heads = header.get(f"{GGUF_ARCHITECTURE}.attention.head_count_kv")
    per_layer = heads if isinstance(heads, tuple) else (heads,) * layers
    pattern = header.get(f"{GGUF_ARCHITECTURE}.attention.sliding_window_pattern")
    for key, values in (("head_count_kv", per_layer), ("sliding_window_pattern", pattern)):
        if not isinstance(values, tuple) or len(values) != layers or not all(isinstance(item, int) for item in values):
            name = f"{GGUF_ARCHITECTURE}.attention.{key}"
            raise InputError(f"{header.path.name}: {name}: got {values!r}, expected {layers} values")
    assert isinstance(pattern, tuple)
    counts = [int(count) for count in per_layer if isinstance(count, int)]
    wide, narrow = _integer(header, "attention.key_length"), _integer(header, "attention.key_length_swa")
    cached = (
        CachedLayer(bool(sliding), count, narrow if sliding else wide)
        for sliding, count in list(zip(pattern, counts, strict=True))[: layers - shared]
    )
    return CacheShape(tuple(cached), _integer(header, "attention.sliding_window"))


def _integer(header: Header, key: str, default: int | None = None) -> int:
    name = f"{GGUF_ARCHITECTURE}.{key}"
    value = header.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{header.path.name}: {name}: got {value!r}, expected an integer")
    return value
