"""The files of `corpus/`, byte by byte: `python build_corpus.py FOLDER` writes them anew.

Each is the smallest file of the shape that an advisory describes; what that is stands in `corpus/README.md`.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile.gguf_bytes import ARRAY, STRING, U32, U64, File, Key, TensorInfo

_F32, _I8 = 0, 24
_ARCHITECTURE = Key("general.architecture", STRING, "gemma4")
# Runs nothing: the instruction is there for readers that would obey it.
_PICKLE = b"cos\nsystem\n(S'touch pickle-was-opened'\ntR."
_BOMB = "{% for a in range(100000) %}{% for b in range(100000) %}{{ 'x' * 100000000 }}{% endfor %}{% endfor %}"
_INJECTION = (
    "{{ ''.__class__.__mro__[1].__subclasses__()[104].load_module('os').system('touch template-was-rendered') }}"
)


def files() -> Iterator[tuple[str, bytes]]:
    """Names and contents."""
    yield from _gguf_counts()
    yield from _gguf_sizes()
    yield from _safetensors()
    yield from _folders()


def _gguf_counts() -> Iterator[tuple[str, bytes]]:
    start = b"GGUF" + struct.pack("<I", 3)
    yield "key-count.gguf", start + struct.pack("<QQ", 0, (2**64 + 47) // 48) + bytes(64)
    yield "tensor-count.gguf", start + struct.pack("<QQ", (2**64 + 87) // 88, 0) + bytes(64)
    yield "string-length.gguf", start + struct.pack("<QQQ", 0, 1, 2**64 - 1) + bytes(64)
    strings = b"".join((struct.pack("<Q", 1), b"k", struct.pack("<IIQ", ARRAY, STRING, 2**61)))
    yield "array-length.gguf", start + struct.pack("<QQ", 0, 1) + strings + bytes(64)
    nested = struct.pack("<Q", 1) + b"k" + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 500
    yield "nested-arrays.gguf", start + struct.pack("<QQ", 0, 1) + nested + bytes(64)
    yield "dimensions.gguf", _gguf((1,) * 255)


def _gguf_sizes() -> Iterator[tuple[str, bytes]]:
    yield "size-wraps.gguf", _gguf((1024, 2**51, 2**3))
    yield "pad-wraps.gguf", _gguf((4, 2**30 - 1, 2**30 + 1))
    half = TensorInfo("a", (2**61,), _F32, 0), TensorInfo("b", (2**61,), _F32, 2**63), TensorInfo("c", (8,), _F32, 0)
    yield "sizes-add-up.gguf", File([_ARCHITECTURE], list(half), bytes(32)).to_bytes()
    yield "negative-count.gguf", File([_ARCHITECTURE], [TensorInfo("a", (2**63 - 1, 2), _I8, 0)], bytes(32)).to_bytes()
    yield "zero-dimension.gguf", _gguf((1, 0))
    yield "beyond-the-end.gguf", _gguf((4096, 4096))
    yield "alignment-0.gguf", _gguf((8,), Key("general.alignment", U32, 0))
    yield "alignment-type.gguf", _gguf((8,), Key("general.alignment", U64, 32))
    yield (
        "block-count.gguf",
        _gguf((8,), Key("gemma4.block_count", U32, 2**32 - 1), Key("gemma4.attention.head_count_kv", U32, 1)),
    )
    yield "template-injection.gguf", _gguf((8,), Key("tokenizer.chat_template", STRING, _INJECTION))


def _gguf(shape: tuple[int, ...], *keys: Key) -> bytes:
    return File([_ARCHITECTURE, *keys], [TensorInfo("blk.0.a.weight", shape, _F32, 0)], bytes(32)).to_bytes()


def _safetensors() -> Iterator[tuple[str, bytes]]:
    eight = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    yield "header-length.safetensors", struct.pack("<Q", 2**64 - 1) + b'{"a":1}'
    yield "header-bomb.safetensors", struct.pack("<Q", 100_000_000) + b"{" + b" " * 64
    yield "deep-header.safetensors", _file(b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}")
    text = json.dumps(eight).encode()
    yield "duplicate-key.safetensors", _file(b'{"a":' + text + b',"a":' + text + b"}", bytes(8))
    yield "overlap.safetensors", _header({"a": eight, "b": eight}, bytes(8))
    yield "hole.safetensors", _header({"a": eight, "b": {**eight, "data_offsets": [16, 24]}}, bytes(24))
    yield "polyglot.safetensors", _header({"a": eight}, bytes(8) + b"PK\x05\x06" + bytes(18))
    yield "shape-product.safetensors", _header({"a": {**eight, "shape": [2**33, 2**33]}}, bytes(8))
    yield "not-a-number.safetensors", _file(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,8]}}', bytes(8))
    yield "terminal-escape.safetensors", _header({"\x1b]0;owned\x07": {**eight, "dtype": "?"}}, bytes(8))
    yield "pickle.safetensors", _PICKLE


def _header(entries: dict[str, Any], data: bytes) -> bytes:
    return _file(json.dumps(entries).encode(), data)


def _file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _folders() -> Iterator[tuple[str, bytes]]:
    """Checkpoints: what each lacks of a whole one is not what is refused first."""
    yield "pickle-only/config.json", b"{}"
    yield "pickle-only/pytorch_model.bin", _PICKLE
    for name, shard in (("weight-map-parent", "../../../secret.safetensors"), ("weight-map-absolute", "/etc/passwd")):
        yield f"{name}/config.json", b"{}"
        yield f"{name}/model.safetensors.index.json", json.dumps({"weight_map": {"a": shard}}).encode()
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    auto_map = {name: f"evil/repository--modeling_evil.{name}" for name in classes}
    yield "auto-map/auto_map.json", json.dumps({"auto_map": auto_map}, indent=1).encode()
    yield "template-bomb/chat_template.jinja", ("<|turn>{{ tools }}" + _BOMB).encode()
    rules = {"quant_method": "compressed-tensors", "ignore": ["re:(([a-z_]|[a-z.])+)+$"]}
    yield "slow-pattern/quantization_config.json", json.dumps(rules).encode()


def main() -> None:
    """Write all files below a folder."""
    for name, content in files():
        path = Path(sys.argv[1]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
