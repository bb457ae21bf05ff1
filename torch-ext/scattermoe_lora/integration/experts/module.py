"""An experts module of transformers as the kernels see it: its weights, its biases and its gate."""

from __future__ import annotations

import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...ops import activation
from ...ops.activation import Gate
from ...ops.quantization.stack import Weight
from .quantized.read import read_stack


class Weights(NamedTuple):
    """An experts module's parameters, in the orientation of the kernels whatever the module's own.

    Attributes:
        up_name: ``gate_up_proj``, or ``up_proj`` where the module has no gate.
        up: ``[E, 2I, H]`` (``[E, I, H]`` without a gate), dense or quantized; a view where the module keeps it
            transposed.
        down: ``[E, H, I]``, likewise.
        up_bias, down_bias: ``[E, 2I]`` (``[E, I]``) and ``[E, H]``, or None.
    """

    up_name: str
    up: Weight
    down: Weight
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


def read_weights(module: Any) -> Weights:
    """The weights of an experts module (its class carries ``@use_experts_implementation``).

    Raises:
        NotImplementedError: The module lacks a parameter that its layout flags promise, or it is quantized in a way
            that is not known; the message names it.
        ValueError: Parts of a quantized parameter that do not fit together.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = _weight(module, up_name), _weight(module, "down_proj")
    up_bias = down_bias = None
    if module.has_bias:
        up_bias = _parameter(module, f"{up_name}_bias").to(up.dtype).contiguous()
        down_bias = _parameter(module, "down_proj_bias").to(down.dtype).contiguous()
    if module.is_transposed:
        up, down = up.mT, down.mT
    return Weights(up_name, up, down, up_bias, down_bias)


def _weight(module: Any, name: str) -> Weight:
    stack = read_stack(module, name)
    return _either_way_round(_parameter(module, name)) if stack is None else stack


def _parameter(module: Any, name: str) -> torch.Tensor:
    # PEFT's own path makes a property of a parameter. Asked whether the module has it, the compiler evaluates it in
    # earnest, which fills torch's cache of such properties and fails the guard that it was empty.
    try:
        parameter = getattr(module, name)
    except AttributeError:
        parameter = None
    if not isinstance(parameter, torch.Tensor):
        raise NotImplementedError(
            f"scattermoe: {type(module).__name__}: expected a parameter {name} by its layout "
            f"(has_gate={module.has_gate}, has_bias={module.has_bias}), got none; "
            'use experts_implementation="eager" for this model'
        )
    return parameter


def _either_way_round(weight: torch.Tensor) -> torch.Tensor:
    # The kernels take both orientations; whatever else (an expanded weight) is rare enough to be copied.
    return weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()


def fused_gate(module: Any) -> Gate | None:
    """The module's gate as the fused kernels know it, or None where it has one of its own or none."""
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    from transformers.integrations.moe import _default_apply_gate

    if "_apply_gate" in vars(module):
        return None
    if type(module)._apply_gate is _default_apply_gate:
        name = _activation_name(module.act_fn)
        return None if name is None else Gate(name)
    return _recognised_gate(module)


def _activation_name(act_fn: Any) -> str | None:
    from transformers import activations

    # Of these classes themselves: what is derived from one may compute anything.
    kind = type(act_fn)
    if act_fn is F.silu or kind in (torch.nn.SiLU, activations.SiLUActivation):
        return "silu"
    if kind in (activations.GELUTanh, activations.NewGELUActivation):
        return "gelu_tanh"
    if act_fn is F.gelu or kind is activations.GELUActivation:
        return "gelu"
    return None


# Of each module what its gate depends on and which gate that is; by module, for two of one class may differ.
_recognised: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[object, ...], Gate | None]] = (
    weakref.WeakKeyDictionary()
)


def mark_constants() -> None:
    """Tells torch.compile that a module's gate does not change; not at import, which the compiler would double."""
    torch.compiler.assume_constant_result(_recognised_gate)


def _recognised_gate(module: Any) -> Gate | None:
    """The gate that computes what the module's own ``_apply_gate`` computes, found by trying; None if there is none.

    The class is not asked what it is called: the parameters of the clamped gates (gpt-oss's and DeepSeek's among them)
    are read where classes keep them, and the result is compared on numbers of every size, on both sides of the limit.
    """
    act_fn = getattr(module, "act_fn", None)
    name = "silu" if act_fn is None else _activation_name(act_fn)
    if name is None:
        return None
    limit = _number(module, "limit", "swiglu_limit", default=math.inf)
    alpha = _number(module, "alpha", "swiglu_alpha", default=1.0) if name == "silu" else 1.0
    key = (type(module)._apply_gate, name, module.is_concatenated, limit, alpha)
    if module not in _recognised or _recognised[module][0] != key:
        candidates = [
            Gate(name, not module.is_concatenated, alpha, limit, shift=1.0),
            Gate(name, not module.is_concatenated, alpha, limit),
            Gate(name, not module.is_concatenated),
        ]
        _recognised[module] = key, next((gate for gate in candidates if _agrees(module, gate)), None)
    return _recognised[module][1]


def _number(module: Any, *names: str, default: float) -> float:
    values = (getattr(module, name, None) for name in names)
    return next((float(v) for v in values if isinstance(v, (int, float))), default)


def _agrees(module: Any, gate: Gate) -> bool:
    # In a thread of its own no mode of the caller's is on: under fake tensors, or with the meta device as the default,
    # the probe would have no numbers to compare.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(_agrees_on_numbers, module, gate).result()


@torch.no_grad()
def _agrees_on_numbers(module: Any, gate: Gate) -> bool:
    reaches = [1e-2, 8.0, 1e2, 1e4] + ([2.0 * gate.limit] if gate.limit != math.inf else [])
    # Steps of 37 in 128 put values of every sign and size beside each other. In float64 a gate that rounds to float32
    # on its way is seen, and kept. On the CPU wherever the weights are: nothing waits for a device, or needs one.
    steps = (torch.arange(128, device="cpu") * 37 % 128).to(torch.float64)
    probe = (steps / 64 - 1) * torch.tensor(reaches, device="cpu", dtype=torch.float64).unsqueeze(-1)
    try:
        return torch.allclose(
            module._apply_gate(probe), activation.apply(gate, probe), rtol=1e-10, atol=1e-10
        )
    except RuntimeError:
        # One with tensors of its own on another device or of other sizes, or with results of another dtype.
        return False
