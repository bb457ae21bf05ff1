"""Attention without the operator around it, for CPU tensors at which nothing but autograd looks.

An operator that is written in Python takes 0.1 ms to call, and 0.4 ms with its backward: as long as the attention of
128 tokens itself.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from . import cpu
from .arguments import Operands, Settings
from .op import attention_backward, attention_forward


def attention(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of :func:`scattermoe_lora.ops.attention.op.attention_forward`."""
    if operands.boundaries is not None or not _is_plain(operands):
        return attention_forward(*operands, *settings)
    return _Attention.apply(*operands[:3], settings)


def _is_plain(operands: Operands) -> bool:
    """Tell whether CPU code may compute at once: neither compiled, traced, transformed, nor under autocast."""
    q, k, v, *_ = operands
    return (
        not torch.compiler.is_compiling()
        and q.device.type == "cpu"
        and all(x is None or type(x) in (torch.Tensor, torch.nn.Parameter) for x in (q, k, v))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and not dispatch.use_triton(q)
    )


class _Attention(torch.autograd.Function):
    """The operator's derivative, by the same code."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, settings: Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = cpu.forward(Operands(q, k, v, None, None), settings)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Any:
        if grad_out is None and grad_lse is None:
            return None, None, None, None
        *tensors, out, lse = ctx.saved_tensors
        operands, settings = Operands(tensors[0], tensors[1], tensors[2], None, None), ctx.settings
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        if torch.is_grad_enabled():
            # The operator refuses a second derivative by name.
            grads = attention_backward(grad_out, grad_lse, *operands, out, lse, *settings)
        else:
            grads = cpu.backward(grad_out, grad_lse, operands, out, lse, settings)
        return *grads[:2], None if operands.v is None else grads[2], None
