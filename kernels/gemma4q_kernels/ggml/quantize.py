"""ggml's own quantizers, called in its compiled library: what llama-quantize writes, bit for bit, row by row.

`ggml_quantize_chunk` and `ggml_get_type_traits` of libggml-base through ctypes. Both are thread-safe and run without
Python's lock, so threads run them in parallel. Layout of `ggml_type_traits`: ggml/include/ggml.h (b11434); since the
library is whatever the user has, the sizes read through that layout are compared with the `gguf` package's first.

ggml answers bad input by ending the process. Everything it would end for is refused here instead: a type that needs
weights without them, partial blocks, and values that are not finite or above F16's range (block scales are F16; the
searches of IQ2 and IQ3 overflow float32 soon after).
"""

import ctypes
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gemma4q_kernels.ggml.types import QUANTIZABLE_TYPES, GGMLQuantizationType, block_bytes, block_size, row_bytes

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

LIBRARY_NAMES = ("libggml-base.so", "libggml-base.so.0", "libggml-base.dylib", "ggml-base.dll")
# Distributions on PyPI that ship the library, tried in this order. The first is built for glibc 2.27, and is only that.
WHEELS = ("libggml-python", "llama-cpp-py-sync", "pywhispercpp")
NEEDS_WEIGHTS = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})  # `ggml_quantize_requires_imatrix`
_SUBFOLDERS = ("", "bin", "build/bin", "lib")
# auditwheel adds a hash to the names of libraries that it copies into NAME.libs.
_IN_WHEEL = re.compile(r"(lib)?ggml-base(-[0-9a-f]+)?(\.so[.\d]*|[.\d]*\.dylib|\.dll)")
_TOO_NEW = re.compile(r"version [`'](?P<version>GLIBC\w*_[\d.]+)' not found")
_LARGEST = float(np.finfo(np.float16).max)
_LARGEST_SUM = float(np.finfo(np.float32).max)
_WIDE = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.BF16})
_EVER_KNOWN = GGMLQuantizationType.Q8_0


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


def find_library(folders: Iterable[Path], wheels: bool = True) -> Path:
    """Path of the first libggml-base that can be used: in one of `folders`, else in an installed wheel that ships it.

    Args:
        folders: llama.cpp checkouts, their build folders, or the folders of their programs.
        wheels: whether to look in installed wheels at all.

    Raises:
        FileNotFoundError: not there; says where it was looked for.
        OSError: none that is there can be used; says why for each, see `Quantizers`.
    """
    folders = list(folders)
    unusable = []
    for path in [*_in_folders(folders), *(_in_wheels() if wheels else ())]:
        try:
            return Quantizers(path).library
        except OSError as error:
            unusable.append(str(error))
    if unusable:
        raise OSError("; ".join(unusable))
    places = [str(folder) for folder in folders]
    if wheels:
        places += [f"the wheel {name}" for name in WHEELS]
    raise FileNotFoundError(f"{LIBRARY_NAMES[0]}: not in {', '.join(places)}")


