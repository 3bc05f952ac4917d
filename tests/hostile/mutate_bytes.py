"""Damage to bytes without knowing what they mean: flipped bits, lost and repeated ranges, lying integers."""

from collections.abc import Callable
from random import Random

# Sizes and counts at which arithmetic of 32 and 64 bits, signed or not, wraps or is taken for something else.
INTEGERS = (
    0, 1, 2, 3, 4, 7, 8, 9, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 1000, 4095, 4096, 65535, 65536, 2**20, 2**24,
    2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**40, 2**53, 2**60, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**63 + 8,
    2**64 - 32, 2**64 - 8, 2**64 - 1, (2**64 + 87) // 88,
)  # fmt: skip


def mangle(rng: Random, data: bytes) -> bytes:
    """One to four kinds of damage, one after the other."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_DAMAGE)(rng, data)
    return data


def overwrite(data: bytes, offset: int, width: int, value: int) -> bytes:
    """A little-endian integer put at a place, cut to `width` bytes."""
    return data[:offset] + (value % 256**width).to_bytes(width, "little") + data[offset + width :]


def _flip_bits(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _lose(rng: Random, data: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:start] + data[stop:]


def _repeat(rng: Random, data: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 3)) + data[stop:]


def _splice(rng: Random, data: bytes) -> bytes:
    (start, stop), position = _range(rng, data), rng.randrange(len(data) + 1)
    return data[:position] + data[start:stop] + data[position + stop - start :]


def _fill(rng: Random, data: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:start] + rng.choice((b"\0", b"\xff", b" ", b"A")) * (stop - start) + data[stop:]


def _append(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", rng.randbytes(9), b"\0" * 64, data[:64], b"PK\x03\x04"))


def _integer(rng: Random, data: bytes) -> bytes:
    width = rng.choice((1, 4, 8))
    return overwrite(data, rng.randrange(max(1, len(data) - width)), width, rng.choice(INTEGERS))


def _range(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 32, 200)))


_DAMAGE: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip_bits, _flip_bits, _truncate, _lose, _repeat, _splice, _fill, _append, _integer, _integer,
)  # fmt: skip
