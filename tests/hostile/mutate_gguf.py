"""Damage to GGUF files: lying counts, lengths, sizes, kinds and offsets, and headers that contradict themselves."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from random import Random

from hostile.gguf_bytes import ARRAY, BOOL, F32, STRING, U8, U32, U64, File, Key, TensorInfo
from hostile.mutate_bytes import INTEGERS, mangle, overwrite

_NAMES = ("", "x", "a" * 64, "a" * 300, "token_embd.weight", "blk.0.", "blk.99999999999999999999.attn_q.weight",
          "\0", "é" * 30,
          "blk.0.attn_q.weight\n", "\x1b[2J", "../x", "blk." + "9" * 5000 + ".a.weight", "\udcff\udcfe",
          "A=b c")  # fmt: skip
_TYPES = (0, 1, 2, 4, 5, 6, 8, 10, 14, 24, 30, 31, 36, 39, 40, 41, 255, 2**31, 2**32 - 1)


def mangle_gguf(rng: Random, file: File) -> bytes:
    """A damaged copy of a file."""
    kind = rng.random()
    if kind < 0.5:
        data = file.to_bytes()
        for _ in range(rng.choice((1, 1, 2))):
            offset, width = rng.choice(file.fields)
            near = int.from_bytes(data[offset : offset + width], "little")
            data = overwrite(data, offset, width, rng.choice((*INTEGERS, near + 1, near - 1, near * 2, *range(14))))
        return data
    if kind < 0.65:
        data = file.to_bytes()
        end = len(data) - len(file.data)
        return mangle(rng, data[:end]) + data[end:]
    changed = deepcopy(file)
    for _ in range(rng.choice((1, 1, 2))):
        if changed.tensors and changed.keys:
            rng.choice(_CHANGES)(rng, changed)
    return changed.to_bytes()


def _alignment(rng: Random, file: File) -> None:
    value = rng.choice((0, 1, 3, 8, 64, 2**20, 2**31, 2**32 - 1))
    kind = rng.choice((U32, U32, U32, U64, STRING, ARRAY))
    file.keys.append(Key("general.alignment", kind, _as(kind, value)))


def _key(rng: Random, file: File) -> None:
    """Another kind of value under a key that readers know."""
    index = rng.randrange(len(file.keys))
    kind = rng.choice((U8, U32, U64, F32, BOOL, STRING, ARRAY))
    value = rng.choice((0, 1, 2, 2**16, 2**31, 2**32 - 1, 2**63))
    file.keys[index] = replace(file.keys[index], kind=kind, value=_as(kind, value), items=U32)


def _as(kind: int, value: int) -> object:
    limits = {U8: 2**8, U32: 2**32, U64: 2**64}
    if kind == ARRAY:
        return [value % 2**32] * (value % 7)
    if kind == STRING:
        return "x" * (value % 9)
    if kind == F32:
        return float("nan") if value == 0 else float(value)
    return bool(value % 2) if kind == BOOL else value % limits[kind]


def _nested(rng: Random, file: File) -> None:
    """An array of arrays, as deep as the header says."""
    file.keys.append(Key("deep", ARRAY, [], items=ARRAY))
    if rng.random() < 0.5:
        file.keys.append(Key("after", U32, 1))


def _long_array(rng: Random, file: File) -> None:
    file.keys.append(Key("long", ARRAY, [1] * rng.choice((1023, 1024, 1025, 5000)), items=rng.choice((U8, U32))))


def _split(rng: Random, file: File) -> None:
    count, number = rng.choice((0, 1, 2, 3, 65535, 2**32 - 1)), rng.choice((0, 1, 7, 2**32 - 1))
    kind = rng.choice((U32, U64))
    file.keys = [key for key in file.keys if not key.name.startswith("split.")]
    file.keys += [
        Key("split.count", kind, count),
        Key("split.no", kind, number),
        Key("split.tensors.count", kind, number),
    ]


def _lose_key(rng: Random, file: File) -> None:
    if file.keys:
        del file.keys[rng.randrange(len(file.keys))]


def _repeat_key(rng: Random, file: File) -> None:
    file.keys.append(rng.choice(file.keys))


def _rename_key(rng: Random, file: File) -> None:
    index = rng.randrange(len(file.keys))
    file.keys[index] = replace(file.keys[index], name=rng.choice(_NAMES))


def _rename_tensor(rng: Random, file: File) -> None:
    index = rng.randrange(len(file.tensors))
    file.tensors[index] = replace(file.tensors[index], name=rng.choice((*_NAMES, rng.choice(file.tensors).name)))


def _shape(rng: Random, file: File) -> None:
    index = rng.randrange(len(file.tensors))
    tensor = file.tensors[index]
    shape = rng.choice(
        ((), (0,), (1,), (2**62, 2**62), (2**32, 2**32), (2**63,), (2**64 - 1, 2**64 - 1, 2, 2), (1,) * 4, (1,) * 5,
        (256,) * 255,
         (*tensor.shape, 0), (*tensor.shape, 2**40), tensor.shape[::-1], (tensor.shape[0] + 1, *tensor.shape[1:]))
    )  # fmt: skip
    file.tensors[index] = replace(tensor, shape=shape)


def _type(rng: Random, file: File) -> None:
    index = rng.randrange(len(file.tensors))
    file.tensors[index] = replace(file.tensors[index], kind=rng.choice(_TYPES))


def _offset(rng: Random, file: File) -> None:
    index = rng.randrange(len(file.tensors))
    tensor = file.tensors[index]
    file.tensors[index] = replace(tensor, offset=rng.choice((0, tensor.offset + 32, tensor.offset + 1, *INTEGERS)))


def _lose_tensor(rng: Random, file: File) -> None:
    del file.tensors[rng.randrange(len(file.tensors)) :]


def _more_tensors(rng: Random, file: File) -> None:
    end = max((tensor.offset for tensor in file.tensors), default=0)
    file.tensors += [TensorInfo(f"extra.{number}", (1,), 0, end) for number in range(rng.choice((1, 50)))]


def _data(rng: Random, file: File) -> None:
    file.data = mangle(rng, file.data[:512]) + file.data[512:]


def _version(rng: Random, file: File) -> None:
    file.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))


_CHANGES: tuple[Callable[[Random, File], None], ...] = (
    _alignment, _key, _key, _key, _nested, _long_array, _split, _lose_key, _repeat_key, _rename_key, _rename_tensor,
    _shape,
    _shape, _type, _offset, _lose_tensor, _more_tensors, _data, _version,
)  # fmt: skip
