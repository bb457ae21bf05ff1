"""Triton implementation: launches of the grouped GEMMs, composed to forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from .. import tile_tables
from ..launch import cdiv, next_power_of_2
from ..launcher import launch_kernel
from ..quantization.stack import QuantizedStack, Weight
from ..routing import Routing
from . import few_rows, library
from .arguments import Operands
from .descriptors import describe, describe_rows
from .kernels import grouped_matmul_kernel
from .kernels_outer import grouped_outer_kernel
from .pairs import TILES, sum_choices
from .schedule import Scheduled, most_tiles
from .workspace import LowRank, Workspace

# What a rule's launch may ask of a product besides block sizes, and what a launch without it does:
OPTIONS = {
    # 1: read the tiles of rows from a schedule that the launches of a call share. 0: each program counts them.
    "SCHEDULE": 0,
    # Programs a multiprocessor, each of which takes one tile after another, read from a schedule. 0: a program a tile.
    "PERSISTENT": 0,
    # 1: one loop over the steps of all tiles of such a program. 0: a loop over each tile's.
    "FLATTEN": 0,
    # 1: copy the weights by tensor descriptors (TMA). 0: by pointers.
    "TMA": 0,
    # 1: copy rows that lie in sorted order so, too.
    "TMA_ROWS": 0,
    # 1: torch's grouped matrix product multiplies, and the kernel adds the rest. 0: the kernel does both.
    "LIBRARY": 0,
    # 1: the product that is the gradient of the gated activation ends with what comes through it. 0: a launch more.
    "GATE_BACKWARD": 0,
}


def float32_precision(x: torch.Tensor) -> str:
    """Full float32 unless the user allowed TF32, by the switch that torch's own matmul follows and that all others set.
    AMD's matrix cores multiply float32 as it is."""
    # The dtype first: to read the switch takes microseconds, which count at each of a layer's launches.
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile(kernel: str, like: torch.Tensor, rows: float, n: int, k: int) -> Mapping[str, int]:
    """Block sizes, ``num_warps`` and ``num_stages`` for a launch.

    Args:
        kernel: ``grouped_matmul`` or ``grouped_outer``.
        like: An operand; its device and element size count.
        rows: Rows an expert, on average.
        n, k: The other two sizes: ``[rows, k] x [k, n]`` for ``grouped_matmul``, ``[k, rows] x [rows, n]`` for
            ``grouped_outer``.

    Raises:
        NotImplementedError: No rule for elements of that size.
    """
    # Rows that do not start at a multiple of 16 elements are read one element at a time, and a large tile then runs
    # out of registers. A narrow matrix is small whatever its rows.
    is_aligned = all(size % 16 == 0 or size <= 64 for size in (n, k))
    device = tile_tables.table_of(like.device) if is_aligned else tile_tables.DEFAULT
    return tile_tables.find(TILES, device, kernel, like.dtype, {"rows": rows, "n": n, "k": k})


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU that the interpreter takes for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel that multiplies rows.

    Attributes:
        programs: How many for a program a tile; of a share as many as its tiles are on average.
        arguments: The kernel's first.
        constants: Those that every such kernel has.
        is_share: True if there may be more tiles than programs, so that a program has to take one after another.
        persistent: How many programs a multiprocessor that do so are asked for, 0 for a program a tile.
        flatten: True if they do in one loop.
    """

    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    is_share: bool
    persistent: int
    flatten: bool


def launches(
    x: torch.Tensor,
    weight: Weight,
    routing: Routing,
    *,
    top_k: int | None,
    low: LowRank | None,
    bias: torch.Tensor | None = None,
    parts: int = 1,
) -> Iterator[Launch]:
    """The launches of ``x[row] W[e]^T (+ low[s] C[e]^T) (+ bias[e])``; arguments as for :func:`grouped_matmul`.

    A dense weight takes one. The matrices of a quantized one are decoded into a workspace a share at a time, and each
    share's launch is to be made before the next is asked for. The device alone knows how many tiles a share has, and
    most of the programs for as many as it may have would begin and find none.

    A tile's columns are ``parts`` equally long runs, each at the same place of its part of the N columns.
    """
    routing = routing if isinstance(routing, Scheduled) else Scheduled(*routing)
    workspace = Workspace(weight) if isinstance(weight, QuantizedStack) else None
    dense = workspace.dense if workspace else cast(torch.Tensor, weight)
    size, n_out, n_in = dense.shape
    blocks = tile("grouped_matmul", x, routing.rows, n_out, n_in)
    options: dict[str, Any] = {**OPTIONS, **blocks}
    del options["GATE_BACKWARD"]
    persistent, flatten = options.pop("PERSISTENT"), options.pop("FLATTEN")
    # Programs that walk over the tiles have to know how many there are.
    options["SCHEDULE"] = options["SCHEDULE"] or persistent > 0 or workspace is not None
    options["LIBRARY"] = bool(options["LIBRARY"]) and workspace is None and library.serves(x, dense)
    if options["LIBRARY"]:
        x, top_k, options["TMA"] = library.product(x, dense, routing, top_k), None, 0
    described, options["TMA"] = (
        describe(dense, parts, blocks["BLOCK_N"], blocks["BLOCK_K"]) if options["TMA"] else (dense, "")
    )
    rows: Any = None
    if options["TMA_ROWS"] and not options["LIBRARY"] and top_k is None:
        rows = describe_rows(x, blocks["BLOCK_M"], blocks["BLOCK_K"])
    options["TMA_ROWS"] = rows is not None
    # Pointers that are not used still have to be pointers.
    left, right = low or (x, dense)
    rank = left.shape[1] if low else 0
    constants = {
        "GATHER": top_k is not None,
        "TOP_K": top_k or 1,
        "LOW_RANK": low is not None,
        "BIAS": bias is not None,
        "EXPERTS_POW2": next_power_of_2(size + 1),
        "PRECISION": float32_precision(x),
        "EVEN_K": n_in % blocks["BLOCK_K"] == 0,
        # A short sum needs no long block; 16 is the least that ``tl.dot`` multiplies.
        "BLOCK_R": min(blocks["BLOCK_K"], max(16, next_power_of_2(rank))),
        **options,
    }
    schedules = routing.schedules(blocks["BLOCK_M"], size) if options["SCHEDULE"] else routing.offsets
    pairs = routing.order.shape[0]
    expected = min(pairs, math.ceil(routing.rows * size)) if workspace else pairs
    programs = most_tiles(expected, size, blocks["BLOCK_M"]) * cdiv(n_out, blocks["BLOCK_N"])

    def launch(factor: torch.Tensor, own_bias: torch.Tensor | None, schedule: torch.Tensor) -> Launch:
        arguments = (
            x if rows is None else rows,
            described,
            left,
            factor,
            dense if own_bias is None else own_bias,
            *routing,
            schedule,
            pairs,
            size,
            n_out,
            n_in,
            rank,
            x.stride(0),
            *dense.stride(),
            *(factor.stride() if low else (0, 0, 0)),
        )
        return Launch(
            programs, arguments, constants, workspace is not None, persistent, bool(persistent and flatten)
        )

    if workspace is None:
        yield launch(right, bias, schedules)
        return
    for share, schedule in zip(workspace.decoded_shares(), schedules, strict=True):
        yield launch(right[share] if low else right, None if bias is None else bias[share], schedule)


def grouped_matmul(
    x: torch.Tensor,
    weight: Weight,
    routing: Routing,
    *,
    top_k: int | None = None,
    low: LowRank | None = None,
    bias: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    scatter: bool = False,
) -> torch.Tensor:
    """``x[row] W[e]^T (+ low[s] C[e]^T) (+ bias[e])`` for every pair.

    Args:
        x: Rows: ``[S, N_in]`` in sorted order if ``top_k`` is None, else the row of pair p is ``p // top_k``
            (``top_k=1``: by pair).
        weight: ``[E, N_out, N_in]``, any strides (a transposed view serves the backward), or quantized.
        routing: The pairs, sorted by expert.
        low: Factors of a low-rank term, or None.
        bias: ``[E, N_out]``, contiguous; or None.
        row_weight: ``[S]`` by pair, multiplies the result; or None.
        scatter: Write by pair instead of in sorted order.

    Returns:
        ``[S, N_out]``; zero for pairs without an expert here.
    """
    pairs = routing.order.shape[0]
    out = x.new_empty((pairs, weight.shape[1]))
    if pairs == 0:
        return out
    if few_rows.has_few_rows(weight, routing):
        few_rows.matmul(
            x,
            weight,
            routing,
            out,
            top_k=top_k,
            low=low,
            bias=bias,
            row_weight=row_weight,
            scatter=scatter,
            precision=float32_precision(x),
        )
        return out
    for launch in launches(x, weight, routing, top_k=top_k, low=low, bias=bias):
        programs = launch.programs
        if launch.persistent:
            programs = min(programs, launch.persistent * multiprocessors(x.device))
        launch_kernel(
            grouped_matmul_kernel,
            (programs, 1, 1),
            (*launch.arguments, x if row_weight is None else row_weight, out),
            {
                "SCATTER": scatter,
                "WEIGHTED": row_weight is not None,
                "PERSISTENT": launch.is_share or launch.persistent > 0,
                "FLATTEN": launch.flatten,
                # Only a product without a second loop, over the rank, becomes one loop.
                "SHORT_RANK": launch.flatten
                and low is not None
                and low[0].shape[1] <= launch.constants["BLOCK_R"],
                **launch.constants,
            },
        )
    return out


def grouped_outer(
    p: torch.Tensor,
    q: torch.Tensor,
    routing: Routing,
    *,
    top_k_p: int | None = None,
    top_k_q: int | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum over the pairs of expert e of p[row]^T q[row]``, the gradient of a per-expert matrix.

    Args:
        p, q: ``[*, N_p]`` and ``[*, N_q]``; rows as in :func:`grouped_matmul`, of one dtype.
        routing: The pairs, sorted by expert.
        top_k_p, top_k_q: None where the rows are in sorted order. If both are given they are equal.
        row_weight: ``[S]`` by pair, multiplies each term; or None.

    Returns:
        ``[E, N_p, N_q]``; zero for experts without pairs.
    """
    num_experts = routing.offsets.shape[0] - 1
    n_p, n_q = p.shape[1], q.shape[1]
    out = p.new_empty((num_experts, n_p, n_q))
    blocks = tile("grouped_outer", p, routing.order.shape[0] / num_experts, n_q, n_p)
    grid = (cdiv(n_q, blocks["BLOCK_Q"]), cdiv(n_p, blocks["BLOCK_P"]), num_experts)
    launch_kernel(
        grouped_outer_kernel,
        grid,
        (p, q, p if row_weight is None else row_weight, out, *routing, n_p, n_q, p.stride(0), q.stride(0)),
        {
            "GATHER_P": top_k_p is not None,
            "GATHER_Q": top_k_q is not None,
            "TOP_K": top_k_p or top_k_q or 1,
            "WEIGHTED": row_weight is not None,
            "PRECISION": float32_precision(p),
            **blocks,
        },
    )
    return out


