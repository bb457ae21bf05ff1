"""Experts quantized while transformers loads them: a quantizer, and its configuration, for ``from_pretrained``.

Linear layers are another quantizer's (bitsandbytes' for example), or stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch

from ....ops.quantization.encode import FORMATS, layout_of, quantize
from ....ops.quantization.stack import QuantizedStack, concatenate
from .parameter import QuantizedWeight

try:
    from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
    from transformers.modeling_utils import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"scattermoe: quantization in from_pretrained needs transformers 5.20 or later: {error}"
    ) from error

METHOD = "scattermoe"
"""The quantization method that ``config.json`` names."""

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


class ExpertsQuantizationConfig(QuantizationConfigMixin):
    """The configuration that ``config.json`` keeps; :func:`.loading.quantization_config` makes one.

    Attributes:
        replaced: The classes of configuration and quantizer that another build registered before this one.

    Raises:
        ValueError: An unknown format; a string instead of a list of modules to skip.
    """

    replaced: ClassVar[list[Any] | None] = None

    def __init__(
        self,
        quant_type: str = "nf4",
        linears: QuantizationConfigMixin | dict[str, Any] | None = None,
        skip_modules: Sequence[str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_type not in FORMATS:
            raise ValueError(
                f"quantization_config: quant_type: expected one of {', '.join(FORMATS)}, got {quant_type!r}"
            )
        if isinstance(skip_modules, str):
            raise ValueError(
                f"quantization_config: skip_modules: expected a list of names, got the string {skip_modules!r}"
            )
        self.quant_method = quant_method
        self.quant_type = quant_type
        self.linears = AutoQuantizationConfig.from_dict(linears) if isinstance(linears, dict) else linears
        self.skip_modules = list(skip_modules or ())

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON has them."""
        linears = None if self.linears is None else self.linears.to_dict()
        return {**vars(self), "linears": linears}


class ExpertsQuantizer(HfQuantizer):
    """Quantizes the weights of experts modules; of all others it asks the quantizer of the linear layers, if any."""

    quantization_config: ExpertsQuantizationConfig

    def __init__(self, quantization_config: ExpertsQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # With a configuration that quantizes nothing but the experts, each question is for the base class to answer.
        self.linears: HfQuantizer = (
            _Dense(quantization_config, pre_quantized=self.pre_quantized)
            if quantization_config.linears is None
            else AutoHfQuantizer.from_config(quantization_config.linears, pre_quantized=self.pre_quantized)
        )

    def quantizes(self, model: torch.nn.Module, name: str) -> bool:
        """True if ``name`` is a weight of experts, and not of a module to skip."""
        module, parameter = get_module_from_name(model, name)
        path = name.rpartition(".")[0]
        return (
            parameter in _PARAMETERS
            and hasattr(module, "has_gate")
            and should_convert_module(path, self.quantization_config.skip_modules)
        )

    def has_blocks_by_expert(self, model: torch.nn.Module, name: str) -> bool:
        """True if no block of a quantized weight holds elements of two experts."""
        layout = layout_of(self.quantization_config.quant_type)
        module, parameter = get_module_from_name(model, name)
        return not layout.is_flat or getattr(module, parameter)[0].numel() % layout.columns == 0

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.quantizes(model, param_name) or self.linears.param_needs_quantization(
            model, param_name, **kwargs
        )

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self.quantizes(model, param_name):
            # An eighth for the scales is plenty.
            return 1.125 if self.quantization_config.quant_type == "fp8" else 0.5625
        return self.linears.param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = self.linears.update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            return [_by_expert(conversion) for conversion in conversions]
        own = [WeightConverter(_part_names(name), name, [_Deserialize(self)]) for name in _PARAMETERS]
        return [*conversions, *own]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        keep_saved_names(model)
        if not any(
            isinstance(getattr(parameter, "_local_tensor", parameter), QuantizedWeight)
            for parameter in model.parameters()
        ):
            detach(model)  # Merging made the last of the experts dense.
        layout = layout_of(self.quantization_config.quant_type)
        state, metadata = self.linears.get_state_dict_and_metadata(model)
        parts: dict[str, torch.Tensor] = {}
        for name, tensor in (model.state_dict() if state is None else state).items():
            if isinstance(tensor, QuantizedWeight):
                if tensor.stack.format != layout:
                    raise ValueError(
                        f"{name}: expected the format of the model's quantization_config, "
                        f"{self.quantization_config.quant_type} ({layout}), got {tensor.stack.format}; a checkpoint "
                        "has one format"
                    )
                codes, (scales,), _ = tensor.stack.operands()
                parts |= zip(_part_names(name), (codes, scales), strict=True)
            else:
                parts[name] = tensor
        return parts, metadata

    def is_serializable(self) -> bool:
        return self.linears.is_serializable()

    @property
    def is_trainable(self) -> bool:
        return self.linears.is_trainable

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if isinstance(parameter, QuantizedWeight):
                module, last = get_module_from_name(model, name)
                dense = parameter.to(dtype or parameter.dtype).dequantize()
                setattr(module, last, torch.nn.Parameter(dense.contiguous(), requires_grad=False))
        keep_saved_names(model)
        return model if isinstance(self.linears, _Dense) else self.linears._dequantize(model, dtype=dtype)

    # What is for the quantizer of the linear layers alone.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.linears.validate_environment(*args, **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.linears.update_dtype(dtype)

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        return self.linears.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        return self.linears.adjust_max_memory(max_memory)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers and accelerate ask for it where bitsandbytes' layers need care.
        model.quantization_method = self.linears.quantization_config.quant_method
        return self.linears._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self.linears._process_model_after_weight_loading(model, **kwargs)


class _Dense(HfQuantizer):
    """The quantizer of linear layers that stay as they are."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return True


def attach(model: torch.nn.Module, quant_type: str) -> None:
    """Lets ``save_pretrained`` write the experts of a model, quantized since it was loaded, as codes and scales."""
    for base in _pretrained(model):
        linears = getattr(base, "hf_quantizer", None)
        if isinstance(linears, ExpertsQuantizer):
            linears = None if isinstance(linears.linears, _Dense) else linears.linears
        config = ExpertsQuantizationConfig(
            quant_type, None if linears is None else linears.quantization_config
        )
        base.hf_quantizer = ExpertsQuantizer(config, pre_quantized=True)
        if linears is not None:
            base.hf_quantizer.linears = linears
        _own_config(model, base)
        base.config.quantization_config = config
        base.is_quantized = base.config._is_quantized = True
        base.quantization_method = base.hf_quantizer.linears.quantization_config.quant_method


def _own_config(model: torch.nn.Module, base: Any) -> None:
    """Gives a model, with all modules that hold its config, a copy of it: other models may hold the same one."""
    shared = base.config
    own = copy.copy(shared)
    for module in model.modules():
        for name, value in vars(module).items():
            if value is shared:
                vars(module)[name] = own


def detach(model: torch.nn.Module) -> bool:
    """Leaves to ``save_pretrained`` a model without quantized experts: dense, but for quantized linear layers.

    Returns:
        True if a quantizer of experts described it.
    """
    described = False
    for base in _pretrained(model):
        quantizer = getattr(base, "hf_quantizer", None)
        if not isinstance(quantizer, ExpertsQuantizer):
            continue
        described = True
        keep_saved_names(base)
        if isinstance(quantizer.linears, _Dense):
            quantizer.remove_quantization_config(base)
            base.config._is_quantized = False
        else:
            base.hf_quantizer = quantizer.linears
            base.config.quantization_config = quantizer.linears.quantization_config
    return described


def keep_saved_names(model: Any) -> None:
    """Takes the reading of codes out of what ``save_pretrained`` reverses, which would take dense weights for them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        return
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not any(isinstance(operation, _Deserialize) for operation in getattr(conversion, "operations", ()))
    ]
    if not model._weight_conversions:
        # transformers then takes its own for the model's class.
        del model._weight_conversions


