"""Triton implementation of a sum of losses with its gradients: torch multiplies, a block of tokens at a time.

A block's products with the head are in memory in float32, and a kernel puts their gradient in their place: three
products of the logits' size in all where a head is trained.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from ..launch import cdiv
from ..launcher import launch_kernel
from .arguments import Objective, Operands, Settings, Statistics
from .gpu import refuse_float64
from .kernels_total import logits_gradient_kernel

# Bytes of a block's logits, and what its tokens are a multiple of.
_LOGITS_BYTES, _MULTIPLE = 3 << 28, 128
# Of columns, so that rows in memory start at a multiple of 16 bytes.
_COLUMNS = 8
# The products over the vocabulary have few rows and columns; so many parts of it are multiplied at once.
_PARTS = 8
# A row is read and written in order: what matters is that enough of it is on its way.
LAUNCH = {"BLOCK_N": 4096, "num_warps": 8, "num_stages": 1}


def _rows(tokens: int, columns: int, most: int) -> int:
    """Tokens of a block: about the same number in each."""
    most = max(_LOGITS_BYTES // (4 * columns), most, _MULTIPLE) // _MULTIPLE * _MULTIPLE
    blocks = max(cdiv(tokens, most), 1)
    return max(cdiv(cdiv(tokens, blocks), _MULTIPLE), 1) * _MULTIPLE


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, adds: bool) -> None:
    """``out = a @ b``, or ``out += a @ b``, in float32, not rounded to the dtype of the factors."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        out.addmm_(a.float(), b.float(), beta=int(adds))
    elif adds:
        # Of a batch, since torch's addmm had no sum of another dtype than its factors.
        batch = out.unsqueeze(0)
        torch.baddbmm(batch, a.unsqueeze(0), b.unsqueeze(0), out_dtype=torch.float32, out=batch)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _multiply_by_parts(d: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``d @ factor`` of ``[T, V]`` and ``[V, n]`` in float32: parts of the sum over ``V`` at once, and then theirs."""
    words, columns = factor.shape
    parts = max(math.gcd(words, _PARTS * _COLUMNS) // _COLUMNS, 1)
    left = d.unflatten(1, (parts, words // parts)).transpose(0, 1)
    right = factor.reshape(parts, words // parts, columns)
    if d.dtype == torch.float32 or d.device.type == "cpu":
        return torch.bmm(left.float(), right.float()).sum(dim=0)
    return torch.bmm(left, right, out_dtype=torch.float32).sum(dim=0)


def forward(
    operands: Operands, objective: Objective, settings: Settings, names: Collection[str]
) -> tuple[Statistics, dict[str, torch.Tensor]]:
    """See :func:`scattermoe_lora.ops.linear_cross_entropy.total.linear_cross_entropy_total`."""
    hidden, weight, bias, low, b, labels, class_weight = operands
    refuse_float64(hidden)
    tokens, words = hidden.shape[0], weight.shape[0]
    asked = (True, True, settings.sums, settings.entropies)
    results = [hidden.new_empty((tokens if own else 0,), dtype=torch.float32) for own in asked]
    make = torch.empty_like if tokens else torch.zeros_like
    by_token, by_word = (
        {name: make(getattr(operands, name), dtype=torch.float32) for name in group if name in names}
        for group in (("hidden", "low"), ("weight", "bias", "b"))
    )
    # Adding to a trained head's gradient then moves no more bytes than the logits do.
    columns = cdiv(words, _COLUMNS) * _COLUMNS
    size = _rows(tokens, columns, hidden.shape[1] if "weight" in names else 0)
    logits = hidden.new_empty((min(size, tokens), columns), dtype=torch.float32)
    in_place = logits if hidden.dtype == torch.float32 else logits.view(hidden.dtype)
    weight = weight.to(hidden.dtype)
    slope = objective.slope(class_weight, words)
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        number = part.stop - start
        x, d = logits[:number, :words], in_place[:number, :words]
        if low is not None and b is not None:
            _multiply(low[part], b.t(), x, adds=False)
        _multiply(hidden[part], weight.t(), x, adds=low is not None)
        launch_kernel(
            logits_gradient_kernel,
            (number, 1, 1),
            (
                x,
                d,
                bias,
                labels[part],
                class_weight,
                slope[part],
                *(None if factor is None else factor[part] for factor in objective),
                *(result[part] for result in results),
                words,
                x.stride(0),
                d.stride(0),
                settings.scale,
                settings.softcap,
            ),
            {
                "BIAS": bias is not None,
                "SOFTCAP": bool(settings.softcap),
                "SUMS": settings.sums,
                "CLASS_WEIGHT": settings.sums and class_weight is not None,
                "SQUARE": objective.square is not None,
                "ENTROPIES": settings.entropies,
                **LAUNCH,
            },
        )
        for name, factor in (("hidden", weight), ("low", b)):
            if name in by_token and factor is not None:
                by_token[name][part] = _multiply_by_parts(d, factor)
        for name, rows in (("weight", hidden), ("b", low)):
            if name in by_word and rows is not None:
                _multiply(d.t(), rows[part], by_word[name], adds=start > 0)
        if "bias" in by_word:
            share, total = d.sum(dim=0, dtype=torch.float32), by_word["bias"]
            by_word["bias"] = total.add_(share) if start else share
    missing = [hidden.new_empty(0), hidden.new_empty((0, hidden.shape[1]))]
    return Statistics._make((*results, *missing)), by_token | by_word
