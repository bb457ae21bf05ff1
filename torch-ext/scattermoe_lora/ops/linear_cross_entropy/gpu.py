"""Triton implementation: the kernels make logits, torch the other products, a part of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import tile_tables
from ..grouped_linear.gpu import float32_precision
from ..launch import cdiv
from ..launcher import launch_kernel
from .arguments import Operands, Settings, Statistics, StatisticsGradients
from .kernels import logits_backward_kernel, logits_forward_kernel

TILES = Path(__file__).parent / "tiles"
# Bytes of the logits' gradient that is in memory at a time.
_PART_BYTES = 1 << 28
_RANK_BLOCK = 16


def tile(kernel: str, hidden: torch.Tensor) -> Mapping[str, int]:
    """The launch of ``logits_forward`` or ``logits_backward`` for ``hidden`` ``[T, H]``: blocks of tokens, of words and
    of the hidden size, ``GROUP_M``, ``num_warps`` and ``num_stages``."""
    # Rows that do not start at a multiple of 16 elements are read one element at a time, and a large tile then runs out
    # of registers.
    is_aligned = hidden.shape[1] % 16 == 0
    device = tile_tables.table_of(hidden.device) if is_aligned else tile_tables.DEFAULT
    return tile_tables.find(TILES, device, kernel, hidden.dtype, {})


def refuse_float64(hidden: torch.Tensor) -> None:
    if hidden.dtype == torch.float64:
        raise NotImplementedError(
            "linear_cross_entropy: hidden: float64 runs on the CPU only; use float32 on this device"
        )


def _constants(operands: Operands, settings: Settings, launch: Mapping[str, int]) -> dict[str, Any]:
    return {
        "BIAS": operands.bias is not None,
        "LOW_RANK": operands.low is not None,
        "SOFTCAP": bool(settings.softcap),
        "SUMS": settings.sums,
        "CLASS_WEIGHT": settings.sums and operands.class_weight is not None,
        "ENTROPIES": settings.entropies,
        "PRECISION": float32_precision(operands.hidden),
        "EVEN_K": operands.hidden.shape[1] % launch["BLOCK_K"] == 0,
        "BLOCK_R": _RANK_BLOCK,
        **launch,
    }


def _sizes(operands: Operands) -> tuple[int, int]:
    """The hidden size and the rank."""
    return operands.hidden.shape[1], 0 if operands.low is None else operands.low.shape[1]


def forward(operands: Operands, settings: Settings) -> Statistics:
    """See :func:`scattermoe_lora.ops.linear_cross_entropy.op.linear_cross_entropy_forward`."""
    hidden, weight, bias, low, b, labels, class_weight = operands
    refuse_float64(hidden)
    tokens, words = hidden.shape[0], weight.shape[0]
    launch = tile("logits_forward", hidden)
    tiles = cdiv(words, launch["BLOCK_N"])
    by_tile = [
        hidden.new_empty((tiles if asked else 0, tokens), dtype=torch.float32)
        for asked in (True, settings.sums, settings.entropies, settings.peaks)
    ]
    # A label outside the vocabulary is found nowhere.
    label_logit = hidden.new_full((tokens,), torch.nan, dtype=torch.float32)
    if tokens:
        launch_kernel(
            logits_forward_kernel,
            (tiles * cdiv(tokens, launch["BLOCK_M"]), 1, 1),
            (
                hidden,
                weight,
                bias,
                low,
                b,
                labels,
                class_weight,
                by_tile[0],
                label_logit,
                *by_tile[1:],
                tokens,
                words,
                *_sizes(operands),
                settings.scale,
                settings.softcap,
            ),
            {"PEAKS": settings.peaks, **_constants(operands, settings, launch)},
        )
    is_left_out = labels < 0
    lse = by_tile[0].logsumexp(dim=0)
    sums, entropy, peak = (hidden.new_empty((0,), dtype=torch.float32) for _ in range(3))
    if settings.sums:
        sums = by_tile[1].sum(dim=0)
    if settings.entropies:
        shares = by_tile[0].sub_(lse).exp_()
        entropy = lse - by_tile[2].mul_(shares).masked_fill_(shares == 0, 0.0).sum(dim=0)
    if settings.peaks:
        peak = by_tile[3].amax(dim=0)
    lse, label_logit, sums, entropy, peak = (
        value.masked_fill(is_left_out, 0.0) if value.shape[0] else value
        for value in (lse, label_logit, sums, entropy, peak)
    )
    return Statistics(lse, label_logit, sums, entropy, peak, hidden.new_empty((0, hidden.shape[1])))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32, not rounded to the dtype of its operands."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def backward(
    gradients: StatisticsGradients,
    operands: Operands,
    statistics: Statistics,
    settings: Settings,
    names: Collection[str],
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.linear_cross_entropy.op.linear_cross_entropy_backward`."""
    hidden, weight, bias, low, b, labels, class_weight = operands
    refuse_float64(hidden)
    tokens, words = hidden.shape[0], weight.shape[0]
    by_token = {
        name: torch.zeros_like(getattr(operands, name), dtype=torch.float32)
        for name in ("hidden", "low")
        if name in names
    }
    by_word = {
        name: torch.zeros_like(getattr(operands, name)) for name in ("weight", "bias", "b") if name in names
    }
    launch = tile("logits_backward", hidden)
    columns = launch["BLOCK_N"]
    columns *= max(_PART_BYTES // (max(tokens, 1) * hidden.itemsize * columns), 1)
    d_lse, d_label, d_sum, d_entropy = (part.contiguous() for part in gradients.or_zeros(statistics.lse))
    for start in range(0, words if tokens else 0, columns):
        part = slice(start, min(start + columns, words))
        own = [None if t is None else t[part] for t in (weight, bias, b, class_weight)]
        size = part.stop - start
        d = hidden.new_empty((tokens, size))
        grid = cdiv(tokens, launch["BLOCK_M"]) * cdiv(size, launch["BLOCK_N"])
        launch_kernel(
            logits_backward_kernel,
            (grid, 1, 1),
            (
                hidden,
                own[0],
                own[1],
                low,
                own[2],
                labels,
                own[3],
                statistics.lse,
                statistics.entropy,
                d_lse,
                d_label,
                d_sum,
                d_entropy,
                d,
                tokens,
                size,
                start,
                *_sizes(operands),
                settings.scale,
                settings.softcap,
            ),
            _constants(operands, settings, launch),
        )
        for name, factor in (("hidden", own[0]), ("low", own[2])):
            if name in by_token and factor is not None:
                by_token[name].add_(_product(d, factor.to(d.dtype)))
        for name, rows in (("weight", hidden), ("b", low)):
            if name in by_word and rows is not None:
                by_word[name][part] = _product(d.t(), rows)
        if "bias" in by_word:
            by_word["bias"][part] = d.sum(dim=0, dtype=torch.float32)
    return by_word | {name: total.to(hidden.dtype) for name, total in by_token.items()}
