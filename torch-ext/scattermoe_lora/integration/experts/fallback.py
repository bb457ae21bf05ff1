"""The operators with quantized weights made dense before the call, for as long as they take none."""

from __future__ import annotations

from typing import Any

from ...ops.experts.op import experts_forward
from ...ops.grouped_linear.op import grouped_linear_forward
from ...ops.quantization.op import decode_experts
from ...ops.quantization.stack import QuantizedStack


def _dense(operand: Any) -> Any:
    if not isinstance(operand, QuantizedStack):
        return operand
    return decode_experts(*operand.operands(), operand.dtype)


def experts(operands: Any, gate: Any, sentinels: bool, keep: bool) -> Any:
    """The experts operator of operands with dense or quantized weights."""
    return experts_forward(*map(_dense, operands), *gate, sentinels, keep)


def linear(operands: Any, top_k: int, sentinels: bool) -> Any:
    """The grouped linear operator, likewise."""
    return grouped_linear_forward(*map(_dense, operands), top_k, sentinels)
