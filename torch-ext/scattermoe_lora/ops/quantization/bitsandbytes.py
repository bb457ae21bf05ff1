"""NF4 and FP4 of bitsandbytes: flat blocks of elements, whose scales may be quantized themselves.

Source: ``bitsandbytes.functional`` 0.50 (``quantize_4bit``, ``QuantState``, ``dequantize_4bit``). A byte holds two
codes, the first in its upper half; ``blocksize`` consecutive elements of the flattened tensor share ``absmax``, in
float32. With ``compress_statistics`` it is itself a code: ``values[absmax] * nested_absmax + offset``, one
``nested_absmax`` for 256 of them. bitsandbytes is not imported: its state is known by its attributes.
"""

from __future__ import annotations

from typing import Any

import torch

from .formats import ELEMENTS, Format, element_values
from .stack import QuantizedStack

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = ("absmax", "blocksize", "quant_type", "dtype", "shape", "code", "state2", "offset")


def read_quant_state(codes: torch.Tensor, state: Any, name: str) -> QuantizedStack:
    """The stack of a quantized parameter with three dimensions.

    Args:
        codes: What ``quantize_4bit`` returned, of any storage dtype.
        state: Its ``QuantState``.
        name: The parameter's, for messages.

    Raises:
        ValueError: Parts that do not fit together.
        NotImplementedError: Another quantization than NF4 and FP4, or one with other values.
    """
    missing = [attribute for attribute in _STATE if not hasattr(state, attribute)]
    if missing:
        raise ValueError(
            f"{name}: expected the QuantState of bitsandbytes, got {type(state).__name__} without {', '.join(missing)}"
        )
    if state.quant_type not in ("nf4", "fp4"):
        raise NotImplementedError(f"{name}: expected bitsandbytes' nf4 or fp4, got {state.quant_type!r}")
    if state.blocksize not in BLOCK_SIZES:
        raise ValueError(
            f"{name}: expected a block size among {', '.join(map(str, BLOCK_SIZES))}, got {state.blocksize}"
        )
    shape = [] if state.shape is None else list(state.shape)
    if len(shape) != 3 or shape[2] % 2:
        raise ValueError(f"{name}: expected a shape [E, n, k] with an even k, got {shape}")
    experts, n, k = shape
    bytes_expected, codes = experts * n * k // 2, codes.detach().contiguous().view(torch.uint8)
    if codes.numel() != bytes_expected:
        raise ValueError(
            f"{name}: expected {bytes_expected} bytes of codes for a shape of {shape}, got {codes.numel()}"
        )
    _refuse_other_values(state, name)
    nested = 0
    scales: tuple[torch.Tensor, ...] = (state.absmax,)
    if state.state2 is not None:
        nested = state.state2.blocksize
        scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    if not all(isinstance(scale, torch.Tensor) for scale in scales):
        raise ValueError(f"{name}: expected tensors for its scales, got a QuantState without some of them")
    layout = Format(state.quant_type, 0, state.blocksize, nested)
    return QuantizedStack(codes.view(experts, n, k // 2), scales, layout, state.dtype).check(name)


def _refuse_other_values(state: Any, name: str) -> None:
    # Reading them on a GPU would wait for it; and there dequantize_4bit does not read them either. A graph has no place
    # for a check of numbers.
    if state.code is None or state.code.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not torch.equal(state.code.float(), element_values(state.quant_type, state.code.device)):
        raise NotImplementedError(
            f"{name}: expected the {len(ELEMENTS[state.quant_type].values)} values of bitsandbytes' "
            f"{state.quant_type}, got others"
        )


def read_parametrized(module: torch.nn.Module, name: str) -> QuantizedStack | None:
    """The stack of a parameter that ``bitsandbytes.nn.parametrize`` quantized; None where it is no such parameter.

    The parametrization, which decodes all experts, is not evaluated.

    Raises:
        ValueError, NotImplementedError: As :func:`read_quant_state`.
    """
    if not torch.nn.utils.parametrize.is_parametrized(module, name):
        return None
    parametrization: Any = module.parametrizations[name]  # type: ignore[index]
    label = f"{type(module).__name__}.{name}"
    state = getattr(parametrization[0], "quant_state", None)
    if state is None:
        return None
    if len(parametrization) > 1:
        others = ", ".join(type(step).__name__ for step in list(parametrization)[1:])
        raise NotImplementedError(f"{label}: expected no parametrization beside bitsandbytes', got {others}")
    return read_quant_state(parametrization.original, state, label)
