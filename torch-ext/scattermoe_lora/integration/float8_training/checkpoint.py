"""State dicts of modules with float8 weights in the keys of fine-grained FP8 checkpoints.

A linear layer's ``weight`` is float8_e4m3fn and ``weight_scale_inv`` float32, one for 128 x 128 elements; of an experts
module ``gate_up_proj`` and ``gate_up_proj_scale_inv`` are likewise. DeepSeek-V3's checkpoints have these keys, and
transformers (``quant_method: fp8``) and vLLM read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...ops.float8.rounding import BLOCK
from ...ops.float8.weight import Float8Weight

_SUFFIX = "_scale_inv"


def describe(model: torch.nn.Module, left: Sequence[str]) -> None:
    """Lets ``save_pretrained`` write a configuration that says what its weights are.

    Args:
        model: A model; others than transformers' have no configuration.
        left: The names of linear layers that are not in float8.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config.quantization_config = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(left),
        }
    if hasattr(model, "save_pretrained"):
        model._weight_conversions = _conversions(model)  # type: ignore[assignment]


def _conversions(model: Any) -> list[Any]:
    """transformers' conversions of names between file and model, which take scales as they take weights.

    Where a file has a tensor for each expert, gate and up projection, scales are divided as the weights are. A block
    that holds rows of both cannot be: such experts are written under the model's own names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # As save_pretrained has it for a model that was not loaded.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    stacks = [p for name, p in model.named_parameters() if isinstance(p, Float8Weight) and p.dim() == 3]
    is_divisible = not any(size % BLOCK for stack in stacks for size in stack.shape[1:])
    result = []
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter):
            result.append(conversion)
            continue
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        if (
            not stacks
            or not all(source.endswith(".weight") for source in sources)
            or "experts" not in targets[0]
        ):
            result.append(conversion)
        elif is_divisible:
            names = ([name + _SUFFIX for name in patterns] for patterns in (sources, targets))
            result += [conversion, WeightConverter(*names, operations=list(conversion.operations))]
    return result


def keep_standard_keys(module: torch.nn.Module) -> None:
    """Lets a module's state dict have the standard keys, and load them as well as dense weights; once a module."""
    if save not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(save)
        module.register_load_state_dict_pre_hook(load)


def save(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Puts codes and scales in the place of each whole float8 weight (those of FSDP2 stay as they are split)."""
    for name in module._parameters:
        weight = state.get(prefix + name)
        if isinstance(weight, Float8Weight):
            state[prefix + name], state[prefix + name + _SUFFIX] = weight.standard()


def load(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts a float8 weight in the place of codes and scales.

    Raises:
        ValueError: Codes without scales, in another format, or of another shape; NaN or infinity in what is loaded.
    """
    for name, parameter in module._parameters.items():
        key = prefix + name
        value = state.get(key)
        if not isinstance(parameter, Float8Weight) or value is None or isinstance(value, Float8Weight):
            continue
        if value.dtype == torch.float8_e4m3fn:
            scales = state.pop(key + _SUFFIX, None)
            if scales is None:
                raise ValueError(f"load_state_dict: {key}: expected scales under {key}{_SUFFIX}, got none")
            state[key] = Float8Weight.from_standard(value, scales, parameter.dtype, f"load_state_dict: {key}")
        elif not value.dtype.is_floating_point or value.dtype.itemsize < 2:
            raise ValueError(
                f"load_state_dict: {key}: expected float8_e4m3fn with {key}{_SUFFIX}, or a dense weight, got "
                f"{value.dtype}; the checkpoint has another format"
            )
        elif not bool(value.isfinite().all()):
            raise ValueError(
                f"load_state_dict: {key}: expected finite weights, got some that are NaN or infinite"
            )
