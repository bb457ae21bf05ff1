"""Implementations that are chosen for a model reach the modules in it that hold a copy of its config.

transformers' setters write to the configs of models. PEFT copies modules whole (``modules_to_save``,
``layer_replication``), and a module's config with it, which no model has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .wrapping import unwrap, wrap

_ATTRIBUTES = {
    "set_experts_implementation": "_experts_implementation_internal",
    "set_attn_implementation": "_attn_implementation_internal",
}
_wrappers: dict[str, Any] = {}


def follow(setter: str) -> None:
    """Lets ``PreTrainedModel``'s ``setter`` reach copied configs, too. Calling it again does nothing."""
    from transformers import PreTrainedModel

    def make(inner: list[Callable[..., Any]]) -> Callable[..., Any]:
        def set_implementation(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner[0](self, *args, **kwargs)
            if setter in _wrappers:
                _carry_on(self, _ATTRIBUTES[setter])
            return result

        return set_implementation

    if setter not in _wrappers:
        _wrappers[setter] = wrap(PreTrainedModel, setter, make)


def unfollow(setter: str) -> None:
    """Undoes :func:`follow`."""
    from transformers import PreTrainedModel

    if setter in _wrappers:
        unwrap(PreTrainedModel, setter, _wrappers.pop(setter))


def _carry_on(model: Any, attribute: str) -> None:
    """Writes the attribute of models' configs to the other configs of their classes, where they agree on it."""
    from transformers import PreTrainedModel

    models = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    values: dict[type, set[Any]] = {}
    for config in models:
        values.setdefault(type(config), set()).add(getattr(config, attribute))
    for module in model.modules():
        config = getattr(module, "config", None)
        value = values.get(type(config), set())
        if len(value) == 1 and not any(config is other for other in models):
            setattr(config, attribute, *value)
