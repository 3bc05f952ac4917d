"""Damage to safetensors files: the header's length, what it says of tensors, and the bytes behind it."""

import json
from random import Random
from typing import Any

from hostile.mutate_bytes import INTEGERS, mangle
from hostile.mutate_json import dumps, lie, mangle_json

_SAME_WIDTH = {"BF16": ("F16", "I16", "U16"), "F16": ("BF16", "I16"), "I8": ("U8", "BOOL", "F8_E4M3"), "F32": ("I32",
               "U32"),
               "F8_E4M3": ("I8", "F8_E5M2", "U8"), "I16": ("BF16", "F16"), "F64": ("I64",), "I64": ("F64",),
               "I32": ("F32",)}  # fmt: skip


def mangle_safetensors(rng: Random, data: bytes) -> bytes:
    """A damaged copy of a file, or one whose header is sound and lies."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return mangle(rng, data[: 8 + length]) + rest
    if kind < 0.30:
        claimed = rng.choice((*INTEGERS, length - 1, length + 1, length + 8, len(data), len(data) - 8, 100_000_001))
        return (claimed % 2**64).to_bytes(8, "little") + header + rest
    if kind < 0.60:
        return _file(mangle_json(rng, header), rest)
    if kind < 0.70:
        return _file(header, mangle(rng, rest[:4096]) + rest[4096:])
    return _consistent(rng, json.loads(header), rest)


def _file(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def _consistent(rng: Random, header: dict[str, Any], rest: bytes) -> bytes:
    """Names, dtypes and shapes that fit their bytes, and do not fit the model: what gets past the header's checks."""
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(names)
        entry = header.get(name)
        if not isinstance(entry, dict) or "dtype" not in entry:
            continue
        kind = rng.randrange(6)
        if kind == 0:
            entry["dtype"] = rng.choice(_SAME_WIDTH.get(entry["dtype"], ("U8",)))
        elif kind == 1:
            entry["shape"] = rng.choice((entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1],
                                         [_product(entry["shape"])]))  # fmt: skip
        elif kind == 2:
            header[_another_name(rng, name)] = header.pop(name)
        elif kind == 3:
            other = rng.choice(names)
            if other in header:
                header[name], header[other] = header[other], entry
        elif kind == 4:
            rest = _without(header, name, rest)
        else:
            end = max(item["data_offsets"][1] for key, item in header.items() if key != "__metadata__")
            shape = rng.choice(([0], [0, 2**40], [2**62, 0], [0] * 40, []))
            if shape:
                header[_another_name(rng, name)] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [end, end]}
    return _file(dumps(header), rest)


def _without(header: dict[str, Any], name: str, rest: bytes) -> bytes:
    """The file without a tensor, all others moved up."""
    start, end = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    return rest[:start] + rest[end:]


def _another_name(rng: Random, name: str) -> str:
    found = lie(rng, name) if rng.random() < 0.3 else None
    if isinstance(found, str):
        return str(found)[:3000]
    return rng.choice(
        (
            name.replace(".layers.0", ".layers.7"), name.replace(".layers.1", f".layers.{'9' * 5000}"), name + "_scale",
            name.replace("q_proj", "qkv_proj"), name.replace(".weight", ".weight_scale"), name.removesuffix(".weight"),
            name.replace("experts.", "experts.77777777777777777777."), name.replace("model.", "language_model.model."),
            name.replace(".weight", ".input_scale"), name.replace(".weight", ".trellis"), "lm_head.weight",
            "layers.x.y",
            name.replace(".layers.0", ".layers.٣"), name.replace(".layers.0", ".layers.-1"), ".", "",
        )
    )  # fmt: skip


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
