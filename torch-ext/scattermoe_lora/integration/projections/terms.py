"""The terms that PEFT's LoRA adds to a linear layer, read from its module, or the reason why they are left to PEFT."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...ops.lora_linear.api import DTYPES, Bias, Pair, project
from ..fused_classes import is_plain


class Terms(NamedTuple):
    """The active adapters of one module.

    Attributes:
        pairs, biases: Of projection 0. Those of the base layer are among the biases where ``weight`` is given.
        weight: ``[N_out, N_in]`` of a base layer that computes no more than ``x W^T + b``; None where the base layer
            has to be called.
    """

    pairs: list[Pair]
    biases: list[Bias]
    weight: torch.Tensor | None

    @property
    def has_dropout(self) -> bool:
        """True if a mask is drawn for the input."""
        return any(pair.dropout for pair in self.pairs)

    def needs_gradient(self, x: torch.Tensor) -> bool:
        """True if ``x``, or a factor, needs one."""
        return x.requires_grad or any(a.requires_grad or b.requires_grad for _, a, b, *_ in self.pairs)

    def key(self) -> tuple[object, ...]:
        """What the result depends on, beside the input: the same key, the same result."""
        pairs = [(id(a), a._version, id(b), b._version, s, p) for _, a, b, s, p in self.pairs]
        biases = [(id(value), value._version, s) for _, value, s in self.biases]
        weight = None if self.weight is None else (id(self.weight), self.weight._version)
        return (*pairs, *biases, weight)


def _is_plain_tensor(tensor: Any) -> bool:
    """True of a tensor whose values are its own: no subclass that shards or quantizes them."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype in DTYPES


def project_alone(x: torch.Tensor, own: Terms) -> torch.Tensor:
    """The projection of ``x`` ``[..., N_in]`` by a weight with its terms."""
    assert own.weight is not None
    return project(x, [own.weight], own.pairs, own.biases)[0]


def read(module: Any, x: torch.Tensor) -> Terms | str | None:
    """The terms for a call with ``x``; a reason why PEFT's own forward has to run; or None where no adapter is active.

    Args:
        module: A ``peft.tuners.lora.LoraLayer`` around a linear layer.
        x: ``[..., N_in]``.
    """
    if module.disable_adapters or module.merged:
        return None
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks on all modules are registered"
    pairs: list[Pair] = []
    biases: list[Bias] = []
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None or module.use_dora.get(adapter):
            return f"adapter {adapter} is of another kind than LoRA ({type(variant).__name__})"
        a, b, dropout = module.lora_A[adapter], module.lora_B[adapter], module.lora_dropout[adapter]
        if type(a) is not torch.nn.Linear or type(b) is not torch.nn.Linear:
            return f"the factors of adapter {adapter} are a {type(a).__name__} and a {type(b).__name__}"
        if type(dropout) not in (torch.nn.Identity, torch.nn.Dropout):
            return f"the dropout of adapter {adapter} is a {type(dropout).__name__}"
        if not (is_plain(a) and is_plain(b) and is_plain(dropout)):
            return f"adapter {adapter} has hooks"
        if not (_is_plain_tensor(a.weight) and _is_plain_tensor(b.weight)):
            return f"the factors of adapter {adapter} are {type(a.weight).__name__} of {a.weight.dtype}"
        if a.weight.device != x.device or b.weight.device != x.device:
            return f"adapter {adapter} is on {a.weight.device}, its input on {x.device}"
        probability = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
        if probability >= 1:
            return f"adapter {adapter} drops everything"
        scaling = float(module.scaling[adapter])
        pairs.append(Pair(0, a.weight, b.weight, scaling, probability))
        if b.bias is not None:
            biases.append(Bias(0, b.bias, scaling))
    if not pairs:
        return None
    weight = _weight(module.base_layer, x)
    if weight is not None and module.base_layer.bias is not None:
        biases.insert(0, Bias(0, module.base_layer.bias))
    return Terms(pairs, biases, weight)


def _weight(base: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The weight of a base layer that computes no more than ``x W^T + b`` in the dtype of ``x``; None of another."""
    if type(base) is not torch.nn.Linear or not is_plain(base):
        return None
    tensors = [base.weight] if base.bias is None else [base.weight, base.bias]
    if not all(map(_is_plain_tensor, tensors)) or any(tensor.device != x.device for tensor in tensors):
        return None
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return base.weight
    return base.weight if all(tensor.dtype == x.dtype for tensor in tensors) else None
