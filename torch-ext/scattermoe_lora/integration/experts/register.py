"""Registration of the experts implementation with transformers and PEFT."""

from __future__ import annotations

from typing import Any

from .. import copied_configs
from . import choice, peft
from .forward import experts_forward
from .module import mark_constants
from .quantized import peft as quantized_peft
from .quantized.loading import register_quantizer, unregister_quantizer

_registered: set[str] = set()


def register(name: str = "scattermoe") -> None:
    """Make ``experts_implementation=name`` available to transformers' models, with PEFT's expert LoRA fused into it.

    Experts can then be quantized while they are loaded, too: :func:`scattermoe_lora.quantization_config`.
    Nothing changes for models that use another experts implementation. A model whose experts do not ask for one
    (Llama 4) warns when it is given this one. Calling it again does nothing.

    Args:
        name: The name in transformers' ``ExpertsInterface``.

    Raises:
        ValueError: Another implementation stands under that name.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name == "eager" or (
        name in ALL_EXPERTS_FUNCTIONS and ALL_EXPERTS_FUNCTIONS[name] is not experts_forward
    ):
        raise ValueError(
            f"register: name: transformers already has an experts implementation {name!r}; "
            "choose another name, or unregister the build that took it"
        )
    for interface in _interfaces():
        interface.register(name, experts_forward)
    _registered.add(name)
    peft.hook(_registered)
    quantized_peft.hook(_registered)
    choice.watch(_registered)
    copied_configs.follow("set_experts_implementation")
    mark_constants()
    register_quantizer()


def unregister() -> None:
    """Undo every :func:`register`: transformers and PEFT are as they were. Calling it again does nothing."""
    quantized_peft.unhook()
    peft.unhook()
    unregister_quantizer()
    if _registered:
        choice.unwatch()
        copied_configs.unfollow("set_experts_implementation")
    while _registered:
        _remove(_registered.pop())


def _remove(name: str) -> None:
    # The interfaces offer no removal of their own from the mappings that register() writes to.
    for interface in _interfaces():
        if interface._global_mapping.get(name) is experts_forward:
            del interface._global_mapping[name]


def _interfaces() -> list[Any]:
    """transformers' registries of experts implementations: that of dense experts, and that of its fine-grained FP8."""
    from transformers.integrations import finegrained_fp8, moe

    kinds = [moe.ExpertsInterface, getattr(finegrained_fp8, "FP8ExpertsInterface", None)]
    return [kind for kind in kinds if kind is not None]
