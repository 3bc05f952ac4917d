"""Vectors of 16 float32 in functions compiled by numba, which has no type for them and seldom vectorises by itself.

They become LLVM's vectors: a register with AVX-512, two with AVX2, four with NEON or SSE. Not for use outside
`viterbi_cpu.py` and `few_rows_column.py`: addresses are not checked.
"""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import ffi
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
VECTOR = ir.VectorType(ir.FloatType(), LANES)


def _patch_vars_of_llvmlite() -> None:
    """Give llvmlite's library (0.43 to 0.47), which takes any attribute for one of its functions, an empty `__dict__`.

    vLLM 0.32, when it starts an engine on a CPU, asks all that modules hold for their `__dict__`. It fails at this one,
    so a process that had compiled anything could start no engine, or no second one.
    """
    functions = getattr(ffi.lib, "_fntab", None)
    if isinstance(functions, dict):
        functions["__dict__"] = {}


_patch_vars_of_llvmlite()


class _Vector(types.Type):
    """float32 [16] in a register."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


FLOATS = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, VECTOR)


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    result: Callable[..., Any] = intrinsic(function)
    return result


def address(context: Any, builder: Any, signature: Any, arguments: Any, kind: ir.Type) -> Any:
    """Pointer to `array[index]`, the first two arguments, as one to `kind`."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), kind.as_pointer())


def _loaded(context: Any, builder: Any, signature: Any, arguments: Any, count: int) -> Any:
    kind = ir.VectorType(ir.FloatType(), count)
    loaded = builder.load(address(context, builder, signature, arguments, kind))
    loaded.align = 4
    return loaded


def _spread(builder: Any, vector: Any, times: int) -> Any:
    """Each element so many times, one after the other."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [lane // times for lane in range(LANES)])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def reader(times: int) -> Callable[..., Any]:
    """`read(array, index)`: the 16 / `times` elements from `index` on, each `times` times; `times` divides 16."""

    @instruction
    def read(_context: Any, array: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            loaded = _loaded(context, builder, signature, arguments, LANES // times)
            return loaded if times == 1 else _spread(builder, loaded, times)

        return FLOATS(array, types.intp), generate

    return read


@instruction
def fill(_context: Any, number: Any) -> Any:
    """A number in all lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), arguments[0], ir.IntType(32)(0))
        return _spread(builder, first, LANES)

    return FLOATS(types.float32), generate


@instruction
def write(_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Store 16 elements from `index` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = address(context, builder, signature, arguments, VECTOR)
        builder.store(arguments[2], place).align = 4
        return context.get_dummy_value()

    return types.none(array, types.intp, FLOATS), generate


@instruction
def squared_difference_plus(_context: Any, one: Any, other: Any, addend: Any) -> Any:
    """(one - other)^2 + addend, rounded once less where the processor can."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        difference = builder.fsub(*arguments[:2])
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return builder.call(fused, [difference, difference, arguments[2]])

    return FLOATS(FLOATS, FLOATS, FLOATS), generate


@instruction
def smaller(_context: Any, one: Any, other: Any) -> Any:
    """The smaller of two numbers, lane by lane."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *arguments), *arguments)

    return FLOATS(FLOATS, FLOATS), generate


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs without Python and its lock. Compiled when first called, and not kept on disk."""
    result: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy")(function)
    return result
