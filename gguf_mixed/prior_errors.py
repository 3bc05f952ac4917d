"""An error table without weights: what each type loses on normally distributed weights, for models of which only the
header is at hand.

The table of relative errors is the squared error over the squared weights, measured with ggml's quantizers (llama.cpp
b11434) without an imatrix and with a flat one:

    rows = np.random.default_rng(0).standard_normal((2048, 1024), dtype=np.float32)
    for weights in (None, np.ones(1024, np.float32)):
        difference = quantizers.round_trip(rows, qtype, weights) - rows
        print(np.square(difference, dtype=float).sum() / np.square(rows, dtype=float).sum())

It is known to 0.15 percent (standard error over rows). Real weights have heavier tails and a real imatrix is not flat,
so this orders types of one tensor well and says nothing of how tensors differ: that is left to the sensitivity.
Not done: sensitivities by row or column (Fisher), whose unit needs the size of the weights.
"""

from collections.abc import Sequence

from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType

from gguf_mixed.error_table import ErrorRow, ErrorTable, Pins, check_source, usable_types
from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.sensitivity import Sensitivity, TensorSensitivity, rows_of_matrix
from gguf_mixed.tensors import Inventory, Tensor

SOURCE = "prior: no weights in the file"

# Without an imatrix (None where the type needs one), with a flat one.
_RELATIVE_ERRORS: dict[str, tuple[float | None, float]] = {
    "Q1_0": (0.361, 0.361), "IQ1_S": (None, 0.236), "TQ1_0": (0.652, 0.652), "IQ1_M": (0.338, 0.204),
    "IQ2_XXS": (None, 0.118), "TQ2_0": (0.652, 0.652), "IQ2_XS": (None, 0.0898), "IQ2_S": (0.0702, 0.0620),
    "Q2_K": (0.0881, 0.0719), "IQ3_XXS": (0.0455, 0.0330), "Q3_K": (0.0228, 0.0209), "IQ3_S": (0.0276, 0.0187),
    "IQ4_XS": (0.00589, 0.00572), "MXFP4": (0.0132, 0.0132), "Q4_0": (0.00739, 0.00668), "Q4_K": (0.00510, 0.00501),
    "IQ4_NL": (0.00581, 0.00562), "NVFP4": (0.00904, 0.00904), "Q4_1": (0.00613, 0.00489),
    "Q5_0": (0.00183, 0.00164), "Q5_K": (0.00131, 0.00125), "Q5_1": (0.00143, 0.00114), "Q6_K": (3.15e-4, 3.00e-4),
    "Q8_0": (2.87e-5, 2.87e-5), "F16": (4.32e-8, 4.32e-8), "BF16": (2.76e-6, 2.76e-6), "F32": (0.0, 0.0),
}  # fmt: skip


def relative_error(qtype: GGMLQuantizationType, weighted: bool) -> float:
    """Squared error over squared weights of normally distributed weights stored as `qtype`.

    Args:
        qtype: a type.
        weighted: whether there is an imatrix; one is taken for granted where the type cannot do without.

    Raises:
        InputError: it was not measured.
    """
    if qtype.name not in _RELATIVE_ERRORS:
        raise InputError(f"{qtype.name}: its error was not measured, and there are no weights to measure it on")
    plain, flat = _RELATIVE_ERRORS[qtype.name]
    return flat if weighted or plain is None else plain


def prior_errors(
    inventory: Inventory,
    sensitivity: Sensitivity,
    imatrix: Imatrix | None = None,
    types: Sequence[GGMLQuantizationType] | None = None,
    pins: Pins | None = None,
) -> ErrorTable:
    """The table that `measure` would give if all weights of a tensor were drawn from one normal distribution.

    Args:
        inventory: a model of F32, F16 or BF16; its weights are not read.
        sensitivity: one that knows what a tensor costs as a whole, or nothing.
        imatrix: which tensors have data, and the weight of each column where the sensitivity knows nothing.
        types: only these, or what llama-quantize writes in their place where rows do not fit; None for all.
        pins: see `Pins`.

    Raises:
        InputError: weights of another type, an imatrix or sensitivity of another model, a sensitivity by row or column,
            or a tensor that no type is left for.
    """
    check_source(inventory, imatrix)
    known = [qtype for qtype in QUANTIZABLE_TYPES if qtype.name in _RELATIVE_ERRORS]
    rows = []
    for tensor in inventory.tensors.values():
        if tensor.kept_because:
            continue
        found = sensitivity.of(tensor)
        found.check(tensor)
        if found.rows is not None or found.columns is not None:
            raise InputError(
                f"{inventory.path.name}: holds no weights, only a header: sensitivity {sensitivity.source} needs them"
            )
        weighted = imatrix is not None and imatrix.weights_of(tensor) is not None
        scale = _scale(tensor, found, imatrix, weighted)
        for qtype in usable_types(tensor, known if types is None else types, weighted, known, pins):
            lost = 0.0 if qtype is tensor.qtype else relative_error(qtype, weighted)
            rows.append(ErrorRow(tensor.name, qtype, tensor.bytes_as(qtype), scale * lost))
    return ErrorTable(rows)


def _scale(tensor: Tensor, sensitivity: TensorSensitivity, imatrix: Imatrix | None, weighted: bool) -> float:
    """What an error as large as the weights costs; without an anchor, their mean square is taken for 1."""
    if sensitivity.anchor:
        at = sensitivity.anchor.written(tensor)
        return sensitivity.anchor.scaled(tensor, 1.0, 1.0 if at is None else relative_error(at, weighted))
    weights = imatrix.weights_of(tensor) if imatrix else None
    return float(tensor.n_elements if weights is None else rows_of_matrix(tensor) * weights.sum(dtype=float))
