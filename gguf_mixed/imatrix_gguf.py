"""The GGUF format of importance matrices, what llama-imatrix writes today.

Keys: `general.type` = imatrix, `imatrix.datasets`, `imatrix.chunk_count`, `imatrix.chunk_size`. Per tensor, all F32:
`NAME.in_sum2` [row_length, n_matrices], `NAME.counts` [1, n_matrices], and in newer files `NAME.in_sum` and
`NAME.stats`, a summary that only `llama-imatrix --show-statistics` reads, recomputes, and we therefore drop.
Source: `save_imatrix` (tools/imatrix/imatrix.cpp) and common/imatrix-loader.cpp, b11434.
"""

import math
from pathlib import Path

import numpy as np
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf import GGUFWriter

from gguf_mixed.atomic_file import replacing
from gguf_mixed.errors import InputError
from gguf_mixed.header import MAX_NAME_BYTES, Header, TensorEntry, read_header
from gguf_mixed.imatrix import Floats, Imatrix, ImatrixEntry
from gguf_mixed.imatrix_legacy import read_legacy

UNKNOWN_DATASET = "unknown"

_SUMS, _COUNTS, _TOTALS = ".in_sum2", ".counts", ".in_sum"


class _Writer(GGUFWriter):
    """The package's writer without the key that every model has and no imatrix does."""

    def add_architecture(self) -> None:
        """Nothing."""


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix in either format, told apart by the file's first bytes.

    Raises:
        InputError: unreadable, not an imatrix, truncated, or with entries that cannot be.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error
    return _read_gguf(path) if is_gguf else read_legacy(path)


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write a GGUF imatrix that llama-quantize and llama-imatrix read; `path` appears only when it is complete.

    llama-quantize demands data sets and a chunk size. Without data sets, UNKNOWN_DATASET is written; a legacy imatrix
    has no chunk size and counts in chunks, so 1 is written.

    Raises:
        InputError: no entries, a name too long for ggml, or see `replacing`.
    """
    if not imatrix.entries:
        raise InputError(f"{path.name}: an imatrix without entries cannot be written")
    with replacing(path) as partial:
        writer = _Writer(partial, arch="")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets or (UNKNOWN_DATASET,)))
        writer.add_uint32("imatrix.chunk_count", imatrix.chunk_count)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size or 1)
        for name, entry in sorted(imatrix.entries.items()):
            if len((name + _SUMS).encode()) > MAX_NAME_BYTES:
                raise InputError(f"tensor {name}: too long a name: with {_SUMS}, ggml allows {MAX_NAME_BYTES} bytes")
            writer.add_tensor(name + _SUMS, entry.sums)
            writer.add_tensor(name + _COUNTS, entry.counts[:, None].astype(np.float32))
            if entry.totals is not None:
                writer.add_tensor(name + _TOTALS, entry.totals)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    if header.get("general.type") != "imatrix":
        raise InputError(f"{path.name}: not an imatrix: general.type is {header.get('general.type')!r}")
    if header.header_only:
        raise InputError(f"{path.name}: truncated: the file ends after its header")
    stored = {entry.name: entry for entry in header.tensors}
    names = [name.removesuffix(_SUMS) for name in stored if name.endswith(_SUMS)]
    entries = {name: _read_entry(path, name, stored) for name in names}
    for name in stored:
        if name.endswith((_COUNTS, _TOTALS)) and name.rpartition(".")[0] not in entries:
            raise InputError(f"{path.name}: tensor {name} has no {_SUMS} beside it")
    if not entries:
        raise InputError(f"{path.name}: an imatrix without entries")
    datasets = header.get("imatrix.datasets")
    return Imatrix(
        entries,
        tuple(str(item) for item in datasets) if isinstance(datasets, tuple) else (),
        _number(header, "imatrix.chunk_count"),
        _number(header, "imatrix.chunk_size") or None,
    )


def _read_entry(path: Path, name: str, stored: dict[str, TensorEntry]) -> ImatrixEntry:
    counts_entry = stored.get(name + _COUNTS)
    if counts_entry is None:
        raise InputError(f"{path.name}: tensor {name} has {_SUMS} but no {_COUNTS}")
    counts = np.rint(_read_values(path, counts_entry)).astype(np.int64)
    sums = _read_values(path, stored[name + _SUMS])
    totals_entry = stored.get(name + _TOTALS)
    totals = None if totals_entry is None else _read_values(path, totals_entry)
    if sums.size % counts.size or (totals is not None and totals.size != sums.size):
        raise InputError(f"{path.name}: tensor {name}: {sums.size} sums and {counts.size} counts do not fit together")
    shape = (counts.size, -1)
    try:
        return ImatrixEntry(sums.reshape(shape), counts, None if totals is None else totals.reshape(shape))
    except InputError as error:
        raise InputError(f"{path.name}: tensor {name}: {error}") from error


def _read_values(path: Path, entry: TensorEntry) -> Floats:
    if entry.qtype is not GGMLQuantizationType.F32:
        raise InputError(f"{path.name}: tensor {entry.name} is {entry.qtype.name}, expected F32")
    values = np.fromfile(path, dtype="<f4", count=math.prod(entry.shape), offset=entry.start).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{path.name}: tensor {entry.name} holds values that are not finite")
    return values


def _number(header: Header, key: str) -> int:
    value = header.get(key)
    return value if isinstance(value, int) else 0
