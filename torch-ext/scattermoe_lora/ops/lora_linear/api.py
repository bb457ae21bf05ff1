"""The public building block: dense projections of one input with their low-rank adapters, in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import dispatch
from . import op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_Factors = torch.Tensor | Sequence[torch.Tensor] | None


class Pair(NamedTuple):
    """Factors that are added to a projection: ``scaling * dropout(x) A^T B^T``.

    Attributes:
        projection: Its position among the projections.
        a, b: ``[r, N_in]`` and ``[N_p, r]``.
        scaling: The product's factor.
        dropout: The probability with which an element of ``x`` is dropped, for this pair alone.
    """

    projection: int
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0


class Bias(NamedTuple):
    """``scaling * value``, ``[N_p]``, added to a projection."""

    projection: int
    value: torch.Tensor
    scaling: float = 1.0


def lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    lora_a: Sequence[_Factors],
    lora_b: Sequence[_Factors],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    scaling: float | Sequence[float | Sequence[float]] = 1.0,
    dropout: float = 0.0,
) -> list[torch.Tensor]:
    """Linear projections of one input, each with the low-rank adapters that LoRA (Hu et al., 2021) adds to it.

    ``y_p = x W_p^T + b_p + sum_i s_i dropout_i(x) A_i^T B_i^T`` for each projection ``p`` (queries, keys and values of
    a layer; gate and up). The low-rank factors A of all projections multiply ``x`` in one product, and every term is
    added to its sum in place, forward and backward. For the backward ``x`` is kept and ``[T, r]``, nothing else: masks
    of dropout are drawn again. A weight that needs no gradient costs none.

    Differentiable once in ``x``, weights, biases and factors. The same input gives the same bits. Under autocast it
    computes in autocast's dtype, as ``torch.nn.functional.linear`` does.

    Args:
        x: ``[..., N_in]``: float64, float32, bfloat16 or float16.
        weights: ``[N_p, N_in]`` each, of the dtype of ``x``.
        lora_a, lora_b: For each projection ``[r, N_in]`` and ``[N_p, r]``, of any of the dtypes, cast to that of ``x``;
            a sequence of them for several adapters; None for none. The gradients are in their own dtypes.
        biases: ``[N_p]`` or None for each projection; None for none.
        scaling: The factor of every adapter (``alpha / r``; ``alpha / sqrt(r)`` for rsLoRA); or for each projection one
            factor, or one for each of its adapters.
        dropout: The probability with which an element of ``x`` is dropped on its way to an adapter, drawn for each
            adapter; in [0, 1). Its masks come from torch's generator of the CPU.

    Returns:
        ``[..., N_p]`` for each projection, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: Shapes, dtypes, devices or numbers that do not fit together; the message names argument, expected
            and got.
        NotImplementedError: Forward-mode differentiation, ``torch.func.grad`` and second derivatives.
    """
    count = len(weights)
    if not count:
        _refuse("weights", "one at least", "none")
    for name, values in (("lora_a", lora_a), ("lora_b", lora_b), ("biases", biases)):
        if values is not None and len(values) != count:
            _refuse(name, f"one entry for each of the {count} weights", len(values))
    if not 0 <= dropout < 1:
        _refuse("dropout", "a probability in [0, 1)", dropout)
    pairs = []
    for p in range(count):
        a_s, b_s = _listed(lora_a[p]), _listed(lora_b[p])
        if len(a_s) != len(b_s):
            _refuse(f"lora_b[{p}]", f"as many factors as lora_a[{p}] has, {len(a_s)}", len(b_s))
        own = scaling if isinstance(scaling, int | float) else scaling[p] if p < len(scaling) else ()
        factors = [own] * len(a_s) if isinstance(own, int | float) else list(own)
        if len(factors) != len(a_s):
            _refuse(f"scaling[{p}]", f"one factor for each of {len(a_s)} adapters", len(factors))
        pairs += [Pair(p, a, b, float(s), dropout) for a, b, s in zip(a_s, b_s, factors, strict=True)]
    values = [None] * count if biases is None else biases
    named = [Bias(p, bias) for p, bias in enumerate(values) if bias is not None]
    _check(x, weights, pairs, named)
    return project(x, weights, pairs, named)


def project(
    x: torch.Tensor, weights: Sequence[torch.Tensor], pairs: Sequence[Pair], biases: Sequence[Bias]
) -> list[torch.Tensor]:
    """:func:`lora_linear` of what is known to fit together, with dropout for each pair.

    Args:
        x: ``[..., N_in]``.
        weights: ``[N_p, N_in]`` each.
        pairs: In the order of their projections.
        biases: Any number for a projection.
    """
    tensors = [x, *weights, *(t for pair in pairs for t in pair[1:3]), *(bias.value for bias in biases)]
    dispatch.refuse_transforms("lora_linear", *tensors)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    dropped = any(pair.dropout for pair in pairs)
    # Of the CPU on every device: reading it waits for nothing. A checkpoint restores that generator, too.
    seed = torch.randint(2**63 - 1, (), device="cpu") if dropped else None
    results, _ = op.forward(
        x.reshape(-1, x.shape[-1]),
        list(weights),
        [pair.a for pair in pairs],
        [pair.b for pair in pairs],
        [bias.value for bias in biases],
        seed,
        [pair.projection for pair in pairs],
        [pair.scaling for pair in pairs],
        [pair.dropout for pair in pairs],
        [bias.projection for bias in biases],
        [bias.scaling for bias in biases],
    )
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]


def _listed(factors: _Factors) -> list[torch.Tensor]:
    if factors is None:
        return []
    return [factors] if isinstance(factors, torch.Tensor) else list(factors)


def _refuse(name: str, expected: str, got: object) -> None:
    raise ValueError(f"lora_linear: {name}: expected {expected}, got {got}")


def _check(
    x: torch.Tensor, weights: Sequence[torch.Tensor], pairs: Sequence[Pair], biases: Sequence[Bias]
) -> None:
    if x.dim() == 0:
        _refuse("x", "[..., N_in]", list(x.shape))
    if x.dtype not in DTYPES:
        _refuse("x", "float64, float32, bfloat16 or float16", x.dtype)
    n_in = x.shape[-1]
    tensors = [(f"weights[{p}]", weight) for p, weight in enumerate(weights)]
    for name, weight in tensors:
        if weight.dim() != 2 or weight.shape[1] != n_in:
            _refuse(name, f"shape [N_p, {n_in}]", list(weight.shape))
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            _refuse(name, f"dtype of x, {x.dtype}", weight.dtype)
    for p, a, b, *_ in pairs:
        n_out = weights[p].shape[0]
        if a.dim() != 2 or a.shape[1] != n_in:
            _refuse(f"lora_a[{p}]", f"shape [r, {n_in}]", list(a.shape))
        if b.shape != (n_out, a.shape[0]):
            _refuse(f"lora_b[{p}]", f"shape [{n_out}, {a.shape[0]}]", list(b.shape))
        tensors += [(f"lora_a[{p}]", a), (f"lora_b[{p}]", b)]
    for p, bias, _ in biases:
        n_out = weights[p].shape[0]
        if bias.shape != (n_out,):
            _refuse(f"biases[{p}]", f"shape [{n_out}]", list(bias.shape))
        tensors.append((f"biases[{p}]", bias))
    for name, tensor in tensors:
        if tensor.dtype not in DTYPES:
            _refuse(name, "float64, float32, bfloat16 or float16", tensor.dtype)
        if tensor.device != x.device:
            _refuse(name, f"device of x, {x.device}", tensor.device)
