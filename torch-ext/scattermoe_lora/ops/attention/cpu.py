"""Native CPU implementation: a batch of equal sequences at once, packed ones one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import cpu_sequence
from .arguments import Operands, Settings


def forward(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_forward`."""
    q, k, v = operands.q, operands.k, operands.values
    if operands.boundaries is None:
        return cpu_sequence.forward(q, k, v, settings)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[1::-1], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys in _packed(operands):
        results = cpu_sequence.forward(q[None, rows], k[None, keys], v[None, keys], settings)
        out[rows], lse[:, rows] = (x.squeeze(0) for x in results)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_backward`."""
    q, k, v = operands.q, operands.k, operands.values
    if operands.boundaries is None:
        grads = cpu_sequence.backward(grad_out, grad_lse, q, k, v, out, lse, settings)
        return grads[0], *_of_keys(operands, *grads[1:])
    dq, dk = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k))
    dv = k.new_zeros(0 if operands.v is None else k.shape)
    for rows, keys in _packed(operands):
        grads = cpu_sequence.backward(
            grad_out[None, rows],
            None if grad_lse is None else grad_lse[None, :, rows],
            q[None, rows],
            k[None, keys],
            v[None, keys],
            out[None, rows],
            lse[None, :, rows],
            settings,
        )
        dq[rows] = grads[0][0]
        dk[keys], part = (x.squeeze(0) for x in _of_keys(operands, *grads[1:]))
        if operands.v is not None:
            dv[keys] = part
    return dq, dk, dv


def _packed(operands: Operands) -> Iterator[tuple[slice, slice]]:
    """The rows of each sequence's queries and keys."""
    assert operands.boundaries is not None
    starts_q, starts_k = (boundaries.tolist() for boundaries in operands.boundaries)
    for i in range(len(starts_q) - 1):
        yield slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])


def _of_keys(operands: Operands, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients in the operands' dtype; where the keys are the values, the sum of both, and nothing."""
    dtype = operands.k.dtype
    if operands.v is None:
        return dk.to(torch.promote_types(dtype, torch.float32)).add(dv).to(dtype), dk.new_empty(
            0, dtype=dtype
        )
    return dk.to(dtype), dv.to(dtype)