def weight_gradient(
    weight: Weight,
    p: torch.Tensor,
    q: torch.Tensor,
    routing: Routing,
    *,
    top_k_p: int | None = None,
    top_k_q: int | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`grouped_outer` in the layout of ``weight``: where that is a transposed view, so is the result."""
    assert isinstance(weight, torch.Tensor)
    if not weight.is_contiguous() and weight.mT.is_contiguous():
        return grouped_outer(q, p, routing, top_k_p=top_k_q, top_k_q=top_k_p, row_weight=row_weight).mT
    return grouped_outer(p, q, routing, top_k_p=top_k_p, top_k_q=top_k_q, row_weight=row_weight)


def bias_gradient(
    dy: torch.Tensor,
    routing: Routing,
    *,
    top_k: int | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of each expert's rows of ``dy``, ``[E, N_out]``; rows as in :func:`grouped_matmul`."""
    ones = dy.new_ones((routing.order.shape[0], 1))
    return grouped_outer(dy, ones, routing, top_k_p=top_k, row_weight=row_weight).squeeze(2)


def forward(operands: Operands, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_forward`."""
    x, weight, a, b, bias, *_ = operands
    routing, rows = Scheduled(*operands.routing), operands.pairs_per_row(top_k)
    low = None if a is None or b is None else (grouped_matmul(x, a, routing, top_k=rows), b)
    y = grouped_matmul(x, weight, routing, top_k=rows, low=low, bias=bias, scatter=True)
    return y, low[0] if low else x.new_empty((y.shape[0], 0))


def backward(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_backward`."""
    x, weight, a, b, *_ = operands
    routing, rows = Scheduled(*operands.routing), operands.pairs_per_row(top_k)
    d_low = None if a is None or b is None else (grouped_matmul(dy, b.mT, routing, top_k=1), a.mT)
    gradients = {}
    if "x" in names:
        dx = grouped_matmul(dy, weight.mT, routing, top_k=1, low=d_low, scatter=True)
        gradients["x"] = sum_choices(dx, x.shape[0])
    # Where x has one row a token and dy one a pair, the two gather differently; putting dy in sorted order first keeps
    # the kernel at one divisor.
    if not {"weight", "b", "bias"}.isdisjoint(names):
        dy = dy.index_select(0, routing.order)
    if "weight" in names:
        gradients["weight"] = weight_gradient(weight, dy, x, routing, top_k_q=rows)
    if "a" in names and d_low is not None:
        gradients["a"] = grouped_outer(d_low[0], x, routing, top_k_q=rows)
    if "b" in names:
        gradients["b"] = grouped_outer(dy, low, routing)
    if "bias" in names:
        gradients["bias"] = bias_gradient(dy, routing)
    return gradients
