"""What EXL3's Triton kernels share: windows of the ring, codebooks, butterflies of the transforms.

Columns c and c + 8 of a tile are 32 neighbouring windows, 32 K bits that begin at a whole word: a thread reads K words
and the one before, and cuts all windows out by constants. (At half rates every other pair begins in the middle of a
word, and its words are shifted first.) Window j of such a pair belongs to column c + 8 * (j >> 2 & 1), and to row
2 * (j >> 3) + (j & 1) + 8 * (j >> 1 & 1).

A transform runs over a tuple of tensors, one for each place along the axis, so that sums and differences stay within a
thread. `pack` and `unpack` turn a tuple into a tensor's first axis and back. The new axis must come first: the last one
is what Triton spreads over threads, and then neither moves anything.
"""

# Tuples that grow are tuples of unrolled tensors to Triton, and of one length to mypy.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment"
import triton
import triton.language as tl


@triton.jit
def codebook_value(state, CODEBOOK: tl.constexpr):
    """uint32 states, 0..65535, to float16: see `reference.values`."""
    if CODEBOOK == "mul1":
        x = state * 0x83DCD12D
        pairs = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
        # 0x6400 is 1024, where float16 counts by ones. The constants are 0x1EEE and 0xC931: exact in float32, 23 bits.
        total = ((pairs + (pairs >> 16)) & 0xFFFF) + 0x6400
        total = total.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        value = (total * 0.00676727294921875 - 10.3828125).to(tl.float16)
    else:
        x = state * 0xCBAC1FED if CODEBOOK == "mcg" else state * 89226354 + 64248484
        y = (x & 0x8FFF8FFF) ^ 0x3B603B60
        value = y.to(tl.uint16).to(tl.float16, bitcast=True) + (y >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return value


@triton.jit
def _ring_words(tile_ptr, column, WIDTH: tl.constexpr):
    """The word before a pair of columns, then the words it lies in, from its first bit on: a tuple of uint32."""
    first = (2 * WIDTH * column) >> 5
    before = tl.where(first == 0, WIDTH // 2 - 1, first - 1)  # around the ring
    words = (tl.load(tile_ptr + before).to(tl.uint32, bitcast=True),)
    for i in tl.static_range((WIDTH + 15) // 16):
        words += (tl.load(tile_ptr + first + i).to(tl.uint32, bitcast=True),)
    if WIDTH % 16 != 0:
        odd = column % 2 == 1
        aligned = ()
        for i in tl.static_range(1 + WIDTH // 16):
            aligned += (tl.where(odd, words[i] << 16 | words[i + 1] >> 16, words[i]),)
        aligned += (tl.where(odd, words[1 + WIDTH // 16] << 16, words[1 + WIDTH // 16]),)
        words = aligned
    return words


@triton.jit
def _state(words, END: tl.constexpr):
    """The 16 bits before bit END of a pair of columns."""
    if END % 32 == 0:
        bits = words[END // 32]
    elif END % 32 >= 16:
        bits = words[END // 32 + 1] >> (32 - END % 32)
    else:
        bits = (words[END // 32] << (END % 32)) | (words[END // 32 + 1] >> (32 - END % 32))
    return bits & 0xFFFF


@triton.jit
def column_pairs(tile_ptr, column, WIDTH: tl.constexpr, CODEBOOK: tl.constexpr):
    """Weights of columns c and c + 8 of tiles: a tuple of 32 float16, the first column's rows, then the other's.

    Args:
        tile_ptr: int32 pointers to the words of tiles, int16 [WIDTH] each.
        column: int32 of the same shape, 0..7.
    """
    words = _ring_words(tile_ptr, column, WIDTH)
    windows = ()
    for j in tl.static_range(32):
        windows += (codebook_value(_state(words, (j + 1) * WIDTH // 16), CODEBOOK),)
    values = ()
    for i in tl.static_range(32):
        values += (windows[8 * ((i & 7) >> 1) + (i & 1) + 2 * (i >> 3 & 1) + 4 * (i >> 4)],)
    return values


@triton.jit
def butterflies(x, COUNT: tl.constexpr, STAGES: tl.constexpr):
    """The transform over each 2 ** STAGES of a tuple of COUNT tensors; adds as `hadamard.transform` does."""
    for stage in tl.static_range(STAGES):
        done = ()
        for i in tl.static_range(COUNT):
            if (i >> stage) % 2 == 0:
                done += (x[i] + x[i + (1 << stage)],)
            else:
                done += (x[i - (1 << stage)] - x[i],)
        x = done
    return x


@triton.jit
def pack(x, BITS: tl.constexpr):
    """A tuple of 2 ** BITS tensors [A] to one tensor [2 ** BITS, A]."""
    size: tl.constexpr = x[0].shape[0]
    for bit in tl.static_range(BITS):
        pairs = ()
        for i in tl.static_range(1 << (BITS - bit - 1)):
            pair = tl.join(tl.reshape(x[2 * i], (1 << bit, size)), tl.reshape(x[2 * i + 1], (1 << bit, size)))
            pairs += (tl.reshape(tl.permute(pair, (2, 0, 1)), (2 << bit, size)),)
        x = pairs
    return x[0]


@triton.jit
def unpack(x, BITS: tl.constexpr):
    """A tensor [2 ** BITS, A] to a tuple of 2 ** BITS tensors [A]."""
    size: tl.constexpr = x.shape[1]
    parts = (x,)
    for bit in tl.static_range(BITS):
        halves = ()
        for i in tl.static_range(1 << bit):
            pair = tl.reshape(parts[i], (2, 1 << (BITS - bit - 1), size))
            half = tl.split(tl.permute(pair, (1, 2, 0)))
            halves += (half[0], half[1])
        parts = halves
    done = ()
    for i in tl.static_range(1 << BITS):
        done += (tl.reshape(parts[i], (size,)),)
    return done
