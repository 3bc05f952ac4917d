"""Statistics files: what entered each linear, and what the router chose, over all samples of a calibration.

Layout: safetensors. A linear is named by its module, that of the weight in the Hugging Face checkpoint:
`model.language_model.layers.0.self_attn.q_proj`, fused experts `model.language_model.layers.0.experts.gate_up_proj`
(also where the checkpoint stores experts one by one), the output layer `lm_head` (also where it is tied). n is the
number of matrices, experts or 1; columns are input channels.

    NAME.input_absmax       F32 [n, in]    largest magnitude of a channel; of a tensor: the largest of these
    NAME.input_sum          F64 [n, in]
    NAME.input_sum_squares  F64 [n, in]    divided by the count, the second moment: an imatrix
    NAME.input_count        I64 [n]        tokens; of experts, tokens routed to each
    NAME.input_histogram    I64 [n, 322]   counts of |x|, see `histogram_edges`
    NAME.input_hessian      F32 [in, in]   only on demand: sum of x x^T; of experts, over all of them together

Linears that read the same activations (q, k and v; gate and up) share one set: it is stored under the first of them,
and the metadata's `stored_as` maps every linear to the name its set has in the file. `Statistics` resolves it.

    EXPERTS.count, .gate_sum, ..                  one per MoE layer, EXPERTS = `..layers.0.experts`: see `Routing`
    samples.text   I32 [samples]                  which of the metadata's texts the sample was cut from
    samples.tokens I32 [samples]

Metadata: `format`, `details` (JSON: samples, tokens, framing, texts with SHA-256, model, versions) and `stored_as`
(JSON). Not done: merging files of several runs, parameters of norms and embeddings.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gguf_mixed import strict_json
from gguf_mixed.atomic_file import write_file
from vllm_gemma4q.errors import InputError, ReadError, reading

Array = npt.NDArray[Any]

FORMAT = "gemma4q statistics 1"
LM_HEAD = "lm_head"
BINS_PER_OCTAVE = 8
LOWEST_OCTAVE, HIGHEST_OCTAVE = -24, 16
N_BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE + 2

HESSIAN = "input_hessian"
_SAMPLES = ("samples.text", "samples.tokens")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What entered one linear; see the module's docstring for shapes and dtypes."""

    absmax: Array
    sum: Array
    sum_squares: Array
    count: Array
    histogram: Array

    @property
    def second_moment(self) -> Array:
        """float64 [n, in]: mean square of each channel, 0 where nothing entered."""
        return np.asarray(self.sum_squares / np.maximum(self.count, 1)[:, None])


@dataclass(frozen=True, eq=False)
class Routing:
    """What the router of one MoE layer chose, and what its experts answered. E experts, S samples.

    f is an expert's output for a token it was chosen for; g its gate: softmax over all experts, the chosen ones'
    renormalised to 1, times `per_expert_scale`.

    Attributes:
        count: I64 [E], tokens routed.
        probability_sum: F64 [E], softmax over all tokens, chosen or not.
        gate_sum: F64 [E], sum of g.
        norm_sum: F64 [E], sum of ||f|| (MAN: over count).
        norm_square_sum: F64 [E], sum of ||f||^2 (MSAN: over count).
        norm_max: F32 [E], largest ||f||.
        gated_norm_sum: F64 [E], sum of g ||f|| (REAP: over count).
        contribution_sum: F64 [E], sum of s g ||f||, s the token's share in EASY-EP: 1 - cos(x, x + y), x what enters
            the feed-forward block and y what `post_feedforward_layernorm_2` makes of all experts' sum.
        sample_count: I32 [S, E], tokens routed, by sample.
        sample_gated_norm: F32 [S, E], Frobenius norm of all g f of a sample: `wnorm` of recipes v3 to v5, which are
            sums over samples, and over samples of one class.
    """

    count: Array
    probability_sum: Array
    gate_sum: Array
    norm_sum: Array
    norm_square_sum: Array
    norm_max: Array
    gated_norm_sum: Array
    contribution_sum: Array
    sample_count: Array
    sample_gated_norm: Array


_DTYPES: Mapping[type, Mapping[str, str]] = {
    Inputs: {
        "absmax": "float32",
        "sum": "float64",
        "sum_squares": "float64",
        "count": "int64",
        "histogram": "int64",
    },
    Routing: {
        **dict.fromkeys((field.name for field in fields(Routing)), "float64"),
        "count": "int64",
        "norm_max": "float32",
        "sample_count": "int32",
        "sample_gated_norm": "float32",
    },
}


