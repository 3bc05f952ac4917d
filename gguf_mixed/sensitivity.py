"""How much a model's output moves when a tensor's weights do: what makes errors comparable across tensors.

One interface for all sources, `Sensitivity`: expected divergence in nats of storing tensor W as Wq is

    sum over matrices e, rows r, columns c of  rows[e, r] * columns[e, c] * (Wq - W)[e, r, c]^2

where `rows` holds every constant (0.5 / positions of a Fisher estimate included). Without `columns`, the imatrix stands
in for them; without `rows`, all rows weigh the same. A source that knows only what one tensor costs as a whole gives an
`Anchor`: the sum above is then divided by its value at a known point and multiplied by the nats there.

Sources here: `uniform` (no knowledge, the baseline), `role_prior` (not measured), `measured_table`.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from gemma4q_kernels.ggml import GGMLQuantizationType, bits_per_weight, parse_type

from gguf_mixed.errors import InputError
from gguf_mixed.tensors import EMBEDDINGS, OUTPUT, Inventory, Tensor

Floats = npt.NDArray[np.float32]

NOISE_MARGIN = 5
_NOISE_TYPE = GGMLQuantizationType.Q8_0


@dataclass(frozen=True)
class Anchor:
    """What one tensor costs as a whole.

    Attributes:
        nats: divergence at the known point.
        at: the type it was measured at; None: where the error is as large as the weights themselves.
    """

    nats: float
    at: GGMLQuantizationType | None = None

    def written(self, tensor: Tensor) -> GGMLQuantizationType | None:
        """The type that the tensor had at the known point, None where its error was as large as its weights."""
        return None if self.at is None else tensor.written_type(self.at)

    def scaled(self, tensor: Tensor, error: float, reference: float) -> float:
        """The divergence at `error`, when `reference` is the error at the known point.

        Raises:
            InputError: nothing was lost there.
        """
        if not reference > 0:
            at = self.at.name if self.at is not None else "all"
            raise InputError(f"tensor {tensor.name}: loses nothing at {at}, cannot be scaled")
        return self.nats * error / reference


@dataclass(frozen=True, eq=False)
class TensorSensitivity:
    """Sensitivity of one tensor, see the module.

    Attributes:
        rows: float32 [n_matrices, n_rows], or None: all the same.
        columns: float32 [n_matrices, row_length], or None: the imatrix, and without one all the same.
        anchor: scale of the whole tensor, None where `rows` carries it.
    """

    rows: Floats | None = None
    columns: Floats | None = None
    anchor: Anchor | None = None

    def check(self, tensor: Tensor) -> None:
        """Raise InputError unless the marginals are of that tensor, finite and not negative."""
        shapes = {
            "rows": (self.rows, (tensor.n_matrices, rows_of_matrix(tensor))),
            "columns": (self.columns, (tensor.n_matrices, tensor.row_length)),
        }
        for what, (found, expected) in shapes.items():
            if found is None:
                continue
            if found.shape != expected:
                raise InputError(
                    f"sensitivity is of another model: tensor {tensor.name}: got {what} {list(found.shape)}, "
                    f"expected {list(expected)}"
                )
            if not np.isfinite(found).all() or (found < 0).any():
                raise InputError(f"tensor {tensor.name}: sensitivity of {what} is negative or not finite")
        if self.anchor and not (np.isfinite(self.anchor.nats) and self.anchor.nats >= 0):
            raise InputError(f"tensor {tensor.name}: a divergence of {self.anchor.nats} nats, expected 0 or more")


@dataclass(frozen=True)
class Sensitivity:
    """One source.

    Attributes:
        source: for the sidecar and for messages, such as "role prior".
        measured: whether it was measured on a model; False marks numbers whose sum is not a divergence.
        of: sensitivity of a tensor; raises InputError where the source does not cover it.
    """

    source: str
    measured: bool
    of: Callable[[Tensor], TensorSensitivity]


def rows_of_matrix(tensor: Tensor) -> int:
    """Rows of each of a tensor's matrices (experts)."""
    return tensor.n_elements // (tensor.row_length * tensor.n_matrices)


def uniform() -> Sensitivity:
    """Every tensor alike: the plain imatrix-weighted error. Worse across tensors than any stock mix; a baseline."""
    return Sensitivity("none (weighted error)", False, lambda tensor: TensorSensitivity())


# Extra bits that llama.cpp's Q3_K_M and Q4_K_M mixes (`llama_tensor_get_type` in src/llama-quant.cpp, b11434) give a
# role above their base type, mean over the layers of each third and over both mixes. Roles not listed get none.
#   attn_v    Q4_K_M: Q6_K in the first and last eighth and every third layer between; Q3_K_M: Q4_K (its first two
#             layers get Q5_K, left out here: two layers are not a share of the depth)
#   ffn_down  Q4_K_M: the same; Q3_K_M: Q4_K, Q5_K in the first sixteenth
#   attn_output  Q3_K_M: Q4_K;   embeddings and output  Q6_K in both
_EXTRA_BITS = {
    "attn_v": (1.13, 0.88, 1.13),
    "ffn_down": (1.23, 0.88, 1.13),
    "attn_output": (0.53, 0.53, 0.53),
}
_EXTRA_BITS_EMBEDDINGS = 2.59


