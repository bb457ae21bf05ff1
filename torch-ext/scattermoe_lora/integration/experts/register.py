"""Registration of the experts implementation with transformers and PEFT."""

from __future__ import annotations

from .. import copied_configs
from . import choice, peft
from .forward import experts_forward
from .module import mark_constants
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
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    _registered.add(name)
    peft.hook(_registered)
    choice.watch(_registered)
    copied_configs.follow("set_experts_implementation")
    mark_constants()
    register_quantizer()


def unregister() -> None:
    """Undo every :func:`register`: transformers and PEFT are as they were. Calling it again does nothing."""
    peft.unhook()
    unregister_quantizer()
    if _registered:
        choice.unwatch()
        copied_configs.unfollow("set_experts_implementation")
    while _registered:
        _remove(_registered.pop())


def _remove(name: str) -> None:
    from transformers.integrations.moe import ExpertsInterface

    # The interface offers no removal of its own from the mapping that register() writes to.
    if ExpertsInterface._global_mapping.get(name) is experts_forward:
        del ExpertsInterface._global_mapping[name]
