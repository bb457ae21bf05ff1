"""Triton kernels that bring token-expert pairs in order, and each token's results together."""

import triton
import triton.language as tl


@triton.jit
def _segments_of(index_ptr, pair, pairs, num_experts):
    """The expert of each pair, ``num_experts`` where it has none here."""
    expert = tl.load(index_ptr + pair, mask=pair < pairs, other=0)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@triton.jit
def count_pairs_kernel(
    index_ptr, counts_ptr, pairs, num_experts, EXPERTS_POW2: tl.constexpr, BLOCK: tl.constexpr
):
    """``counts[segment, block]``: the pairs of each segment among ``BLOCK`` pairs a program."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _segments_of(index_ptr, pair, pairs, num_experts)
    counts = tl.histogram(expert, EXPERTS_POW2, mask=pair < pairs)
    segment = tl.arange(0, EXPERTS_POW2)
    at = segment * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts_ptr + at, counts, mask=segment <= num_experts)


@triton.jit
def place_pairs_kernel(
    index_ptr,
    counts_ptr,
    through_ptr,
    order_ptr,
    offsets_ptr,
    pairs,
    num_experts,
    EXPERTS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes each pair to its place: behind the pairs that ``through``, the running sum of ``counts``, has before its
    block, and behind those of its own segment that come before it in the block."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    within = tl.arange(0, BLOCK)
    pair = block * BLOCK + within
    in_pairs = pair < pairs
    expert = _segments_of(index_ptr, pair, pairs, num_experts)
    at = expert * blocks + block
    place = tl.load(through_ptr + at) - tl.load(counts_ptr + at)
    for start in range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        its_expert = _segments_of(index_ptr, block * BLOCK + other, pairs, num_experts)
        is_before = (its_expert[None, :] == expert[:, None]) & (other[None, :] < within[:, None])
        place += tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(order_ptr + place, pair.to(tl.int64), mask=in_pairs)
    if block == 0:
        segment = tl.arange(0, EXPERTS_POW2)
        in_offsets = segment <= num_experts
        first = tl.load(through_ptr + segment * blocks, mask=in_offsets, other=0)
        first -= tl.load(counts_ptr + segment * blocks, mask=in_offsets, other=0)
        tl.store(offsets_ptr + segment, first.to(tl.int64), mask=in_offsets)


@triton.jit
def sum_choices_kernel(by_pair_ptr, out_ptr, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the ``TOP_K`` rows of each token, in float32 and in their order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_columns = column < columns
    rows = by_pair_ptr + token * TOP_K * columns + column
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Unrolled: all rows are on their way before the first is added.
    for choice in tl.static_range(TOP_K):
        total += tl.load(rows + choice * columns, mask=in_columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=in_columns)
