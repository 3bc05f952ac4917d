"""Importance matrices: sums of squares of what enters each tensor, per input channel and per expert.

Files are read and written by `imatrix_gguf` and `imatrix_legacy`; `read_imatrix` tells them apart. llama-quantize uses
`sums / counts` as the weight of a channel, and 1 for a matrix that was never used. Merging several files is left to
`llama-imatrix --in-file`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gguf_mixed.errors import InputError
from gguf_mixed.tensors import EMBEDDINGS, Inventory, Tensor

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
ExpertsToKeep = Callable[[str], Sequence[int] | None]


@dataclass(frozen=True, eq=False)
class ImatrixEntry:
    """What one tensor saw.

    Attributes:
        sums: float32 [n_matrices, row_length], sum of squared inputs. One row may hold several matrices end to end
            where the file kept one count for all of them: legacy files, and 3-D tensors that are not experts.
        counts: int64 [n_matrices], inputs summed: tokens, in a legacy file chunks.
        totals: float32 like `sums`, sum of the inputs themselves, None in older files.
    """

    sums: Floats
    counts: Integers
    totals: Floats | None = None

    def __post_init__(self) -> None:
        if self.sums.ndim != 2 or self.counts.shape != self.sums.shape[:1] or not self.sums.size:
            raise InputError(f"sums {list(self.sums.shape)} and counts {list(self.counts.shape)} do not fit together")
        if self.totals is not None and self.totals.shape != self.sums.shape:
            raise InputError(f"sums {list(self.sums.shape)} and totals {list(self.totals.shape)} do not fit together")
        if not np.isfinite(self.sums).all() or (self.sums < 0).any():
            raise InputError("a sum of squares is negative or not finite")
        if (self.counts < 0).any():
            raise InputError("a count is negative")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImatrixEntry):
            return NotImplemented
        same_totals = (
            np.array_equal(self.totals, other.totals, equal_nan=True)
            if self.totals is not None and other.totals is not None
            else self.totals is other.totals
        )
        return np.array_equal(self.sums, other.sums) and np.array_equal(self.counts, other.counts) and same_totals

    @property
    def weights(self) -> Floats:
        """float32 [n_matrices, row_length]: the weights as llama-quantize computes them."""
        counts = self.counts[:, None].astype(np.float32)
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)

    @property
    def never_used(self) -> tuple[int, ...]:
        """Matrices (experts) without data."""
        return tuple(int(index) for index in np.flatnonzero(self.counts == 0))

    def slice(self, keep: Sequence[int], n_matrices: int | None = None) -> "ImatrixEntry":
        """The matrices `keep`, in that order.

        Args:
            keep: indices of the matrices.
            n_matrices: how many the entry holds; needed where the file kept one count for all.

        Raises:
            InputError: an index does not exist, is repeated, or the sums do not divide into that many matrices.
        """
        total = n_matrices or len(self.counts)
        if len(set(keep)) != len(keep) or not keep or min(keep) < 0 or max(keep) >= total:
            raise InputError(f"cannot keep {list(keep)} of {total} matrices: ids must be distinct and exist")
        if len(self.counts) not in (1, total) or self.sums.size % total:
            raise InputError(f"sums {list(self.sums.shape)} do not divide into {total} matrices")
        ids = list(keep)
        counts = self.counts if len(self.counts) == 1 and total > 1 else self.counts[ids]
        shape = (len(counts), -1)
        return ImatrixEntry(
            self.sums.reshape(total, -1)[ids].reshape(shape),
            counts,
            None if self.totals is None else self.totals.reshape(total, -1)[ids].reshape(shape),
        )


@dataclass(frozen=True)
class Imatrix:
    """All entries by tensor name. `chunk_size`: tokens in a chunk, None where a legacy file does not tell."""

    entries: Mapping[str, ImatrixEntry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int | None = None

    def matches(self, inventory: Inventory) -> tuple[str, ...]:
        """Check that this imatrix is of that model, and return the quantizable tensors that it has no data for.

        llama-quantize ignores entries of other names, and stops at the first entry of another size, half-way through.
        It takes embeddings of any size; so does this.

        Raises:
            InputError: an entry names no tensor of the model, or has another size than its tensor.
        """
        for name, entry in self.entries.items():
            tensor = inventory.tensors.get(name)
            if tensor is None:
                raise InputError(f"imatrix is of another model: {inventory.path.name} has no tensor {name}")
            expected = tensor.row_length * tensor.n_matrices
            if entry.sums.size != expected and name not in EMBEDDINGS:
                raise InputError(
                    f"imatrix is of another model: tensor {name}: got {entry.sums.size} values, expected {expected} "
                    f"({tensor.row_length} x {tensor.n_matrices})"
                )
        quantizable = (tensor.name for tensor in inventory.tensors.values() if not tensor.kept_because)
        return tuple(name for name in quantizable if name not in self.entries)

    def weights_of(self, tensor: Tensor) -> Floats | None:
        """float32 [n_matrices, row_length], what llama-quantize stores the tensor under; None where it has no data.

        Data of another size counts as none: `matches` lets it through for embeddings only, and there llama-quantize
        does without.
        """
        entry = self.entries.get(tensor.name)
        shape = (tensor.n_matrices, tensor.row_length)
        return entry.weights.reshape(shape) if entry is not None and entry.sums.size == shape[0] * shape[1] else None

    def slice_experts(self, keep: ExpertsToKeep, n_experts: int) -> "Imatrix":
        """The imatrix of a model with fewer experts.

        Args:
            keep: from a tensor's name to the ids its experts keep, None for a tensor that is left alone.
            n_experts: experts before.

        Raises:
            InputError: see `ImatrixEntry.slice`, with the tensor's name.
        """
        entries = {}
        for name, entry in self.entries.items():
            ids = keep(name)
            try:
                entries[name] = entry if ids is None else entry.slice(ids, n_experts)
            except InputError as error:
                raise InputError(f"tensor {name}: {error}") from error
        return replace(self, entries=entries)
