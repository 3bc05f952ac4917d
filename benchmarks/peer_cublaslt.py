"""cublasLt's int8 matrix product with a workspace, through ctypes: what `torch._int_mm` calls without one.

int8 [M, K] x int8 [N, K] -> int32 [M, N]. Row-major operands are column-major transposes to cublasLt, so it computes
out.T [N, M] = op(W) X with W [K, N] transposed: its only layout for int8 on tensor cores besides Turing's own.
Needs the libcublasLt that torch for CUDA brings, and nothing else. Constants: cublasLt.h, library_types.h.

Not done here: scales (a second kernel would have to apply them), so its times are below those of a whole linear.
"""

import ctypes
from collections.abc import Callable

import torch

LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12")
WORKSPACE = 64 << 20
_COMPUTE_32I, _R_8I, _R_32I = 72, 3, 10
_DESC_TRANSA, _OP_T, _PREF_MAX_WORKSPACE = 3, 1, 1
_MOST_ALGORITHMS = 16

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class CublasLt:
    """The library, one handle and one workspace on the current device.

    Raises:
        OSError: no libcublasLt in this process or on its path.
        RuntimeError: a call failed (with its status).
    """

    def __init__(self) -> None:
        self._library = _load()
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._workspace = torch.empty(WORKSPACE, dtype=torch.int8, device="cuda")

    def products(self, m: int, n: int, k: int) -> list[Product]:
        """Functions (x int8 [m, k], w int8 [n, k], out int32 [m, n]) of the algorithms that cublasLt suggests, its
        favourite first; none where it has none for these sizes. They may be captured in a graph."""
        description = self._create("cublasLtMatmulDescCreate", ctypes.c_int(_COMPUTE_32I), ctypes.c_int(_R_32I))
        transposed = ctypes.c_int32(_OP_T)
        self._set("cublasLtMatmulDescSetAttribute", description, _DESC_TRANSA, transposed)
        weight, x, out = (
            self._create(
                "cublasLtMatrixLayoutCreate",
                ctypes.c_int(kind),
                ctypes.c_uint64(rows),
                ctypes.c_uint64(columns),
                ctypes.c_int64(rows),
            )
            for kind, rows, columns in ((_R_8I, k, n), (_R_8I, k, m), (_R_32I, n, m))
        )
        preference = self._create("cublasLtMatmulPreferenceCreate")
        limit = ctypes.c_uint64(WORKSPACE)
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, _PREF_MAX_WORKSPACE, limit)
        found, count = (Heuristic * _MOST_ALGORITHMS)(), ctypes.c_int(0)
        layouts = (description, weight, x, out, out)
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, *layouts, preference, ctypes.c_int(_MOST_ALGORITHMS), found, ctypes.byref(count)
        )
        usable = [found[number] for number in range(count.value) if not found[number].state] if not status else []
        return [self._product(description, weight, x, out, result) for result in usable]

    def _product(
        self,
        description: ctypes.c_void_p,
        weight: ctypes.c_void_p,
        x: ctypes.c_void_p,
        out: ctypes.c_void_p,
        result: Heuristic,
    ) -> Product:
        one, zero = ctypes.c_int32(1), ctypes.c_int32(0)

        def run(x_q: torch.Tensor, w_q: torch.Tensor, target: torch.Tensor) -> None:
            self._call(
                "cublasLtMatmul",
                self._handle,
                description,
                ctypes.byref(one),
                ctypes.c_void_p(w_q.data_ptr()),
                weight,
                ctypes.c_void_p(x_q.data_ptr()),
                x,
                ctypes.byref(zero),
                ctypes.c_void_p(target.data_ptr()),
                out,
                ctypes.c_void_p(target.data_ptr()),
                out,
                ctypes.byref(result, Heuristic.algorithm.offset),
                ctypes.c_void_p(self._workspace.data_ptr()),
                ctypes.c_size_t(WORKSPACE),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )

        return run

    def _create(self, function: str, *arguments: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *arguments)
        return made

    def _set(self, function: str, target: ctypes.c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call(function, target, ctypes.c_int(attribute), ctypes.byref(value), size)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function}: status {status}")


def _load() -> ctypes.CDLL:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(LIBRARIES)} can be loaded")
