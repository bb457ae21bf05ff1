"""The quantized parameters of experts modules, in whose ever way they are kept there.

None is decoded here: of a parametrization codes and state are read, and it is not evaluated.
"""

from __future__ import annotations

from typing import Any

import torch

from ....ops.float8.weight import Float8Weight
from ....ops.quantization.bitsandbytes import read_parametrized
from ....ops.quantization.float4 import read_float4, read_mxfp4
from ....ops.quantization.float8 import read_float8
from ....ops.quantization.stack import FLOATS, QuantizedStack
from ....ops.quantization.torchao import read_torchao
from .parameter import QuantizedWeight


def read_stack(module: Any, name: str) -> QuantizedStack | None:
    """The quantized stack under a parameter's name, in the module's own orientation; None where it is not quantized.

    A :class:`QuantizedWeight`, or a :class:`Float8Weight` that is trained; bitsandbytes' parametrization; transformers'
    fine-grained FP8 and packed FP4 (``{name}_scale_inv``) and MXFP4 (``{name}_blocks`` and ``{name}_scales``);
    torchao's tensors. Codes that do not say which dtype they stand for are of the config's.

    Raises:
        ValueError, NotImplementedError: Parts that do not fit together, or a format that is not known; the message
            names module, parameter, expected and got.
    """
    label = f"{type(module).__name__}.{name}"
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None and name in parametrizations:
        # Others, as PEFT's own path adds them for a while, make one dense weight of it all.
        return read_parametrized(module, name) if len(parametrizations[name]) == 1 else None
    blocks = getattr(module, f"{name}_blocks", None)
    if blocks is not None:
        stack = read_mxfp4(blocks, _scales(module, label, f"{name}_scales"), label, _dtype(module))
        return stack.mT if module.is_transposed else stack
    parameter = getattr(module, name, None)
    if isinstance(parameter, (QuantizedWeight, Float8Weight)):
        return parameter.stack
    if not isinstance(parameter, torch.Tensor):
        return None
    if hasattr(module, f"{name}_scale_inv"):
        scales = _scales(module, label, f"{name}_scale_inv")
        if parameter.dtype == torch.int8:
            return read_float4(parameter, scales, label, dtype=_dtype(module))
        parts = 2 if name == "gate_up_proj" else 1
        size = getattr(module, "block_size", None)
        return read_float8(parameter, scales, label, block_size=size, parts=parts, dtype=_dtype(module))
    return read_torchao(parameter, label)


def _scales(module: Any, label: str, name: str) -> torch.Tensor:
    scales = getattr(module, name, None)
    if not isinstance(scales, torch.Tensor):
        raise ValueError(f"{label}: expected scales under the name {name}, got none")
    return scales


def _dtype(module: Any) -> torch.dtype:
    dtype = getattr(module.config, "dtype", None)
    return dtype if dtype in FLOATS else torch.bfloat16
