"""The two steps of `cpu_few_rows.py` that need vectors of 32-bit words, as LLVM instructions: lanes are 16 tiles.

`transpose` brings words of 16 tiles side by side. `column(codebook, rows)` multiplies a column of these tiles with
activations: 16 windows, each in two neighbouring words, at the same place in all tiles.

float16 is never used, so processors need not have it. Halves of codewords are between 1/8 and 2 in size, with two
exponent bits that vary, and become float32 by a shift and two masks. Their sum is exact in float32. It is rounded to
the 11 bits of a float16 by adding 1.5 x 2^13 times its own power of two, and subtracting it again.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from gemma4q_kernels.exl3.vectors import LANES, VECTOR, instruction
from gemma4q_kernels.exl3_layout import TILE

QUAD = 4  # words that `transpose` takes of each tile

_WORD, _FLOAT = ir.IntType(32), ir.FloatType()
_WORDS = ir.VectorType(_WORD, LANES)
_LANE_MASK = ir.VectorType(_WORD, LANES)
_FACTORS = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0), "mul1": (0x83DCD12D, 0)}
_MUL1_SCALE, _MUL1_OFFSET = 0.00676727294921875, -10.3828125  # float16 0x1EEE, 0xC931
# The sign, two exponent bits and fraction of a float16, 3 bits below the upper half of a word, and the rest: the
# exponent 011xx becomes 011111xx, and 0xB60 is what the codebook flips.
_HALF, _FLIPS = 0x81FFE000, 0x3E000000 | 0x0B60 << 13
_EXPONENT, _ROUNDING = 0x7F800000, 1.5 * 2**13


def _words(number: int) -> ir.Constant:
    return ir.Constant(_WORDS, [number] * LANES)


def _floats(number: float) -> ir.Constant:
    return ir.Constant(VECTOR, [number] * LANES)


def _fused(builder: Any, one: Any, other: Any, addend: Any) -> Any:
    """one * other + addend, rounded once where the processor can."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [one, other, addend])


def _shifted(builder: Any, name: str, high: Any, low: Any, distance: Any) -> Any:
    """A shift of words with others behind them, to the left or right ("fshl", "fshr")."""
    kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}i32")
    return builder.call(function, [high, low, distance])


def _fenced(builder: Any, words: Any) -> Any:
    """The same words. LLVM would make a second, slower product of a product that is shifted to the left."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR]), f"llvm.arithmetic.fence.v{LANES}f32"
    )
    return builder.bitcast(builder.call(function, [builder.bitcast(words, VECTOR)]), _WORDS)


def _spread(builder: Any, number: Any, kind: ir.VectorType) -> Any:
    """A number in all lanes."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _WORD(0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_LANE_MASK, [0] * LANES))


def _load(builder: Any, pointer: Any, place: Any, kind: ir.Type) -> Any:
    loaded = builder.load(builder.bitcast(builder.gep(pointer, [place]), kind.as_pointer()))
    loaded.align = 4
    return loaded


def _half(builder: Any, upper: Any) -> Any:
    """float32 of the float16 that the upper halves of words become."""
    moved = builder.and_(builder.ashr(upper, _words(3)), _words(_HALF))
    return builder.bitcast(builder.xor(moved, _words(_FLIPS)), VECTOR)


def _sum_of_bytes(builder: Any, word: Any) -> Any:
    pairs = [builder.and_(each, _words(0x00FF00FF)) for each in (word, builder.lshr(word, _words(8)))]
    sums = builder.add(*pairs)
    return builder.and_(builder.add(sums, builder.lshr(sums, _words(16))), _words(0xFFFF))


def _values(builder: Any, state: Any, codebook: str) -> Any:
    """`reference.values` of 16 states."""
    factor, increment = _FACTORS[codebook]
    word = builder.add(builder.mul(state, _words(factor)), _words(increment))
    if codebook == "mul1":
        total = builder.uitofp(builder.add(_sum_of_bytes(builder, word), _words(1024)), VECTOR)
        exact = _fused(builder, total, _floats(_MUL1_SCALE), _floats(_MUL1_OFFSET))
    else:
        lower = builder.shl(_fenced(builder, word), _words(16))
        exact = builder.fadd(_half(builder, lower), _half(builder, word))
    power = builder.bitcast(builder.and_(builder.bitcast(exact, _WORDS), _words(_EXPONENT)), VECTOR)
    rounded = _fused(builder, power, _floats(_ROUNDING), exact)
    return _fused(builder, power, _floats(-_ROUNDING), rounded)


