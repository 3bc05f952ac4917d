"""Options of an allocation, shared by the commands that take them, and their parsing."""

from pathlib import Path
from typing import Annotated

import typer
from gemma4q_kernels.ggml import GGMLQuantizationType, parse_type
from pydantic import ByteSize, TypeAdapter, ValidationError

from gguf_mixed.allocation import default_types
from gguf_mixed.backends import BACKENDS
from gguf_mixed.errors import InputError
from gguf_mixed.solver import Constraints
from gguf_mixed.sources import NONE, ROLE_PRIOR

Sensitivity = Annotated[
    str,
    typer.Option(
        metavar="SOURCE",
        help=f"A Fisher file (`gguf-mixed fisher`), measured divergences (.csv), {ROLE_PRIOR} or {NONE}.",
    ),
]
Types = Annotated[str | None, typer.Option(metavar="LIST", help="The only types to choose from, as in q4_k,q5_k,q6_k.")]
Backend = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"Only types that are fast on it: {', '.join(BACKENDS)}.")
]
Pin = Annotated[
    list[str] | None, typer.Option(metavar="REGEX=TYPE", help="A type for the tensors that match. Repeatable.")
]
Floor = Annotated[
    list[str] | None, typer.Option(metavar="REGEX=BPW", help="The least bits for tensors that match. Repeatable.")
]
Uniform = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help=r"One type for tensors with equal groups, as ^blk\.(\d+)\.ffn_(?:gate|up)\."),
]
Rows = Annotated[int, typer.Option(min=1, help="Rows measured in each tensor.")]
Seed = Annotated[int, typer.Option(help="Of the draw of rows.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; all cores where not given.")]
Cache = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keeps measured errors; in the user's cache folder by default.")
]
Force = Annotated[bool, typer.Option(help="Take measured divergences that are not clear of their noise.")]


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 14GiB, 9.8GB or a plain number.

    Raises:
        InputError: not a positive size.
    """
    try:
        n_bytes = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        n_bytes = 0
    if n_bytes <= 0:
        raise InputError(f"size {text!r}: expected a positive number with a unit, such as 14GiB or 9.8GB")
    return n_bytes


def parse_constraints(pins: list[str] | None, floors: list[str] | None, uniform: list[str] | None) -> Constraints:
    """What the options of that name demand.

    Raises:
        InputError: not of the form of the option, or an unknown type.
    """
    return Constraints(
        {pattern: _type(value) for pattern, value in _pairs("pin", pins)},
        {pattern: _bits(value) for pattern, value in _pairs("floor", floors)},
        tuple(uniform or ()),
    )


def parse_types(types: str | None, backend: str | None, bpw: float = 0) -> list[GGMLQuantizationType]:
    """The types to choose from; where none are named, those for budgets from `bpw` bits a weight.

    Raises:
        InputError: an unknown type or backend, or nothing is left.
    """
    listed = list(default_types(bpw)) if types is None else [_type(name.strip()) for name in types.split(",")]
    if backend is None:
        return listed
    if backend not in BACKENDS:
        raise InputError(f"backend {backend}: unknown, expected one of {', '.join(BACKENDS)}")
    fast = [qtype for qtype in listed if qtype in BACKENDS[backend]]
    if not fast:
        raise InputError(f"backend {backend}: fast at none of {types}")
    return fast


def _pairs(option: str, values: list[str] | None) -> list[tuple[str, str]]:
    found = []
    for value in values or ():
        pattern, sign, right = value.rpartition("=")
        if not sign or not pattern:
            raise InputError(f"--{option} {value}: expected REGEX=VALUE")
        found.append((pattern, right))
    return found


def _type(name: str) -> GGMLQuantizationType:
    try:
        return parse_type(name)
    except ValueError as error:
        raise InputError(str(error)) from error


def _bits(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"--floor {text}: expected bits a weight") from error
