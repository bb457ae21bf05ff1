"""Gradients in float8 (E5M2), as ``.grad`` of a parameter."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .rounding import E5M2, Float8
from .tensor import Float8Tensor


class Float8Gradient(Float8Tensor):
    """A gradient in E5M2 with the shape and dtype of its parameter.

    What is added to it is added in float32 and rounded stochastically, so that a sum of many gradients has the mean of
    the exact one; each addition moves an element by less than a quarter of the sum's absolute value (below the
    format's normal numbers, by less than ``2**-16`` of the block's scale). Multiplying it by a number, as clipping
    does, changes scales alone.
    """

    kind: ClassVar[Float8] = E5M2


def compress_gradient(parameter: torch.Tensor) -> None:
    """Rounds a parameter's gradient to float8: a hook for ``register_post_accumulate_grad_hook``.

    Gradients that are no matrices or stacks of them, and those that are compressed already, stay as they are.
    """
    gradient: Any = parameter.grad
    local = getattr(gradient, "_local_tensor", gradient)
    if isinstance(local, Float8Gradient) or local is None or local.dim() not in (2, 3):
        return
    compressed = Float8Gradient.from_dense(local.contiguous(), stochastic=True)
    if local is not gradient:
        from torch.distributed.tensor import DTensor

        compressed = DTensor.from_local(
            compressed,
            gradient.device_mesh,
            gradient.placements,
            run_check=False,
            shape=gradient.shape,
            stride=gradient.stride(),
        )
    parameter.grad = compressed