def _pretrained(model: torch.nn.Module) -> Iterator[Any]:
    """The outermost model of transformers' in ``model``."""
    return islice((module for module in model.modules() if isinstance(module, PreTrainedModel)), 1)


class _Quantize(ConversionOps):
    # Set where a converter hands over one expert after the other, and checks their number itself.
    is_by_expert = False

    def __init__(self, quantizer: ExpertsQuantizer) -> None:
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


class _Deserialize(ConversionOps):
    def __init__(self, quantizer: ExpertsQuantizer) -> None:
        # transformers knows by this name that codes and scales keep their dtypes.
        self.hf_quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        module, name = get_module_from_name(model, full_layer_name)
        dense = getattr(module, name)
        missing = [part for part in _part_names(name) if part not in input_dict]
        if missing:
            raise ValueError(
                f"{full_layer_name}: expected codes and scales in the checkpoint, got no {missing[0]}"
            )
        parts = (input_dict[part] for part in _part_names(name))
        codes, scales = (value[0] if isinstance(value, list) else value for value in parts)
        layout = layout_of(self.hf_quantizer.quantization_config.quant_type)
        stack = QuantizedStack(codes, (scales,), layout, dense.dtype).check(full_layer_name)
        if stack.shape != dense.shape:
            raise ValueError(
                f"{full_layer_name}: expected codes of {list(dense.shape)}, got {list(stack.shape)}"
            )
        stack.refuse_nan(full_layer_name)
        return {full_layer_name: _parameter(stack)}

    @property
    def reverse_op(self) -> ConversionOps:
        # Saved are codes and scales by their names, which no reversed converter takes for a weight's.
        return self


class _ByExpert(WeightConverter):
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


def _by_expert(conversion: Any) -> Any:
    """The conversion, one expert at a time if it merges experts of which each has tensors of its own."""
    if type(conversion) is not WeightConverter or not isinstance(conversion.operations[0], MergeModulelist):
        return conversion
    if conversion._original_target_patterns[0].rpartition(".")[2] not in _PARAMETERS:
        return conversion
    by_expert = _ByExpert(
        list(conversion._original_source_patterns),
        list(conversion._original_target_patterns),
        list(conversion.operations),
        conversion.force_cpu,
    )
    by_expert.scope_prefix, by_expert.base_model_prefix = (
        conversion.scope_prefix,
        conversion.base_model_prefix,
    )
    return by_expert


def _check_shape(model: Any, name: str, stack: QuantizedStack) -> None:
    """Raises ValueError for a weight that is not of its parameter's shape: experts or projections are missing."""
    module, parameter = get_module_from_name(model, name)
    dense = getattr(module, parameter)
    # Of one that processes share, this one has a part.
    if not hasattr(dense, "placements") and stack.shape != dense.shape:
        raise ValueError(
            f"{name}: expected weights of {list(dense.shape)} in the checkpoint, got {list(stack.shape)}"
        )


def _part_names(name: str) -> list[str]:
    return [f"{name}_codes", f"{name}_scales"]


def _parameter(stack: QuantizedStack) -> torch.nn.Parameter:
    return torch.nn.Parameter(QuantizedWeight(stack), requires_grad=False)
