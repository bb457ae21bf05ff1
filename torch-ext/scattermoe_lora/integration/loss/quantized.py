"""The weight of a head that bitsandbytes keeps in 4 bits, decoded some rows at a time."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ...ops.linear_cross_entropy.decoded import DecodedWeight


def layer_class() -> type[torch.nn.Module] | None:
    """bitsandbytes' linear layer with a weight of 4 bits; None where nobody has imported it."""
    # Its layer of 8 bits rounds the input, too, so that its logits are not those of the decoded weight.
    return getattr(sys.modules.get("bitsandbytes.nn"), "Linear4bit", None)


def decoded_weight(layer: Any, dtype: torch.dtype) -> DecodedWeight | str:
    """The weight of a :func:`layer_class` in ``dtype``, or the reason why its rows cannot be decoded apart."""
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight, state = layer.weight, layer.weight.quant_state
    if state is None or type(weight).__name__ != "Params4bit":
        return "its weight is not quantized yet"
    words, width = state.shape
    if width % state.blocksize:
        return f"its rows of {width} are no multiple of its blocks of {state.blocksize}"
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    packed, blocks = weight.detach().view(torch.uint8).view(words, -1), scales.view(words, -1)

    def decode(start: int, stop: int) -> torch.Tensor:
        part = functional.QuantState(
            absmax=blocks[start:stop].flatten(),
            shape=torch.Size((stop - start, width)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        rows: torch.Tensor = functional.dequantize_4bit(packed[start:stop].reshape(-1, 1), part)
        return rows.to(dtype)

    return DecodedWeight((words, width), dtype, weight.device, decode)
