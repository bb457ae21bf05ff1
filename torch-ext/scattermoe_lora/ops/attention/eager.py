"""Attention of whole sequences without the operator around it, for CPU tensors at which nothing but autograd looks.

An operator that is written in Python takes tenths of a millisecond to call, which counts beside the attention of a
hundred tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from . import cpu_flash, cpu_sequence
from .arguments import Operands, Settings
from .op import attention_backward

_TENSORS = {torch.Tensor, torch.nn.Parameter}


def serves(operands: Operands, settings: Settings) -> bool:
    """Tell whether PyTorch's kernel takes the call as it is, neither compiled, traced, transformed, nor in autocast."""
    q, k, values = operands.q, operands.k, operands.values
    return (
        not torch.compiler.is_compiling()
        and q.device.type == "cpu"
        and operands.boundaries is None
        and cpu_sequence.is_whole(q, k, settings)
        and {type(q), type(k), type(values)} <= _TENSORS
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and not dispatch.use_triton(q)
    )


def attention(operands: Operands, settings: Settings) -> torch.Tensor:
    """The output alone of :func:`scattermoe_lora.ops.attention.op.attention_forward`."""
    return _Attention.apply(operands.q, operands.k, operands.values, settings)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
    ) -> torch.Tensor:
        is_causal = settings.right == 0
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse = cpu_flash.forward(q, k, v, None, is_causal, settings.scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The operator refuses a second derivative by name.
            tensors = [x.transpose(1, 2) for x in (q, k, v)]
            results = (out.transpose(1, 2), lse.contiguous())
            grads = attention_backward(
                grad_out.contiguous(), None, *tensors, None, None, *results, *ctx.settings
            )
            return *grads, None
        is_causal = ctx.settings.right == 0
        grads = cpu_flash.backward(
            grad_out.transpose(1, 2), None, q, k, v, out, lse, None, is_causal, ctx.settings.scale
        )
        if is_causal:
            # As of every implementation: the first query sees one key, whose probability is always 1.
            grads[0].select(2, 0).mul_(0)
        return *(x.transpose(1, 2) for x in grads), None
