"""Experts quantized while transformers loads them: a quantizer for ``from_pretrained`` and ``save_pretrained``.

Linear layers are another quantizer's (bitsandbytes' for example), or stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch

from ....ops.quantization.encode import layout_of
from .configuration import ExpertsQuantizationConfig
from .conversions import PARAMETERS, Deserialize, Quantize, by_expert, keep_saved_names, part_names
from .parameter import QuantizedWeight

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.integrations.accelerate import load_offloaded_parameter
    from transformers.modeling_utils import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
except ImportError as error:
    raise ImportError(
        f"scattermoe: quantization in from_pretrained needs transformers 5.20 or later: {error}"
    ) from error


class ExpertsQuantizer(HfQuantizer):
    """Quantizes the weights of experts modules; of all others it asks the quantizer of the linear layers, if any."""

    quantization_config: ExpertsQuantizationConfig

    def __init__(self, quantization_config: ExpertsQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Names of the weights to quantize, of the model that is being loaded.
        self._quantized: list[str] = []
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
            parameter in PARAMETERS
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
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = self.linears.update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            return [by_expert(conversion) for conversion in conversions]
        own = [WeightConverter(part_names(name), name, [Deserialize(self)]) for name in PARAMETERS]
        return [*conversions, *own]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        keep_saved_names(model)
        if not any(
            isinstance(getattr(parameter, "_local_tensor", parameter), QuantizedWeight)
            for parameter in model.parameters()
        ):
            detach(model)  # Merging made the last of the experts dense.
        state, metadata = self.linears.get_state_dict_and_metadata(model)
        parts: dict[str, torch.Tensor] = {}
        for name, tensor in (model.state_dict() if state is None else state).items():
            if hasattr(tensor, "full_tensor"):
                # Every process comes here, as transformers' own gathering has it, which would come too late for codes.
                tensor = tensor.full_tensor().cpu()
            if isinstance(tensor, QuantizedWeight):
                parts |= self._saved_parts(model, name, tensor)
            else:
                parts[name] = tensor
        distributed = getattr(model.config, "distributed_config", None)
        if distributed is not None and (distributed.fsdp_size or 1) > 1:
            model.gather_sharded_state_dict_for_save = partial(_gathered, model)
        return parts, metadata

    def _saved_parts(self, model: Any, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Codes and scales by the names that a checkpoint has for them."""
        layout = layout_of(self.quantization_config.quant_type)
        if weight.stack.format != layout:
            raise ValueError(
                f"{name}: expected the format of the model's quantization_config, "
                f"{self.quantization_config.quant_type} ({layout}), got {weight.stack.format}; a checkpoint has one "
                "format"
            )
        if weight.is_meta and hasattr(model, "hf_device_map"):
            weight = load_offloaded_parameter(model, name)
        codes, (scales,), _ = weight.stack.operands()
        return dict(zip(part_names(name), (codes, scales), strict=True))

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

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._refuse_disk(device_map)  # transformers comes back with the map that it made of "auto".
        self.linears.validate_environment(*args, device_map=device_map, **kwargs)

    def _refuse_disk(self, device_map: Any) -> None:
        """Raises ValueError for a map of devices that leaves quantized weights on disk."""
        for place, device in device_map.items() if isinstance(device_map, dict) else ():
            names = [name for name in self._quantized if f"{name}.".startswith(f"{place}." if place else "")]
            if device == "disk" and names:
                raise ValueError(
                    f"device_map: {place or 'the model'}: expected a device or the CPU for {names[0]}, got disk, where "
                    "quantized experts cannot be kept"
                )

    # What is for the quantizer of the linear layers alone.

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.linears.update_dtype(dtype)

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        return self.linears.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        return self.linears.adjust_max_memory(max_memory)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> Any:
        # transformers and accelerate ask for it where bitsandbytes' layers need care.
        model.quantization_method = self.linears.quantization_config.quant_method
        for name, parameter in model.named_parameters():
            if self.quantizes(model, name):
                self._quantized.append(name)
                # As FSDP2 finds it, which splits the model before weights are read.
                parameter.requires_grad_(False)
        self._refuse_disk(device_map)
        return self.linears._process_model_before_weight_loading(model, device_map=device_map, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self.linears._process_model_after_weight_loading(model, **kwargs)


class _Dense(HfQuantizer):
    """The quantizer of linear layers that stay as they are."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return True


def _gathered(model: Any, model_to_save: Any, state: Any, config: Any, save_on_this_rank: bool = True) -> Any:
    """What FSDP2 has split, as transformers gathers it to save it once: it was gathered already."""
    del model.gather_sharded_state_dict_for_save
    return state if save_on_this_rank else {}


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
        vars(base).pop("gather_sharded_state_dict_for_save", None)
        if isinstance(quantizer.linears, _Dense):
            quantizer.remove_quantization_config(base)
            base.config._is_quantized = False
        else:
            base.hf_quantizer = quantizer.linears
            base.config.quantization_config = quantizer.linears.quantization_config
    return described


def _pretrained(model: torch.nn.Module) -> Iterator[Any]:
    """The outermost model of transformers' in ``model``."""
    return islice((module for module in model.modules() if isinstance(module, PreTrainedModel)), 1)
