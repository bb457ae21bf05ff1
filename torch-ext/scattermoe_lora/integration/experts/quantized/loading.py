"""Quantized experts as transformers loads and saves them; what does it is imported when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_registered: Any = None


def quantization_config(
    quant_type: str = "nf4", *, linears: Any = None, skip_modules: Sequence[str] | None = None
) -> Any:
    """The ``quantization_config`` with which ``from_pretrained`` quantizes experts as they are read.

    Where a checkpoint has a tensor for each expert, one expert is dense at a time; where it has one for all experts of
    a layer, that one is. ``save_pretrained`` writes codes and scales beside the configuration, from which
    ``from_pretrained`` loads the same bits, once :func:`scattermoe_lora.register` was called.

    Args:
        quant_type: ``"nf4"``, ``"fp4"`` (blocks of 64, as bitsandbytes') or ``"fp8"`` (E4M3, blocks of 128 x 128).
        linears: The configuration by which transformers quantizes what is not experts, such as a
            ``BitsAndBytesConfig(load_in_4bit=True)``; None leaves it in the model's dtype.
        skip_modules: Experts modules that stay dense, by name, as ``llm_int8_skip_modules`` names linear layers.

    Returns:
        A ``QuantizationConfigMixin`` of transformers.

    Raises:
        ValueError: An unknown format.
        RuntimeError: :func:`scattermoe_lora.register` was not called.
    """
    if _registered is None:
        raise RuntimeError("quantization_config: expected register() to be called first, got no registration")
    return _registered(quant_type, linears, skip_modules)


def describe_quantized(model: Any, quant_type: str) -> None:
    """Lets ``save_pretrained`` write the experts of a model, quantized since it was loaded, as codes and scales."""
    from .quantizer import attach

    attach(model, quant_type)


def describe_dense(model: Any) -> None:
    """Lets ``save_pretrained`` write a model whose experts are no longer quantized."""
    from .quantizer import detach

    detach(model)


def register_quantizer() -> None:
    """Makes quantized experts known to ``from_pretrained``; the build that registers last serves new models."""
    global _registered
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from .quantizer import METHOD, ExpertsQuantizationConfig, ExpertsQuantizer

    _registered = ExpertsQuantizationConfig
    # Not by transformers' decorators, which refuse a second build.
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ExpertsQuantizationConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = ExpertsQuantizer


def unregister_quantizer() -> None:
    """Undoes :func:`register_quantizer`; another build's registration stays."""
    global _registered
    if _registered is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from .quantizer import METHOD

    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD) is _registered:
        del AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD]
    _registered = None
