"""The public building block: a differentiable per-expert linear with optional low-rank factors."""

from __future__ import annotations

import torch

from .. import dispatch
from ..quantization.stack import QuantizedStack
from ..routing import sort_by_expert
from .arguments import Operands
from .op import linear


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedStack,
    expert_index: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[t, k] = (W[e] + scaling * B[e] A[e]) x[t] + bias[e]``, ``e = expert_index[t, k]``, never forming that sum.

    Differentiable in ``x``, ``weight``, ``lora_a``, ``lora_b`` and ``bias``; where ``weight`` does not require a
    gradient nothing of its size is allocated, forward or backward. The same input gives the same bits.

    Args:
        x: ``[T, N_in]``, or ``[T, K, N_in]`` where each token-expert pair has a row of its own; float64, float32,
            bfloat16 or float16, on the device of all other arguments.
        weight: ``[E, N_out, N_in]``, dtype of ``x``; or a quantized stack that stands for that, which has no gradient:
            its matrices are decoded when they are multiplied.
        expert_index: ``[T, K]``, int32 or int64. Values ``>= E`` are sentinels: zeros come out and no work is done.
        lora_a: ``[E, r, N_in]``, any floating dtype; used in the dtype of ``x``.
        lora_b: ``[E, N_out, r]``, likewise; given with ``lora_a`` or not at all.
        scaling: Factor of the low-rank update (LoRA's ``alpha / r``).
        bias: ``[E, N_out]``, dtype of ``x``.

    Returns:
        ``[T, K, N_out]``, dtype of ``x``.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together; the message names argument, expected and got.
        NotImplementedError: A quantized weight whose scales require a gradient; forward-mode differentiation,
            ``torch.func.grad`` and second derivatives.
    """
    _check(x, weight, expert_index, lora_a, lora_b, bias)
    dense = None if isinstance(weight, QuantizedStack) else weight
    dispatch.refuse_transforms("grouped_linear", x, dense, lora_a, lora_b, bias)
    tokens, top_k = expert_index.shape
    if lora_a is not None and lora_b is not None:
        lora_a = lora_a.to(x.dtype).contiguous()
        lora_b = (lora_b * scaling).to(x.dtype).contiguous()
    order, offsets = sort_by_expert(expert_index, weight.shape[0])
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if dense is not None and not dense.mT.is_contiguous():
        weight = dense.contiguous()
    bias = None if bias is None else bias.contiguous()
    y, _ = linear(Operands(rows, weight, lora_a, lora_b, bias, order, offsets), top_k, True)
    return y.view(tokens, top_k, weight.shape[1])


def _expect(name: str, quality: str, expected: object, got: object) -> None:
    if expected != got:
        raise ValueError(f"grouped_linear: {name}: expected {quality} {expected}, got {got}")


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedStack,
    expert_index: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    if expert_index.dim() != 2 or expert_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "grouped_linear: expert_index: expected [T, K] of int32 or int64, "
            f"got {list(expert_index.shape)} of {expert_index.dtype}"
        )
    if isinstance(weight, QuantizedStack):
        weight.check("grouped_linear: weight")
    elif weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"grouped_linear: weight: expected [E, N_out, N_in], got {list(weight.shape)}")
    experts, n_out, n_in = weight.shape
    leading = list(expert_index.shape) if x.dim() == 3 else [expert_index.shape[0]]
    _expect("x", "shape", [*leading, n_in], list(x.shape))
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"grouped_linear: x: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    _expect("weight", "dtype of x,", x.dtype, weight.dtype)
    if (lora_a is None) != (lora_b is None):
        raise ValueError("grouped_linear: lora_a and lora_b are given together or not at all")
    tensors: dict[str, torch.Tensor | QuantizedStack] = {"weight": weight, "expert_index": expert_index}
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[1] if lora_a.dim() == 3 else 0
        if rank == 0:
            raise ValueError(
                f"grouped_linear: lora_a: expected [E, r, N_in] with r >= 1, got {list(lora_a.shape)}"
            )
        _expect("lora_a", "shape", [experts, rank, n_in], list(lora_a.shape))
        _expect("lora_b", "shape", [experts, n_out, rank], list(lora_b.shape))
        tensors |= {"lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        _expect("bias", "shape", [experts, n_out], list(bias.shape))
        _expect("bias", "dtype of x,", x.dtype, bias.dtype)
        tensors |= {"bias": bias}
    for name, tensor in tensors.items():
        _expect(name, "device", x.device, tensor.device)
