"""Triton device functions that decode a tile of one matrix, one for each way of storing it, and a kernel of its own.

Codes become numbers by integer operations and lookups alone: a GPU before compute capability 8.9 cannot convert float8,
and none has bitsandbytes' values.
"""

import triton
import triton.language as tl


@triton.jit
def float8_value(code):
    """The float32 value of E4M3 codes (int32)."""
    # float16 has the same layout with one bit more of exponent, so its value is 2^-8 of theirs.
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def power_of_two(code):
    """The float32 value of UE8M0 codes (int32): 2^(code - 127), NaN for 255."""
    # float32 keeps 2^-127 without a leading one.
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_codes(
    codes_ptr, row, k0, n_columns, in_row, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Codes ``[rows, BLOCK_K]`` from column ``k0`` on (int32); ``row`` counts through the stack, ``k0`` is even."""
    if BITS == 8:
        k = k0 + tl.arange(0, BLOCK_K)
        mask = in_row[:, None] & (k < n_columns)[None, :]
        return tl.load(codes_ptr + row[:, None] * n_columns + k[None, :], mask=mask, other=0).to(tl.int32)
    half = k0 // 2 + tl.arange(0, BLOCK_K // 2)
    mask = in_row[:, None] & (half < n_columns // 2)[None, :]
    pair = tl.load(codes_ptr + row[:, None] * (n_columns // 2) + half[None, :], mask=mask, other=0).to(
        tl.int32
    )
    if HIGH_FIRST:
        return tl.interleave(pair >> 4, pair & 15)
    return tl.interleave(pair & 15, pair >> 4)


@triton.jit
def load_scale(pointer, mask, KIND: tl.constexpr):
    """Scales in float32 that are stored as a float, as UE8M0 or as E4M3."""
    if KIND == "e8m0":
        return power_of_two(tl.load(pointer, mask=mask, other=127).to(tl.int32))
    if KIND == "e4m3":
        return float8_value(tl.load(pointer, mask=mask, other=0).to(tl.int32))
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def decode_tile(
    codes_ptr,
    values_ptr,
    scale_ptr,
    factor_ptr,
    nested_values_ptr,
    nested_ptr,
    offset_ptr,
    expert,
    n,
    k0,
    N,
    K,
    stride_se,
    stride_sn,
    stride_sk,
    stride_f,
    BITS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile ``[len(n), BLOCK_K]`` of a matrix in float32: rows ``n``, columns from ``k0`` on; zero outside.

    Args:
        codes_ptr, values_ptr: Codes as stored, and with 4 bits the value of each.
        scale_ptr, factor_ptr: Scales with their strides, and what multiplies them for each expert (``FACTOR``).
        nested_values_ptr, nested_ptr, offset_ptr: What the codes of scales stand for (``NESTED``).
        expert, n, k0: int64 expert; int32 rows and first column, even.
        N, K: Sizes of a matrix as stored.
        ROWS, COLUMNS: The block that shares a scale; flat blocks with 0 rows.
        SCALE: How scales are stored, see :func:`load_scale`.
    """
    k = k0 + tl.arange(0, BLOCK_K)
    in_row = n < N
    mask = in_row[:, None] & (k < K)[None, :]
    row = expert * N + n
    code = load_codes(codes_ptr, row, k0, K, in_row, BITS, HIGH_FIRST, BLOCK_K)
    value = float8_value(code) if BITS == 8 else tl.load(values_ptr + code)
    if ROWS == 0:
        block = (row[:, None] * K + k[None, :]) // COLUMNS
        if NESTED:
            index = tl.load(scale_ptr + block, mask=mask, other=0).to(tl.int32)
            shared = tl.load(nested_ptr + block // NESTED, mask=mask, other=0.0)
            scale = tl.load(nested_values_ptr + index) * shared + tl.load(offset_ptr)
        else:
            scale = tl.load(scale_ptr + block, mask=mask, other=0.0)
    else:
        pointer = scale_ptr + expert * stride_se
        pointer += (n // ROWS)[:, None].to(tl.int64) * stride_sn + (k // COLUMNS)[None, :].to(
            tl.int64
        ) * stride_sk
        scale = load_scale(pointer, mask, SCALE)
        if FACTOR:
            scale = tl.load(factor_ptr + expert * stride_f) * scale
    return tl.where(mask, value * scale, 0.0)


@triton.jit
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
    N,
    K,
    stride_se,
    stride_sn,
    stride_sk,
    stride_f,
    BITS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # fmt: off
    tiles_k = tl.cdiv(K, BLOCK_K)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(0) % tiles_k * BLOCK_K
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)
    tile = decode_tile(
        codes_ptr, values_ptr, scale_ptr, factor_ptr, nested_values_ptr, nested_ptr, offset_ptr, expert, n, k0, N, K,
        stride_se, stride_sn, stride_sk, stride_f,
        BITS, HIGH_FIRST, ROWS, COLUMNS, NESTED, SCALE, FACTOR, BLOCK_K,
    )
    # fmt: on
    k = k0 + tl.arange(0, BLOCK_K)
    row = tl.program_id(1).to(tl.int64) * N + n
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + row[:, None] * K + k[None, :], tile.to(out_ptr.dtype.element_ty), mask=mask)
