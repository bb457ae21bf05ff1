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
    if _registered is None or not _is_known():
        raise RuntimeError("quantization_config: expected register() to be called first, got no registration")
    return _registered(quant_type, linears, skip_modules)


def _is_known() -> bool:
    """True if transformers knows the method, by this build or by another."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    from .configuration import METHOD

    return METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING


def describe_quantized(model: Any, quant_type: str) -> None:
    """Lets ``save_pretrained`` write the experts of a model, quantized since it was loaded, as codes and scales."""
    from .quantizer import attach

    attach(model, quant_type)


def describe_dense(model: Any) -> bool:
    """Lets ``save_pretrained`` write a model whose experts are no longer quantized; True if it was described so."""
    from .quantizer import detach

    return detach(model)


def register_quantizer() -> None:
    """Makes quantized experts known to ``from_pretrained``; the build that registers last serves new models."""
    global _registered
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from .configuration import METHOD, ExpertsQuantizationConfig
    from .quantizer import ExpertsQuantizer

    unregister_quantizer()  # Called again, it comes last again.
    _registered = ExpertsQuantizationConfig
    _registered.replaced = [AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD), AUTO_QUANTIZER_MAPPING.get(METHOD)]
    # Not by transformers' decorators, which refuse a second build.
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ExpertsQuantizationConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = ExpertsQuantizer


def unregister_quantizer() -> None:
    """Undoes :func:`register_quantizer`; other builds' stay."""
    global _registered
    if _registered is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from .configuration import METHOD

    registered, replaced = _registered, _registered.replaced
    _registered = registered.replaced = None
    outer = AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD)
    if outer is registered:
        for mapping, previous in zip(
            (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING), replaced, strict=True
        ):
            if previous is None:
                mapping.pop(METHOD, None)
            else:
                mapping[METHOD] = previous
        return
    # A build that came later leaves for what this one replaced.
    while below := getattr(outer, "replaced", None):
        if below[0] is registered:
            outer.replaced = replaced
            return
        outer = below[0]
