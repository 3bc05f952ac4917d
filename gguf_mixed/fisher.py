"""Fisher files: how much the output distribution moves with each weight, as marginals over rows and columns.

To second order, moving weights by d changes the next-token distribution by a divergence of 0.5 * sum F d^2 nats a
position, F being the diagonal Fisher information: the expected squared gradient of log p(label) for labels drawn from
the model's own distribution (Kunstner et al. 2019, arXiv:1905.12558, on why not the text's labels). F is kept at rank
one, row sums times column sums over the total; on a real 270M model that orders tensors as measured divergence does.

Layout: safetensors, F32. For each tensor NAME (GGUF name) `NAME.rows` [n_matrices, n_rows] and `NAME.columns`
[n_matrices, row_length], sums of squared gradients over all positions. Metadata: format, positions, and how it
was made. Sums of two files over different text add up. Computing them: `backward`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import write_file
from gguf_mixed.errors import InputError
from gguf_mixed.sensitivity import Sensitivity, TensorSensitivity
from gguf_mixed.tensors import Tensor

Floats = npt.NDArray[np.float32]

FORMAT = "gguf-mixed fisher 1"


@dataclass(frozen=True, eq=False)
class Marginals:
    """Sums of squared gradients of one tensor: `rows` float32 [n_matrices, n_rows], `columns` float32 [n_matrices,
    row_length]. Both have one total a matrix."""

    rows: Floats
    columns: Floats


@dataclass(frozen=True, eq=False)
class Fisher:
    """Marginals by GGUF tensor name.

    Attributes:
        positions: tokens whose label was drawn.
        details: how it was made, for the sidecar: text, framing, seed and so on.
    """

    marginals: Mapping[str, Marginals]
    positions: int
    details: Mapping[str, object] = field(default_factory=dict)


def write_fisher(path: Path, fisher: Fisher) -> None:
    """Write a file; it appears only when it is complete. Raises InputError: see `write_file`."""
    arrays = {
        f"{name}.{part}": np.ascontiguousarray(getattr(found, part), np.float32)
        for name, found in fisher.marginals.items()
        for part in ("rows", "columns")
    }
    write_file(path, save(arrays, metadata(fisher.positions, fisher.details)))


def metadata(positions: int, details: Mapping[str, object]) -> dict[str, str]:
    """The file's metadata."""
    return {"format": FORMAT, "positions": str(positions), "details": json.dumps(dict(details))}


def read_fisher(path: Path) -> Fisher:
    """Read a file.

    Raises:
        InputError: another kind of file, or a marginal without its partner or of another shape.
    """
    try:
        with safe_open(path, "numpy") as file:
            found = file.metadata() or {}
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:  # of numpy: a shape with 0 that is too large without it
        raise InputError(f"{path.name}: cannot be read as a Fisher file: {error}") from error
    if found.get("format") != FORMAT:
        raise InputError(f"{path.name}: got format {found.get('format')}, expected {FORMAT}")
    try:
        positions, details = int(found["positions"]), strict_json.parse(found["details"].encode())
    except (KeyError, ValueError) as error:
        raise InputError(f"{path.name}: damaged metadata: {error}") from error
    if not 1 <= positions < 2**63:
        raise InputError(f"{path.name}: got {positions} positions, expected 1 to 2^63")
    if not isinstance(details, dict):
        raise InputError(f"{path.name}: damaged metadata: details are {type(details).__name__}, expected an object")
    tensors = dict.fromkeys(name.removesuffix(".rows").removesuffix(".columns") for name in arrays)
    return Fisher({name: _marginals(path, name, arrays) for name in tensors}, positions, details)


def fisher_sensitivity(fisher: Fisher) -> Sensitivity:
    """The expected divergence of `Sensitivity`, in nats a position.

    A matrix that no gradient reached (an expert that was never chosen) counts as the mean of its tensor's others:
    no data is not a proof that it does not matter.
    """

    def of(tensor: Tensor) -> TensorSensitivity:
        found = fisher.marginals.get(tensor.name)
        if found is None:
            raise InputError(f"Fisher file is of another model: nothing for tensor {tensor.name}")
        totals = found.columns.sum(axis=1, keepdims=True, dtype=np.float64)
        seen = totals[:, 0] > 0
        if not seen.any():
            return TensorSensitivity(np.zeros_like(found.rows), np.zeros_like(found.columns))
        rows, columns = found.rows.astype(np.float64), found.columns / np.where(totals > 0, totals, 1)
        rows[~seen], columns[~seen] = rows[seen].mean(axis=0), columns[seen].mean(axis=0)
        return TensorSensitivity((0.5 / fisher.positions * rows).astype(np.float32), columns.astype(np.float32))

    return Sensitivity(f"Fisher, {fisher.positions:,} positions", True, of)


def _marginals(path: Path, name: str, arrays: Mapping[str, Floats]) -> Marginals:
    parts = [arrays.get(f"{name}.{part}") for part in ("rows", "columns")]
    rows, columns = parts
    if rows is None or columns is None:
        raise InputError(f"{path.name}: tensor {name}: expected rows and columns, got one of them")
    for array in (rows, columns):
        if array.dtype != np.float32 or array.ndim != 2 or len(array) != len(rows):
            raise InputError(f"{path.name}: tensor {name}: got {array.dtype} {list(array.shape)}, expected F32 [n, m]")
        if not np.isfinite(array).all() or (array < 0).any():
            raise InputError(f"{path.name}: tensor {name}: negative or not finite")
    return Marginals(rows, columns)
