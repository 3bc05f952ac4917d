r"""Override tables: one line a tensor, in the form that `llama-quantize --tensor-type-file` applies exactly.

Layout: `^blk\.0\.attn_q\.weight$=iq4_nl`, nothing else. llama-quantize searches its patterns unanchored, lower-cases
them, splits the file at white space and a line at its first `=`, and knows no comments; so every name is anchored and
escaped, and provenance goes to a sidecar (`sidecar`). Anchored distinct names are disjoint: order decides nothing.

Every tensor that llama-quantize would quantize is listed, `token_embd` and `output` too. Their own options
(`--token-embedding-type`, `--output-tensor-type`) are not used: they beat the patterns and skip the substitution for
rows that do not fit, so a type that does not fit aborts half-way. A listed tensor also never follows the
output's type, as tied embeddings otherwise do. Types are those written: where rows do not fit the requested type, its
substitute is listed, since builds before #14995 stop at an override that has to fall back.

Source: src/llama-quant.cpp and tools/quantize/quantize.cpp, b11434. Not done: patterns over several tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma4q_kernels.ggml import GGMLQuantizationType, parse_type, type_name

from gguf_mixed.errors import InputError
from gguf_mixed.tensors import Inventory, RequestedTypes

_SPECIAL = re.compile(r"([\\^$.|?*+()\[\]{}])")  # ECMAScript's
_LINE = re.compile(r"\^(?P<name>.+)\$=(?P<type>[^=]+)")
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class OverrideTable:
    """The type of each tensor, in the table's order.

    Raises:
        InputError: a name that no pattern can carry: white space, `=`, or upper case.
    """

    types: Mapping[str, GGMLQuantizationType]

    def __post_init__(self) -> None:
        for name in self.types:
            if re.search(r"[\s=]", name) or name != name.lower():
                raise InputError(f"tensor {name}: no override can name it: white space, = or upper case")

    @property
    def lines(self) -> tuple[str, ...]:
        """`pattern=type`, as given to --tensor-type."""
        return tuple(f"^{_escape(name)}$={type_name(qtype)}" for name, qtype in self.types.items())

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


def override_table(inventory: Inventory, requested: RequestedTypes) -> OverrideTable:
    """The table that makes llama-quantize write `requested`, substitutes resolved; outer tensors first, then blocks.

    Raises:
        InputError: a quantizable tensor is missing; a tensor that is never quantized or does not exist is listed;
            see `Tensor.written_type`.
    """
    check_complete(inventory, requested)
    tensors = inventory.tensors
    return OverrideTable({name: tensors[name].written_type(requested[name]) for name in sorted(requested, key=_order)})


def check_complete(inventory: Inventory, requested: RequestedTypes) -> None:
    """Check that exactly the quantizable tensors of a model are listed.

    Raises:
        InputError: see `override_table`.
    """
    for name in requested:
        tensor = inventory.tensors.get(name)
        if tensor is None:
            raise InputError(f"tensor {name}: assigned a type, but {inventory.path.name} has no such tensor")
        if tensor.kept_because:
            raise InputError(f"tensor {name}: assigned a type, but is never quantized ({tensor.kept_because})")
    missing = [name for name, tensor in inventory.tensors.items() if not tensor.kept_because and name not in requested]
    if missing:
        raise InputError(f"tensor {missing[0]}: no type assigned ({len(missing)} tensors of {inventory.path.name})")


def parse_overrides(text: str, source: str) -> OverrideTable:
    """Read a table back. `source` names it in errors.

    Raises:
        InputError: a line that is not anchored, escaped and one tensor, a comment, an unknown type, a tensor twice.
    """
    types: dict[str, GGMLQuantizationType] = {}
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{source}:{number}"
        if line.lstrip().startswith("#"):
            raise InputError(f"{where}: a comment: llama-quantize stops at it")
        match = _LINE.fullmatch(line)
        name = _unescape(match["name"]) if match else None
        if match is None or name is None:
            raise InputError(rf"{where}: got {line!r}, expected one tensor, as in ^blk\.0\.attn_q\.weight$=iq4_nl")
        if name in types:
            raise InputError(f"{where}: tensor {name} is listed twice")
        try:
            types[name] = parse_type(match["type"])
        except ValueError as error:
            raise InputError(f"{where}: tensor {name}: {error}") from error
    if not types:
        raise InputError(f"{source}: an empty override table")
    return OverrideTable(types)


def read_overrides(path: Path) -> OverrideTable:
    """Read a table from a file.

    Raises:
        InputError: unreadable, or see `parse_overrides`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path.name}: cannot be read: {reason}") from error
    return parse_overrides(text, path.name)


def _escape(name: str) -> str:
    return _SPECIAL.sub(r"\\\1", name)


def _unescape(pattern: str) -> str | None:
    """The one name that a pattern matches, None where it is not a plain escaped name."""
    name = re.sub(r"\\(.)", r"\1", pattern)
    return name if _escape(name) == pattern and not re.search(r"\s", name) else None


def _order(name: str) -> tuple[int, str]:
    match = _BLOCK.match(name)
    return (int(match[1]) if match else -1, name)
