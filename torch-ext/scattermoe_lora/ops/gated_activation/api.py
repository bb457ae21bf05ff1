"""The public building blocks: a gated activation as one operator, and the whole MLP around it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import dispatch
from ..activation import ACTIVATIONS
from . import op

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str = "gelu_tanh") -> torch.Tensor:
    """``act(gate) * up``: GeGLU, SwiGLU and their like (Shazeer, *GLU Variants Improve Transformer*, 2020).

    In float32 and bfloat16 each of the two steps is rounded, as PyTorch's operators do. In float16 an infinite ``gate``
    or ``up`` counts as 65,504, the largest number there is, and the product is taken in float32 and clamped to 65,280
    before it is rounded: the result is finite unless an argument is NaN. Elements that are clamped get no gradient, as
    from :func:`torch.clamp`, and all others the one that they have without clamps. The backward keeps ``gate`` and
    ``up``, and allocates the two gradients.

    Differentiable once.

    Args:
        gate, up: ``[*, I]``, any strides (halves of one projection are read in place); one dtype of float64 (on the CPU
            only), float32, bfloat16 and float16.
        activation: ``"gelu_tanh"``, ``"silu"`` or ``"gelu"``.

    Returns:
        ``[*, I]``, contiguous, of the same dtype.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together; the message names argument, expected and got.
        NotImplementedError: float64 on a GPU; forward-mode differentiation, ``torch.func.grad`` and second derivatives.
    """
    if activation not in ACTIVATIONS:
        _refuse("activation", f"one of {', '.join(ACTIVATIONS)}", activation)
    if gate.dim() == 0:
        _refuse("gate", "[*, I]", "a number without dimensions")
    if gate.dtype not in _DTYPES:
        _refuse("gate", "float64, float32, bfloat16 or float16", gate.dtype)
    if gate.shape != up.shape:
        _refuse("up", f"shape of gate, {list(gate.shape)}", list(up.shape))
    if gate.dtype != up.dtype:
        _refuse("up", f"dtype of gate, {gate.dtype}", up.dtype)
    if gate.device != up.device:
        _refuse("up", f"device of gate, {gate.device}", up.device)
    dispatch.refuse_transforms("gated_activation", gate, up)
    return op.forward(gate, up, activation)


def gated_mlp(
    x: torch.Tensor,
    gate_proj: Callable[[torch.Tensor], torch.Tensor],
    up_proj: Callable[[torch.Tensor], torch.Tensor],
    down_proj: Callable[[torch.Tensor], torch.Tensor],
    activation: str = "gelu_tanh",
) -> torch.Tensor:
    """``down_proj(act(gate_proj(x)) * up_proj(x))``, an MLP that survives float16.

    In float16, what ``down_proj`` returns that is not finite becomes 0 and gets no gradient: the token goes on with its
    residual alone. Everything else is as without, and in float32 and bfloat16 all is.

    Args:
        x: ``[*, H]``.
        gate_proj, up_proj: From ``[*, H]`` to ``[*, I]``: linear layers, with LoRA or not.
        down_proj: From ``[*, I]`` to ``[*, H]``.
        activation: As :func:`gated_activation` takes it.

    Returns:
        ``[*, H]``.

    Raises:
        ValueError, NotImplementedError: As :func:`gated_activation`.
    """
    return zero_if_infinite(down_proj(gated_activation(gate_proj(x), up_proj(x), activation)))


def zero_if_infinite(y: torch.Tensor) -> torch.Tensor:
    """``y``, in float16 with 0 for what is infinite or NaN, which then gets no gradient."""
    return y.masked_fill(y.isfinite().logical_not(), 0.0) if y.dtype == torch.float16 else y


def _refuse(name: str, expected: str, got: object) -> None:
    raise ValueError(f"gated_activation: {name}: expected {expected}, got {got}")
