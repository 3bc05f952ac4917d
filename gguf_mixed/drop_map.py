"""Which experts of each layer of a mixture stay: the published JSON of dropped ids, in and out.

    {"0": [3, 17, 40], "1": [0, 9], ..}      layer -> ids of dropped experts, ascending

One entry for every layer with experts, empty where all of them stay. Kept experts keep their order and are numbered
anew from 0. Beside a map lies `<name>.summary.json`: how it was made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import write_file
from gguf_mixed.errors import InputError


@dataclass(frozen=True)
class RetainedExperts:
    """What a drop map leaves of a model.

    Attributes:
        num_experts: of every layer, before.
        kept: by layer, ids of the experts that stay, ascending.
    """

    num_experts: int
    kept: tuple[tuple[int, ...], ...]

    @classmethod
    def all_of(cls, num_experts: int, n_layers: int) -> Self:
        """Nothing is dropped."""
        return cls(num_experts, (tuple(range(num_experts)),) * n_layers)

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts that stay, by layer."""
        return tuple(map(len, self.kept))

    @property
    def is_uniform(self) -> bool:
        """Whether every layer keeps as many."""
        return len(set(self.counts)) == 1

    @property
    def dropped(self) -> tuple[tuple[int, ...], ...]:
        """By layer, ids of the experts that go, ascending."""
        return tuple(tuple(sorted({*range(self.num_experts)} - {*kept})) for kept in self.kept)

    def to_json(self) -> dict[str, list[int]]:
        """The drop map."""
        return {str(layer): list(ids) for layer, ids in enumerate(self.dropped)}


def read_drop_map(path: Path, num_experts: int, n_layers: int, top_k: int) -> RetainedExperts:
    """Read a drop map for a model.

    Args:
        num_experts: of every layer of the model.
        top_k: experts a token; as many must stay in each layer.

    Raises:
        InputError: unreadable, layers missing or unknown, ids out of range or repeated, fewer than `top_k` left.
    """
    try:
        dropped = strict_json.parse(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise InputError(f"{path.name}: not a drop map: {error}") from error
    try:
        return retained_of(dropped, num_experts, n_layers, top_k)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from error


def retained_of(dropped: Any, num_experts: int, n_layers: int, top_k: int) -> RetainedExperts:
    """What a parsed drop map leaves. Raises InputError like `read_drop_map`."""
    if not isinstance(dropped, Mapping):
        raise InputError(f"got {type(dropped).__name__}, expected an object of layers")
    unknown = set(dropped) - {str(layer) for layer in range(n_layers)}
    if unknown:
        raise InputError(f"layer {min(unknown)!r}: the model has layers 0..{n_layers - 1}")
    kept = []
    for layer in range(n_layers):
        if str(layer) not in dropped:
            raise InputError(f"layer {layer}: missing, expected a list of dropped experts for each of {n_layers}")
        kept.append(_kept(layer, dropped[str(layer)], num_experts, top_k))
    return RetainedExperts(num_experts, tuple(kept))


def _kept(layer: int, ids: Any, num_experts: int, top_k: int) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise InputError(f"layer {layer}: got {ids!r}, expected a list of dropped experts")
    for expert in ids:
        if not isinstance(expert, int) or isinstance(expert, bool) or not 0 <= expert < num_experts:
            raise InputError(f"layer {layer}: got expert {expert!r}, expected 0..{num_experts - 1}")
    if len(set(ids)) != len(ids):
        repeated = next(expert for expert in ids if list(ids).count(expert) > 1)
        raise InputError(f"layer {layer}: expert {repeated} is listed twice")
    if num_experts - len(ids) < max(top_k, 1):
        left = num_experts - len(ids)
        raise InputError(
            f"layer {layer}: {left} of {num_experts} experts left, expected at least {max(top_k, 1)} (top_k)"
        )
    return tuple(expert for expert in range(num_experts) if expert not in set(ids))


def summary_path(path: Path) -> Path:
    """Where the summary of a drop map lies: `drop.json` -> `drop.summary.json`."""
    return path.with_name(f"{path.stem}.summary.json")


def write_drop_map(path: Path, retained: RetainedExperts, summary: Mapping[str, Any]) -> None:
    """Write a drop map and, beside it, how it was made; the map last, each under its name only when it is whole.

    Raises:
        InputError: the folder is not there or cannot be written to.
    """
    counts = {"num_experts": retained.num_experts, "kept_per_layer": list(retained.counts)}
    write_file(summary_path(path), json.dumps({**counts, **summary}, indent=2) + "\n")
    lines = [f"{json.dumps(layer)}: {json.dumps(ids)}" for layer, ids in retained.to_json().items()]
    write_file(path, "{\n" + ",\n".join(f"  {line}" for line in lines) + "\n}\n")
