"""Triton device functions that decode a tile of one matrix, one for each way of storing it, and a kernel of its own.

Codes become numbers by integer operations and lookups alone: a GPU before compute capability 8.9 cannot convert float8,
and none has bitsandbytes' values. Eight codes are read as one word and share a scale, wherever a format's blocks allow
it.
"""

import triton
import triton.language as tl


@triton.jit
def float8_value(code):
    """The float32 value of E4M3 codes (int32)."""
    # float32 has the same layout with four bits more of exponent, so its value is 2^-120 of theirs.
    top = code << 24
    size = (top >> 4) & 0x07F00000
    value = ((top & -0x80000000) | size).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where(size == 0x07F00000, float("nan"), value)


@triton.jit
def power_of_two(code):
    """The float32 value of UE8M0 codes (int32): 2^(code - 127), NaN for 255."""
    # float32 keeps 2^-127 without a leading one.
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _code(word, PLACE: tl.constexpr, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr):
    place: tl.constexpr = PLACE ^ 1 if HIGH_FIRST else PLACE
    return ((word >> BITS * place) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _unpack(word, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr):
    """The eight codes (int32) of each word, in order, ``[8 * len(word)]``. No thread needs another's."""
    even = tl.interleave(
        tl.interleave(_code(word, 0, BITS, HIGH_FIRST), _code(word, 4, BITS, HIGH_FIRST)),
        tl.interleave(_code(word, 2, BITS, HIGH_FIRST), _code(word, 6, BITS, HIGH_FIRST)),
    )
    odd = tl.interleave(
        tl.interleave(_code(word, 1, BITS, HIGH_FIRST), _code(word, 5, BITS, HIGH_FIRST)),
        tl.interleave(_code(word, 3, BITS, HIGH_FIRST), _code(word, 7, BITS, HIGH_FIRST)),
    )
    return tl.interleave(even, odd)


@triton.jit
def _repeat_eight(x):
    twice = tl.interleave(x, x)
    four = tl.interleave(twice, twice)
    return tl.interleave(four, four)


@triton.jit
def load_tile(
    codes_ptr,
    scale_ptr,
    nested_ptr,
    expert,
    n0,
    k0,
    N,
    K,
    stride_se,
    stride_sn,
    stride_sk,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """What a tile of one matrix is decoded from: ``(words, scales, shared)``, as they are stored.

    One for each run of elements of a row, ``[TILE_N * TILE_K // RUN]``, row after row: of a flat tensor neighbors are
    read by neighboring threads, and unpacked in the registers of the thread that read. What lies outside of the matrix
    decodes to some number.

    Args:
        codes_ptr: Codes as stored: words of 8 codes, or bytes if ``RUN`` is 1.
        scale_ptr: Scales with their strides.
        nested_ptr: Numbers each of which ``NESTED`` consecutive scales share; not read if 0.
        expert, n0, k0: int64 expert; int32 first row and column, a multiple of 8.
        N, K: Sizes of a matrix as stored.
        ROWS, COLUMNS: The block that shares a scale; flat blocks with 0 rows.
    """
    run = tl.arange(0, TILE_N * TILE_K // RUN)
    n = n0 + run // (TILE_K // RUN)
    k = k0 + run % (TILE_K // RUN) * RUN
    mask = (n < N) & (k < K)
    # Words are counted in 32 bits, see ``run_length``; the elements of a stack may be more.
    index = expert * N * K + n.to(tl.int64) * K + k if RUN == 1 else 0
    if RUN == 1:
        place = index * BITS // 8
    else:
        place = (expert * N * (K // RUN)).to(tl.uint32) + (n * (K // RUN) + k // RUN).to(tl.uint32)
    word = tl.load(codes_ptr + place, mask=mask, other=0)
    shared = 0.0
    if ROWS == 0:
        block = (index if RUN == 1 else place) // (COLUMNS // RUN)
        if NESTED:
            shared = tl.load(nested_ptr + block // NESTED, mask=mask, other=0.0)
    else:
        block = (n // ROWS).to(tl.int64) * stride_sn + (k // COLUMNS).to(tl.int64) * stride_sk
        block += expert * stride_se
    scale = tl.load(scale_ptr + block, mask=mask, other=0)
    return word, scale, shared


@triton.jit
def decode_scale(
    scale,
    shared,
    factor_ptr,
    nested_values_ptr,
    offset_ptr,
    expert,
    stride_f,
    NESTED: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Scales in float32 that are stored as a float, as UE8M0, as E4M3, or as codes (``NESTED``).

    Args:
        scale, shared: See :func:`load_tile`.
        factor_ptr: What multiplies those of each expert (``FACTOR``).
        nested_values_ptr, offset_ptr: What the codes of scales stand for (``NESTED``).
    """
    if NESTED:
        return tl.load(nested_values_ptr + scale.to(tl.int32)) * shared + tl.load(offset_ptr)
    if SCALE == "e8m0":
        scale = power_of_two(scale.to(tl.int32))
    elif SCALE == "e4m3":
        scale = float8_value(scale.to(tl.int32))
    else:
        scale = scale.to(tl.float32)
    if FACTOR:
        return tl.load(factor_ptr + expert * stride_f) * scale
    return scale


@triton.jit
def decode_tile(
    word,
    scale,
    values_ptr,
    BITS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    RUN: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """The tile in float32, ``[TILE_N * TILE_K]``, row after row; see :func:`load_tile`.

    Args:
        word, scale: Words of :func:`load_tile` and scales of :func:`decode_scale`.
        values_ptr: With 4 bits the value of each code.
    """
    if RUN == 8:
        code = _unpack(word, BITS, HIGH_FIRST)
        scale = _repeat_eight(scale)
    elif BITS == 4:
        # ``k`` is even where a tile begins.
        place = tl.arange(0, TILE_N * TILE_K) % 2
        code = word.to(tl.int32) >> (1 - place if HIGH_FIRST else place) * 4 & 15
    else:
        code = word.to(tl.int32)
    if BITS == 4:
        # Copied to shared memory, from where 16 numbers are read without conflicts, whatever the codes.
        return tl.gather(tl.load(values_ptr + tl.arange(0, 16)), code, 0) * scale
    return float8_value(code) * scale


# Without knowing the alignment of codes Triton gives a thread one word at a time, whose eight elements are the 16 bytes
# of bfloat16 that it then writes; told of more it would read more, and exchange them through shared memory.
@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["codes_ptr"])
def decode_kernel(
    codes_ptr,
    values_ptr,
    scale_ptr,
    factor_ptr,
    nested_values_ptr,
    nested_ptr,
    offset_ptr,
    experts_ptr,
    out_ptr,
    first,
    N,
    K,
    stride_se,
    stride_sn,
    stride_sk,
    stride_f,
    LISTED: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of a matrix a program: of those listed, or of consecutive ones from ``first`` on."""
    # fmt: off
    tiles_k = tl.cdiv(K, BLOCK_K)
    n0 = tl.program_id(0) // tiles_k * BLOCK_N
    k0 = tl.program_id(0) % tiles_k * BLOCK_K
    number = tl.program_id(1)
    expert = (tl.load(experts_ptr + number) if LISTED else first + number).to(tl.int64)
    word, scale, shared = load_tile(
        codes_ptr, scale_ptr, nested_ptr, expert, n0, k0, N, K, stride_se, stride_sn, stride_sk,
        BITS, RUN, ROWS, COLUMNS, NESTED, BLOCK_N, BLOCK_K,
    )
    scale = decode_scale(
        scale, shared, factor_ptr, nested_values_ptr, offset_ptr, expert, stride_f, NESTED, SCALE, FACTOR
    )
    # fmt: on
    tile = decode_tile(word, scale, values_ptr, BITS, HIGH_FIRST, RUN, BLOCK_N, BLOCK_K)
    element = tl.arange(0, BLOCK_N * BLOCK_K)
    n, k = n0 + element // BLOCK_K, k0 + element % BLOCK_K
    out = out_ptr + (number.to(tl.int64) * N + n) * K + k
    tl.store(out, tile.to(out_ptr.dtype.element_ty), mask=(n < N) & (k < K))
