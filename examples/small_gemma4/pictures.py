"""Generated pictures: one colour, or two halves of different colours, with a question and its one-word answer.

A colour is a base RGB value whose channels are shifted by up to `SPREAD`; a shade is held out when the CRC-32 of its
RGB value says so, so that vision accuracy is measured on shades never seen in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 170, 50),
    "blue": (40, 60, 215),
    "yellow": (230, 220, 40),
    "black": (22, 22, 22),
    "white": (233, 233, 233),
    "orange": (240, 135, 25),
    "purple": (140, 40, 165),
}
SPREAD = 20
HELD_OUT_EVERY = 5
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Picture:
    """An RGB image, the question about it and the answer."""

    image: Image.Image
    question: str
    answer: str


def shade(rng: random.Random, name: str, held_out: bool) -> tuple[int, int, int]:
    """A shade of the named colour that belongs to the wanted split."""
    while True:
        red, green, blue = (min(255, max(0, base + rng.randint(-SPREAD, SPREAD))) for base in COLOURS[name])
        if (zlib.crc32(bytes((red, green, blue))) % HELD_OUT_EVERY == 0) is held_out:
            return red, green, blue


def one_colour(rng: random.Random, held_out: bool) -> Picture:
    """A picture of one colour."""
    name = rng.choice(sorted(COLOURS))
    size = (rng.randint(40, 64), rng.randint(40, 64))
    return Picture(Image.new("RGB", size, shade(rng, name, held_out)), "What colour is the picture?", name)


def two_halves(rng: random.Random, held_out: bool) -> Picture:
    """A picture of two halves, beside or above each other, and a question about one of them."""
    first, second = rng.sample(sorted(COLOURS), 2)
    side = rng.choice(SIDES)
    beside = side in ("left", "right")
    width, height = rng.randint(40, 64), rng.randint(40, 64)
    image = Image.new("RGB", (width, height), shade(rng, first, held_out))
    corner = (width // 2, 0) if beside else (0, height // 2)
    image.paste(shade(rng, second, held_out), (*corner, width, height))
    answer = first if side in ("left", "top") else second
    return Picture(image, f"What colour is the {side} half?", answer)


def generate(seed: int, held_out: bool) -> Iterator[Picture]:
    """An endless stream of pictures of one split, both kinds in turn; the same seed always gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield one_colour(rng, held_out)
        yield two_halves(rng, held_out)