def role_prior(inventory: Inventory) -> Sensitivity:
    """A prior by role and third of the depth, for when nothing can be measured.

    It reads stock mixes as revealed preference: if their types were optimal, the loss of one more bit would be the same
    everywhere, and with errors that fall fourfold a bit a role that gets b bits more is 4^b times as sensitive a
    weight. Its unit is a share, not nats: only ratios between tensors mean something.
    """
    layers = [tensor.layer for tensor in inventory.tensors.values() if tensor.layer is not None]
    depth = max(layers, default=0) + 1
    total = inventory.n_elements

    def of(tensor: Tensor) -> TensorSensitivity:
        factor = 4.0 ** _extra_bits(tensor, depth)
        return TensorSensitivity(anchor=Anchor(factor * tensor.n_elements / total))

    return Sensitivity("role prior", False, of)


def _extra_bits(tensor: Tensor, depth: int) -> float:
    if tensor.name in EMBEDDINGS or tensor.name == OUTPUT:
        return _EXTRA_BITS_EMBEDDINGS
    role = tensor.role.removesuffix(".weight").removesuffix("_exps")
    if tensor.layer is None or role not in _EXTRA_BITS:
        return 0.0
    return _EXTRA_BITS[role][min(3 * tensor.layer // depth, 2)]


def measured_table(path: Path, force: bool = False) -> Sensitivity:
    """Import measured divergences: a CSV whose rows are types and whose columns are tensors, in nats.

    Layout (Thireus' GGUF-Tool-Suite, kld_results.csv): a first line QTYPE,<tensor>,...; then a type and, for each
    tensor, the divergence when that tensor alone is stored as it. The coarsest type gives the signal; others
    are predicted from it. Q8_0 hardly changes a tensor, so what is measured there is the noise of the measurement.

    Args:
        path: the file.
        force: take a table whose noise is unknown or too near its signal.

    Raises:
        InputError: unreadable or another layout, an unknown type, a number that cannot be, or (unless forced) noise
            within NOISE_MARGIN of the signal.
    """
    table = _read_table(path)
    found = table.pop(_NOISE_TYPE, None)
    # What comes out below zero there is as far off as what comes out above.
    floor = None if found is None else {name: abs(value) for name, value in found.items()}
    if not table:
        raise InputError(f"{path.name}: no type coarser than {_NOISE_TYPE.name}")
    at = min(table, key=bits_per_weight)
    if not force:
        _check_noise(path, table[at], floor)
    nats = _above_noise(path, table[at], floor or {})

    def of(tensor: Tensor) -> TensorSensitivity:
        if tensor.name not in nats:
            raise InputError(f"{path.name}: no divergence for tensor {tensor.name}")
        return TensorSensitivity(anchor=Anchor(nats[tensor.name], at))

    return Sensitivity(f"measured at {at.name} ({path.name}{', noise not checked' if force else ''})", True, of)


def _above_noise(path: Path, signal: Mapping[str, float], floor: Mapping[str, float]) -> dict[str, float]:
    """A mean of noisy log-ratios may come out at zero or below, and no tensor is free: the least is the noise."""
    noise = median(floor.values()) if floor else 0.0
    least = noise or min((value for value in signal.values() if value > 0), default=0.0)
    if not least:
        raise InputError(f"{path.name}: no divergence is above zero")
    return {name: max(value, least) for name, value in signal.items()}


def _check_noise(path: Path, signal: Mapping[str, float], floor: Mapping[str, float] | None) -> None:
    if floor is None:
        raise InputError(f"{path.name}: no {_NOISE_TYPE.name} row: its noise cannot be told from its signal")
    middle, noise = median(signal.values()), median(floor.values())
    if middle <= NOISE_MARGIN * noise:
        raise InputError(
            f"{path.name}: median divergence {middle:.3g} at the coarsest type and {noise:.3g} at {_NOISE_TYPE.name}: "
            f"noise within {NOISE_MARGIN}x of the signal"
        )


def _read_table(path: Path) -> dict[GGMLQuantizationType, dict[str, float]]:
    try:
        with path.open(newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name}: cannot be read: {error}") from error
    if len(lines) < 2 or lines[0][0] != "QTYPE" or len(set(lines[0])) != len(lines[0]) or len(lines[0]) < 2:
        raise InputError(f"{path.name}: expected a first line QTYPE,<tensor>,... of distinct names, then one a type")
    names = lines[0][1:]
    table: dict[GGMLQuantizationType, dict[str, float]] = {}
    for line in lines[1:]:
        try:
            qtype, values = parse_type(line[0]), [float(value) for value in line[1:]]
        except ValueError as error:
            raise InputError(f"{path.name}: {error}") from error
        if qtype in table or len(values) != len(names):
            raise InputError(f"{path.name}: {line[0]}: {len(values)} values for {len(names)} tensors, or a second time")
        if not np.isfinite(values).all():
            raise InputError(f"{path.name}: {line[0]}: a divergence is not finite")
        table[qtype] = dict(zip(names, values, strict=True))
    return table