class Quantizers:
    """The quantizers of one library.

    Attributes:
        library: its path.
        types: types that it knows, smallest first.
    """

    def __init__(self, library: Path) -> None:
        """Load a library.

        Raises:
            OSError: it cannot be loaded (as when it is built for a newer system), lacks a function, or its structures
                have another layout.
        """
        self.library = library
        try:
            loaded = ctypes.CDLL(str(library))
            self._quantize = loaded.ggml_quantize_chunk
            get_traits = loaded.ggml_get_type_traits
        except AttributeError as error:
            raise OSError(f"{library}: not libggml-base, or older than 2025: {error}") from error
        except OSError as error:
            raise OSError(_why_not_loaded(library, error)) from error
        self._quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self._quantize.restype = ctypes.c_size_t
        get_traits.argtypes, get_traits.restype = [ctypes.c_int], ctypes.POINTER(_TypeTraits)
        traits = {qtype: get_traits(qtype.value).contents for qtype in QUANTIZABLE_TYPES}
        self._traits = {qtype: found for qtype, found in traits.items() if _is_type(found, qtype)}
        if _EVER_KNOWN not in self._traits:
            raise OSError(f"{library}: ggml_type_traits has another layout than this package reads")
        self.types = tuple(self._traits)

    def quantize(self, rows: Floats, qtype: GGMLQuantizationType, weights: Floats | None = None) -> Bytes:
        """Rows as llama-quantize stores them.

        Args:
            rows: float32 [n, row_length], C-contiguous.
            qtype: the type.
            weights: float32 [row_length], importance of each column (an imatrix's `weights`), or None.

        Returns:
            uint8 [n, bytes of a row].

        Raises:
            ValueError: input that ggml would end the process for, see the module.
        """
        self._check(rows, qtype, weights)
        n_rows, length = rows.shape
        packed = np.empty((n_rows, row_bytes(qtype, length)), np.uint8)
        pointer = None if weights is None else weights.ctypes.data
        written = self._quantize(qtype.value, rows.ctypes.data, packed.ctypes.data, 0, n_rows, length, pointer)
        if written != packed.size:
            raise OSError(f"{self.library}: {qtype.name}: wrote {written} bytes, expected {packed.size}")
        return packed

    def dequantize(self, packed: Bytes, qtype: GGMLQuantizationType) -> Floats:
        """Back from `quantize`.

        Args:
            packed: uint8 [n, bytes of a row], C-contiguous.
            qtype: the type.

        Returns:
            float32 [n, row_length].

        Raises:
            ValueError: the library lacks the type, or the rows are not a whole number of blocks.
        """
        self._check_known(qtype)
        if packed.dtype != np.uint8 or packed.ndim != 2 or not packed.flags.c_contiguous:
            raise ValueError(f"packed rows: got {_described(packed)}, expected contiguous uint8 [n, bytes]")
        blocks, rest = divmod(packed.shape[1], block_bytes(qtype))
        if rest:
            raise ValueError(
                f"rows of {packed.shape[1]} bytes are not a multiple of {qtype.name}'s {block_bytes(qtype)}"
            )
        if qtype is GGMLQuantizationType.F32:  # ggml has no function that does nothing
            return packed.view(np.float32).copy()
        values = np.empty((len(packed), blocks * block_size(qtype)), np.float32)
        self._traits[qtype].to_float(packed.ctypes.data, values.ctypes.data, values.size)
        return values

    def round_trip(self, rows: Floats, qtype: GGMLQuantizationType, weights: Floats | None = None) -> Floats:
        """float32 [n, row_length]: what a model computes with once `rows` are stored as `qtype`; see `quantize`."""
        return self.dequantize(self.quantize(rows, qtype, weights), qtype)

    def _check_known(self, qtype: GGMLQuantizationType) -> None:
        if qtype not in self._traits:
            raise ValueError(f"{qtype.name}: not a type that {self.library.name} can write")

    def _check(self, rows: Floats, qtype: GGMLQuantizationType, weights: Floats | None) -> None:
        self._check_known(qtype)
        if rows.dtype != np.float32 or rows.ndim != 2 or not rows.flags.c_contiguous or not rows.size:
            raise ValueError(f"rows: got {_described(rows)}, expected contiguous float32 [n, row_length]")
        length = rows.shape[1]
        if length % block_size(qtype):
            raise ValueError(f"rows of {length} are not a multiple of {qtype.name}'s block of {block_size(qtype)}")
        if weights is None and qtype.name in NEEDS_WEIGHTS:
            raise ValueError(f"{qtype.name} needs an importance of each column, got none")
        largest = float(np.abs(rows).max())
        if not np.isfinite(largest):
            raise ValueError("rows hold values that are not finite")
        if largest > _LARGEST and qtype not in _WIDE:
            raise ValueError(f"rows hold values up to {largest:.3g}, {qtype.name} ends at {_LARGEST:.0f}")
        heaviest = 1.0 if weights is None else _heaviest(weights, length)
        if largest**2 * max(heaviest, 1.0) * length > _LARGEST_SUM:
            raise ValueError(f"rows up to {largest:.3g} under weights up to {heaviest:.3g} overflow float32")


def _heaviest(weights: Floats, length: int) -> float:
    if weights.dtype != np.float32 or weights.shape != (length,) or not weights.flags.c_contiguous:
        raise ValueError(f"weights: got {_described(weights)}, expected contiguous float32 [{length}]")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights hold values that are negative or not finite")
    return float(weights.max())


def _described(values: npt.NDArray[np.generic]) -> str:
    return f"{'' if values.flags.c_contiguous else 'non-contiguous '}{values.dtype} {list(values.shape)}"


def _is_type(traits: _TypeTraits, qtype: GGMLQuantizationType) -> bool:
    """Whether a library's entry is that type.

    An older library knows fewer types and checks no bounds: what is read then is not an entry at all, so its pointer
    is followed only after both sizes fit.
    """
    if (traits.block_size, traits.type_size) != (block_size(qtype), block_bytes(qtype)) or not traits.type_name:
        return False
    return ctypes.string_at(traits.type_name).decode().upper() == qtype.name


def _in_folders(folders: Iterable[Path]) -> list[Path]:
    # Absolute: the loader looks for a bare name among the system's libraries.
    searched = [folder.absolute() / subfolder for folder in folders for subfolder in _SUBFOLDERS]
    named = ([folder / name for name in LIBRARY_NAMES if (folder / name).is_file()] for folder in searched)
    return [paths[0] for paths in named if paths]  # the others are links to it


def _in_wheels() -> list[Path]:
    found = []
    for name in WHEELS:
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        libraries = [file for file in files if _IN_WHEEL.fullmatch(file.name)]
        if libraries:
            found.append(Path(str(min(libraries, key=lambda file: len(file.name)).locate())))
    return found


def _why_not_loaded(library: Path, error: OSError) -> str:
    too_new = _TOO_NEW.search(str(error))
    if too_new:
        return f"{library}: is built for a newer system: needs {too_new['version']}, here is {_libc()}"
    return f"{library}: cannot be loaded: {error}"


def _libc() -> str:
    return " ".join(platform.libc_ver()).strip() or platform.system()
