"""The weight of a quantized head, decoded some rows at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ...ops.linear_cross_entropy.decoded import DecodedWeight
from ...ops.quantization.decode import decode
from ...ops.quantization.float8 import read_float8
from ...ops.quantization.stack import FLOATS, QuantizedStack

_Reader = Callable[[Any, torch.dtype], DecodedWeight | str]


def find_reader(layer: torch.nn.Module) -> tuple[type[torch.nn.Module], _Reader] | None:
    """The class that defines a quantized linear layer's forward, and the reader of its weight; None of another layer.

    A reader takes the layer and a dtype, and returns the weight decoded to that, or the reason why its rows cannot be.
    Nothing is imported: whoever made a layer of a class has imported that.
    """
    for module, name, reader in _CLASSES:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(layer, kind):
            return kind, reader
    tensor = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", None)
    if tensor is not None and isinstance(layer, torch.nn.Linear) and isinstance(layer.weight, tensor):
        return torch.nn.Linear, _read_torchao
    return None


def _read_4_bits(layer: Any, dtype: torch.dtype) -> DecodedWeight | str:
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight, state = layer.weight, layer.weight.quant_state
    if state is None or type(weight).__name__ != "Params4bit":
        return "the head's weight is not quantized yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes packed the head's weight for inference, which an evaluation on a CPU makes it do"
    words, width = state.shape
    if width % state.blocksize:
        return f"the head's rows of {width} are no multiple of its blocks of {state.blocksize}"
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    packed, blocks = weight.detach().view(torch.uint8).view(words, -1), scales.view(words, -1)

    def rows(start: int, stop: int) -> torch.Tensor:
        part = functional.QuantState(
            absmax=blocks[start:stop].flatten(),
            shape=torch.Size((stop - start, width)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        result: torch.Tensor = functional.dequantize_4bit(packed[start:stop].reshape(-1, 1), part)
        return result.to(dtype)

    return DecodedWeight((words, width), dtype, weight.device, rows)


def _read_8_bits(layer: Any, dtype: torch.dtype) -> DecodedWeight | str:
    state, weight = layer.state, layer.weight
    # The first call of the layer moves codes and scales from its weight to its state.
    codes, scales = (state.CB, state.SCB) if weight.CB is None else (weight.CB, weight.SCB)
    if state.has_fp16_weights or codes is None:
        return "the head's weight is not quantized yet"
    # As the layer decodes it.
    factors = scales.unsqueeze(1).mul(1.0 / 127.0)

    def rows(start: int, stop: int) -> torch.Tensor:
        result: torch.Tensor = codes[start:stop].to(dtype).mul_(factors[start:stop])
        return result

    return DecodedWeight(tuple(codes.shape), dtype, codes.device, rows)


def _read_float8(layer: Any, dtype: torch.dtype) -> DecodedWeight | str:
    weight = layer.weight
    if weight.dtype != torch.float8_e4m3fn or not weight.is_contiguous():
        return f"the head's weight is {weight.dtype}, not float8_e4m3fn in the order of its rows"
    stack = read_float8(
        weight.unsqueeze(0),
        layer.weight_scale_inv,
        "lm_head.weight",
        block_size=layer.block_size,
        dtype=dtype if dtype in FLOATS else torch.float32,
    )

    def rows(start: int, stop: int) -> torch.Tensor:
        height = stack.format.rows
        first, last = _whole_blocks(start, stop, height, weight.shape[0])
        scales = stack.scales[0][:, first // height : -(-last // height)]
        part = QuantizedStack(stack.codes[:, first:last], (scales,), stack.format, stack.dtype)
        return decode(part, [0])[0, start - first : stop - first].to(dtype)

    return DecodedWeight(tuple(weight.shape), dtype, weight.device, rows)


def _read_torchao(layer: Any, dtype: torch.dtype) -> DecodedWeight | str:
    weight = layer.weight.detach()
    kind, words = type(weight).__name__, weight.shape[0]
    # Of these the library's own product has no gradient for its input.
    for attribute in ("act_quant_kwargs", "activation_quantization", "act_pre_scale"):
        if getattr(weight, attribute, None) is not None:
            return f"the head's weight is a {kind} that changes the input, too ({attribute})"
    block = getattr(weight, "block_size", 1)
    height = 1 if isinstance(block, int) else block[0]

    def rows(start: int, stop: int) -> torch.Tensor:
        # Where the library slices through a block, it takes another's scale.
        first, last = _whole_blocks(start, stop, height, words)
        result: torch.Tensor = weight[first:last].dequantize()[start - first : stop - first]
        return result.to(dtype)

    try:
        rows(0, 1)
    except (NotImplementedError, AttributeError) as error:
        return f"no rows can be decoded of the head's weight, a {kind}: {error}"
    return DecodedWeight(tuple(weight.shape), dtype, weight.device, rows)


def _whole_blocks(start: int, stop: int, height: int, words: int) -> tuple[int, int]:
    """The rows of the blocks, ``height`` rows each of ``words``, that the rows from ``start`` to ``stop`` are in.

    Of a block that is the whole weight any rows have the one scale.
    """
    if height >= words:
        return start, stop
    return start // height * height, min(-(-stop // height) * height, words)


_CLASSES: tuple[tuple[str, str, _Reader], ...] = (
    ("bitsandbytes.nn", "Linear4bit", _read_4_bits),
    ("bitsandbytes.nn", "Linear8bitLt", _read_8_bits),
    ("transformers.integrations.finegrained_fp8", "FP8Linear", _read_float8),
)
