"""The steps by which transformers makes quantized weights of what it reads: dense tensors, or codes and scales."""

from __future__ import annotations

from typing import Any

import torch

from ....ops.quantization.encode import layout_of, quantize
from ....ops.quantization.stack import QuantizedStack, concatenate
from .parameter import QuantizedWeight

try:
    from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
    from transformers.quantizers.quantizers_utils import get_module_from_name
except ImportError as error:
    raise ImportError(
        f"scattermoe: quantization in from_pretrained needs transformers 5.20 or later: {error}"
    ) from error

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""Weights of experts modules, by name."""


class Quantize(ConversionOps):
    """Makes a weight of experts quantized as it was read, and leaves others to the quantizer of linear layers."""

    # Set where a converter hands over one expert after the other, and checks their number itself.
    is_by_expert = False

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if not self.quantizer.quantizes(model, full_layer_name):
            operation = self.quantizer.linears.get_quantize_ops()
            return operation.convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        stack = quantize(weight, self.quantizer.quantization_config.quant_type, full_layer_name)
        if not self.is_by_expert:
            _check_shape(model, full_layer_name, stack)
        return {full_layer_name: _parameter(stack)}


class Deserialize(ConversionOps):
    """Makes a quantized weight of the codes and scales in a checkpoint."""

    def __init__(self, quantizer: Any) -> None:
        # transformers knows by this name that codes and scales keep their dtypes.
        self.hf_quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        module, name = get_module_from_name(model, full_layer_name)
        dense = getattr(module, name)
        missing = [part for part in part_names(name) if part not in input_dict]
        if missing:
            raise ValueError(
                f"{full_layer_name}: expected codes and scales in the checkpoint, got no {missing[0]}"
            )
        parts = (input_dict[part] for part in part_names(name))
        codes, scales = (value[0] if isinstance(value, list) else value for value in parts)
        layout = layout_of(self.hf_quantizer.quantization_config.quant_type)
        stack = QuantizedStack(codes, (scales,), layout, dense.dtype).check(full_layer_name)
        shape = getattr(dense, "_local_tensor", dense).shape
        if stack.shape != shape:
            raise ValueError(f"{full_layer_name}: expected codes of {list(shape)}, got {list(stack.shape)}")
        stack.refuse_nan(full_layer_name)
        return {full_layer_name: _parameter(stack)}

    @property
    def reverse_op(self) -> ConversionOps:
        # Saved are codes and scales by their names, which no reversed converter takes for a weight's.
        return self


class ByExpert(WeightConverter):
    """A converter of one tensor an expert, by which at most one expert of a weight is dense at a time."""

    collected_tensors: Any

    def convert(self, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        operation = self.quantization_operation
        if operation is None:
            return super().convert(layer_name, model=model, **kwargs)
        loads = dict(self.collected_tensors)
        counts = {pattern: len(tensors) for pattern, tensors in loads.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{layer_name}: expected as many experts in the checkpoint of each projection, got "
                + ", ".join(f"{count} of {pattern}" for pattern, count in counts.items())
            )
        if not operation.quantizer.has_blocks_by_expert(model, layer_name):
            return super().convert(layer_name, model=model, **kwargs)
        operation.is_by_expert = True
        stacks: list[QuantizedStack] = []
        for one in zip(*loads.values(), strict=True):
            tensors = [load() for load in one]
            if tensors[0] is None:
                continue  # Another process has this expert.
            self.collected_tensors = {
                pattern: [lambda tensor=tensor: tensor]
                for pattern, tensor in zip(loads, tensors, strict=True)
            }
            ((name, parameter),) = super().convert(layer_name, model=model, **kwargs).items()
            stacks.append(parameter.stack)
        self.collected_tensors = {}
        stack = concatenate(stacks)
        _check_shape(model, name, stack)
        return {name: _parameter(stack)}


def by_expert(conversion: Any) -> Any:
    """The conversion, one expert at a time if it merges experts of which each has tensors of its own."""
    if type(conversion) is not WeightConverter or not isinstance(conversion.operations[0], MergeModulelist):
        return conversion
    if conversion._original_target_patterns[0].rpartition(".")[2] not in PARAMETERS:
        return conversion
    converter = ByExpert(
        list(conversion._original_source_patterns),
        list(conversion._original_target_patterns),
        list(conversion.operations),
        conversion.force_cpu,
    )
    converter.scope_prefix = conversion.scope_prefix
    converter.base_model_prefix = conversion.base_model_prefix
    return converter


def _check_shape(model: Any, name: str, stack: QuantizedStack) -> None:
    """Raises ValueError for a weight that is not of its parameter's shape: experts or projections are missing."""
    module, parameter = get_module_from_name(model, name)
    dense = getattr(module, parameter)
    # Of one that processes share, this one has a part.
    if not hasattr(dense, "placements") and stack.shape != dense.shape:
        raise ValueError(
            f"{name}: expected weights of {list(dense.shape)} in the checkpoint, got {list(stack.shape)}"
        )


def part_names(name: str) -> list[str]:
    return [f"{name}_codes", f"{name}_scales"]


def _parameter(stack: QuantizedStack) -> torch.nn.Parameter:
    return torch.nn.Parameter(QuantizedWeight(stack), requires_grad=False)


def keep_saved_names(model: Any) -> None:
    """Takes the reading of codes out of what ``save_pretrained`` reverses, which would take dense weights for them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        return
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not any(isinstance(operation, Deserialize) for operation in getattr(conversion, "operations", ()))
    ]
    if not model._weight_conversions:
        # transformers then takes its own for the model's class.
        del model._weight_conversions