def _window(builder: Any, words: Any, windows: Any, row: int) -> Any:
    """The states of a row's window in 16 tiles."""
    place, shift = (_load(builder, windows, _WORD(2 * row + part), _WORD) for part in (0, 1))
    before = _load(builder, words, place, _WORDS)
    last = _load(builder, builder.gep(words, [place]), _WORD(LANES), _WORDS)
    shifted = _shifted(builder, "fshr", before, last, _spread(builder, shift, _WORDS))
    return builder.and_(shifted, _words(0xFFFF))


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, index: int, kind: ir.Type) -> Any:
    """Pointer to element `arguments[index + 1]` of the array `arguments[index]`."""
    array = context.make_array(signature.args[index])(context, builder, arguments[index])
    return builder.bitcast(builder.gep(array.data, [arguments[index + 1]]), kind.as_pointer())


@cache
def column(codebook: str, rows: int) -> Callable[..., Any]:
    """`multiply(words, 0, windows, first, x, first, sums, first)`: adds a column's products for so many activations.

    Args of `multiply`, arrays and where to begin in them:
        words: int32 [1 + words of a tile, 16 tiles], first the last one again.
        windows: int32 [16, 2], of every row the element of `words` where its first word begins, and how far the two
            are shifted to the right.
        x: float32 [16, rows].
        sums: float32 [rows, 256], of which the first 16 elements of each are added to.
    """

    @instruction
    def multiply(_c: Any, words: Any, w: Any, windows: Any, v: Any, x: Any, i: Any, sums: Any, o: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = (_WORD, _WORD, _FLOAT, _FLOAT)
            places = [
                _pointer(context, builder, signature, arguments, 2 * index, kind) for index, kind in enumerate(kinds)
            ]
            totals = [_floats(0.0)] * rows
            for row in range(TILE):
                weights = _values(builder, _window(builder, places[0], places[1], row), codebook)
                for number in range(rows):
                    factor = _load(builder, places[2], _WORD(row * rows + number), _FLOAT)
                    totals[number] = _fused(builder, _spread(builder, factor, VECTOR), weights, totals[number])
            for number, total in enumerate(totals):
                place = builder.gep(places[3], [_WORD(number * TILE * LANES)])
                before = _load(builder, place, _WORD(0), VECTOR)
                builder.store(builder.fadd(before, total), builder.bitcast(place, VECTOR.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.none(words, w, windows, v, x, i, sums, o), generate

    return multiply


@instruction
def transpose(_context: Any, words: Any, low: Any, high: Any, stride: Any, out: Any, start: Any) -> Any:
    """Four words of 16 tiles, side by side: out[start:] = int32 [4, 16].

    Tiles 0 to 7 begin at `words[low]` and so many elements apart, tiles 8 to 15 at `words[high]`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        kind = ir.VectorType(_WORD, QUAD)
        tiles = []
        for lane in range(LANES):
            distance = builder.mul(arguments[3], ir.Constant(arguments[3].type, lane % (LANES // 2)))
            begin = arguments[1 if lane < LANES // 2 else 2]
            tiles.append(_load(builder, source, builder.add(begin, distance), kind))
        # Tiles j, 4 + j, 8 + j, 12 + j in one vector: what remains is a transposition within each of its quarters.
        parts = [_joined(builder, tiles[lane::QUAD]) for lane in range(QUAD)]
        low = [_shuffled(builder, parts[a], parts[b], (0, 16, 1, 17)) for a, b in ((0, 2), (1, 3))]
        high = [_shuffled(builder, parts[a], parts[b], (2, 18, 3, 19)) for a, b in ((0, 2), (1, 3))]
        pointer = context.make_array(signature.args[4])(context, builder, arguments[4]).data
        for word in range(QUAD):
            one, other = low if word < 2 else high
            pattern = (0, 16, 1, 17) if word % 2 == 0 else (2, 18, 3, 19)
            place = builder.gep(pointer, [builder.add(arguments[5], ir.Constant(arguments[5].type, word * LANES))])
            builder.store(
                _shuffled(builder, one, other, pattern), builder.bitcast(place, _WORDS.as_pointer())
            ).align = 4
        return context.get_dummy_value()

    return types.none(words, low, high, stride, out, start), generate


def _joined(builder: Any, quarters: list[Any]) -> Any:
    """Four vectors of 4 as one of 16."""
    halves = [
        builder.shuffle_vector(*quarters[at : at + 2], ir.Constant(ir.VectorType(_WORD, 8), list(range(8))))
        for at in (0, 2)
    ]
    return builder.shuffle_vector(*halves, ir.Constant(_LANE_MASK, list(range(LANES))))


def _shuffled(builder: Any, one: Any, other: Any, pattern: tuple[int, ...]) -> Any:
    """The same in every quarter of two vectors: numbers from 16 on mean the second."""
    mask = [QUAD * quarter + each for quarter in range(LANES // QUAD) for each in pattern]
    return builder.shuffle_vector(one, other, ir.Constant(_LANE_MASK, mask))
