"""torchao's tensor subclasses that hold a stack in one of the formats: float8, MXFP8, MXFP4 and NVFP4.

Source: torchao 0.18, ``Float8Tensor``, ``MXTensor`` and ``NVFP4Tensor``. torchao is not imported: whoever made such a
tensor has imported it. Its ``NF4Tensor`` holds no more than two dimensions, so it cannot hold a stack.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from .float4 import read_float4
from .float8 import read_float8
from .stack import QuantizedStack

_FLOAT8 = ("torchao.quantization.quantize_.workflows.float8.float8_tensor", "Float8Tensor")
_MX = ("torchao.prototype.mx_formats.mx_tensor", "MXTensor")
_NVFP4 = ("torchao.prototype.mx_formats.nvfp4_tensor", "NVFP4Tensor")


def _is_instance(tensor: torch.Tensor, kind: tuple[str, str]) -> bool:
    module, name = kind
    return isinstance(tensor, getattr(sys.modules.get(module), name, ()))


def read_torchao(tensor: Any, name: str) -> QuantizedStack | None:
    """The stack that a torchao tensor holds; None for a tensor that is not torchao's.

    Raises:
        ValueError: Parts that do not fit together.
        NotImplementedError: Another subclass, element type or order of scales; the message names it.
    """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return None
    if _is_instance(tensor, _FLOAT8):
        # Of a square matrix the scales of rows and those of columns have the same sizes.
        block = tensor.block_size and tensor.block_size[-2:]
        return read_float8(tensor.qdata, tensor.scale, name, block_size=block, dtype=tensor.dtype)
    if _is_instance(tensor, _NVFP4):
        _refuse_swizzled(tensor, name)
        return read_float4(
            tensor.qdata,
            tensor.scale,
            name,
            factor=tensor.per_tensor_scale,
            block=tensor.block_size,
            dtype=tensor.dtype,
        )
    if _is_instance(tensor, _MX):
        _refuse_swizzled(tensor, name)
        if tensor.elem_dtype == torch.float4_e2m1fn_x2:
            return read_float4(tensor.qdata, tensor.scale, name, block=tensor.block_size, dtype=tensor.dtype)
        blocks = (1, tensor.block_size)
        return read_float8(tensor.qdata, tensor.scale, name, block_size=blocks, dtype=tensor.dtype)
    if type(tensor).__module__.partition(".")[0] == "torchao":
        raise NotImplementedError(
            f"{name}: expected one of torchao's Float8Tensor, MXTensor and NVFP4Tensor, got {type(tensor).__name__}"
        )
    return None


def _refuse_swizzled(tensor: Any, name: str) -> None:
    if tensor.is_swizzled_scales:
        raise NotImplementedError(
            f"{name}: expected scales in the order of rows, got {type(tensor).__name__} with swizzled ones; quantize "
            "with is_swizzled_scales=False"
        )
