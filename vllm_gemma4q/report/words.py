"""Figures in words, as the page shows them."""

import math

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"
NOT_FINITE = "not finite"


def size(n_bytes: float) -> str:
    """Bytes in decimal units with three digits: 1.23 GB."""
    unit, scale = unit_of(n_bytes)
    return f"{in_unit(n_bytes, scale)} {unit}"


def gib(n_bytes: float) -> str:
    """Memory of GPUs, in GiB; MiB where that would be hundredths."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.1f} MiB"


def unit_of(n_bytes: float) -> tuple[str, float]:
    """The largest unit that leaves at least one before the point, and its bytes."""
    return next(((unit, scale) for unit, scale in _UNITS if n_bytes >= scale), _UNITS[-1])


def in_unit(n_bytes: float, scale: float) -> str:
    """Three digits at most, four of a number above 999."""
    value = n_bytes / scale
    if value >= 100 or scale == 1:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def short(n_bytes: float, scale: float) -> str:
    """Three characters or four for a narrow cell."""
    value = n_bytes / scale
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}".removesuffix(".0") if value >= 0.05 else "<.1"


def bits(value: float, digits: int = 1) -> str:
    """Bits without zeros behind the point."""
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def error(value: float) -> str:
    """A relative squared error: 4.2e-05."""
    if not math.isfinite(value):
        return NOT_FINITE
    return "0" if value == 0 else f"{value:.1e}"


def decibels(value: float) -> str:
    """How far below the weights the error is, 10 log10 of it: -44 for 4e-5."""
    if not math.isfinite(value):
        return INFINITY
    return "0" if value == 0 else f"{10 * math.log10(value):.0f}".replace("-", MINUS)


def count(value: int) -> str:
    """Parameters: 31.2 B, 4.1 M, 512."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= scale:
            return f"{in_unit(value, scale)} {unit}"
    return str(value)


def share(part: float, whole: float) -> str:
    """Percent; a share that is not quite all or nothing never reads as if it were."""
    if not whole:
        return ""
    value = part / whole
    if 0 < value < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < value < 1 else f"{value:.1%}".replace(".0%", "%")


def tokens(value: int) -> str:
    """Contexts: 2K, 256K, 61,440."""
    return f"{value // 1024}K" if value and value % 1024 == 0 else f"{value:,}"