class Statistics:
    """One statistics file. Nothing but the header is read before it is asked for.

    Attributes:
        details: how it was made: `samples`, `tokens`, `framing`, `texts`, `model` and so on.
        modules: every linear that has a set of inputs.
        experts: every MoE layer's `..experts`.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], names: frozenset[str]):
        self.path = path
        try:
            self.details: Mapping[str, Any] = strict_json.parse(metadata["details"].encode())
            self._stored_as: Mapping[str, str] = strict_json.parse(metadata["stored_as"].encode())
        except (KeyError, ValueError) as error:
            raise InputError(f"{path.name}: damaged metadata: {error}") from error
        if not isinstance(self.details, dict) or not isinstance(self._stored_as, dict):
            raise InputError(f"{path.name}: damaged metadata: details and stored_as must be objects")
        self._names = names
        self.modules = tuple(self._stored_as)
        self.experts = tuple(sorted(name.removesuffix(".gate_sum") for name in names if name.endswith(".gate_sum")))
        for module in self.modules:
            for name in tensor_names(self._stored_as[module], Inputs):
                if name not in names:
                    raise InputError(f"{path.name}: tensor {name}: missing")

    def inputs(self, module: str) -> Inputs:
        """Raises InputError: the file has nothing for that linear, or something that cannot be."""
        found: Inputs = self._read(self._stored(module), Inputs)
        shape = found.absmax.shape
        shapes = (found.sum.shape, found.sum_squares.shape, found.count.shape, found.histogram.shape)
        if len(shape) != 2 or shapes != (shape, shape, shape[:1], (shape[0], N_BINS)):
            raise InputError(f"{self.path.name}: inputs of {module}: got shapes {shape}, {shapes}")
        if not all(np.isfinite(array).all() for array in (found.absmax, found.sum, found.sum_squares)):
            raise InputError(f"{self.path.name}: inputs of {module}: not finite")
        return found

    def hessian(self, module: str) -> Array | None:
        """float32 [in, in], None where the file was made without."""
        name = f"{self._stored(module)}.{HESSIAN}"
        return self._tensor(name) if name in self._names else None

    def hessian_shape(self, module: str) -> tuple[int, ...] | None:
        """From the header alone; None where the file was made without."""
        name = f"{self._stored(module)}.{HESSIAN}"
        if name not in self._names:
            return None
        with reading(self.path), safe_open(self.path, "numpy") as file:
            return tuple(file.get_slice(name).get_shape())

    def routing(self, experts: str) -> Routing:
        """Raises InputError: the file has nothing for that layer."""
        if experts not in self.experts:
            raise InputError(f"{self.path.name}: statistics of another model: no routing of {experts}")
        found: Routing = self._read(experts, Routing)
        return found

    def samples(self) -> tuple[Array, Array]:
        """int32 [samples] each: the text that a sample was cut from, an index into `details["texts"]`; its tokens."""
        text, tokens = (self._tensor(name) for name in _SAMPLES)
        return text, tokens

    def _stored(self, module: str) -> str:
        if module not in self._stored_as:
            raise InputError(f"{self.path.name}: statistics of another model: nothing for {module}")
        return self._stored_as[module]

    def _read(self, name: str, kind: type) -> Any:
        return kind(
            *(
                self._tensor(tensor, dtype)
                for tensor, dtype in zip(tensor_names(name, kind), _DTYPES[kind].values(), strict=True)
            )
        )

    def _tensor(self, name: str, dtype: str | None = None) -> Array:
        try:
            with reading(self.path), safe_open(self.path, "numpy") as file:
                array: Array = file.get_tensor(name)
        except (SafetensorError, ValueError) as error:  # of numpy: a shape with 0 too large without it
            raise InputError(f"{self.path.name}: tensor {name}: cannot be read: {error}") from error
        if dtype is not None and array.dtype != dtype:
            raise InputError(f"{self.path.name}: tensor {name}: got {array.dtype}, expected {dtype}")
        return array


def read_statistics(path: Path) -> Statistics:
    """Open a file.

    Raises:
        InputError: unreadable, truncated, of another kind, or a linear without all its arrays.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata, names = file.metadata() or {}, frozenset(file.keys())
    except (OSError, SafetensorError) as error:
        kind = ReadError if isinstance(error, OSError) else InputError
        raise kind(f"{path.name}: cannot be read as a statistics file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path.name}: got format {metadata.get('format')}, expected {FORMAT}")
    return Statistics(path, metadata, names)


def write_statistics(
    path: Path, arrays: Mapping[str, Array], stored_as: Mapping[str, str], details: Mapping[str, object]
) -> None:
    """Write a file that fits in memory twice; it appears only when it is complete. Raises InputError: see `write_file`.

    Args:
        arrays: by name in the file, see `as_arrays`.
        stored_as: from every linear to the name of its set.
        details: JSON values.
    """
    write_file(path, save(dict(arrays), metadata(stored_as, details)))


def metadata(stored_as: Mapping[str, str], details: Mapping[str, object]) -> dict[str, str]:
    """The file's metadata."""
    return {
        "format": FORMAT,
        "details": json.dumps(dict(details), sort_keys=True),
        "stored_as": json.dumps(dict(stored_as)),
    }


def as_arrays(name: str, found: Inputs | Routing, hessian: Array | None = None) -> dict[str, Array]:
    """One set's arrays by their names in the file, in the file's dtypes."""
    names, dtypes = tensor_names(name, type(found)), _DTYPES[type(found)].items()
    arrays = {
        tensor: np.ascontiguousarray(getattr(found, field), dtype)
        for tensor, (field, dtype) in zip(names, dtypes, strict=True)
    }
    return arrays if hessian is None else {**arrays, f"{name}.{HESSIAN}": np.ascontiguousarray(hessian, "float32")}


def tensor_names(name: str, kind: type) -> list[str]:
    """Names in the file of one set's arrays, in the order of `kind`'s fields."""
    prefix = f"{name}.input_" if kind is Inputs else f"{name}."
    return [prefix + field.name for field in fields(kind)]


def histogram_edges() -> Array:
    """float64 [321]: bin 0 counts |x| < edges[0], bin i edges[i - 1] <= |x| < edges[i], the last one the rest.

    Eight bins an octave from 2^-24 to 2^16, equally wide within it: a bin is an exponent and the first three bits
    behind the point, so that a value's bin is a shift of its bits.
    """
    octaves = 2.0 ** np.arange(LOWEST_OCTAVE, HIGHEST_OCTAVE)
    steps = 1 + np.arange(BINS_PER_OCTAVE) / BINS_PER_OCTAVE
    return np.append(np.outer(octaves, steps).ravel(), 2.0**HIGHEST_OCTAVE)
