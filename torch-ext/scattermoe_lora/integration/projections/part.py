"""PEFT's LoRA on the linear layers of a model, computed with every term added in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from ..fused_classes import Part, Target
from . import forward, groups


def _classes() -> tuple[type[torch.nn.Module], ...]:
    """PEFT's classes of LoRA around a linear layer."""
    # A model can only have layers of a class whose module is imported: nothing else needs to be.
    modules = {name: sys.modules.get(f"peft.tuners.lora.{name}") for name in ("layer", "bnb")}
    named = (("layer", "Linear"), ("bnb", "Linear4bit"), ("bnb", "Linear8bitLt"))
    return tuple(getattr(modules[module], name) for module, name in named if hasattr(modules[module], name))


def _targets(model: torch.nn.Module, _named: bool) -> Iterator[Target]:
    classes = _classes()
    targets: dict[torch.nn.Module, Target] = {}
    for name, module in model.named_modules():
        base = next((cls for cls in classes if isinstance(module, cls)), None)
        if base is None:
            continue
        target = Target(name, module, base, forward.fused(base.forward))
        try:
            target.check()
        except NotImplementedError as error:
            # Left to PEFT, as all that is not covered.
            forward.warn_once(str(error).removeprefix("apply_to: "))
        else:
            targets[module] = target
    for parent in model.modules():
        for names in groups.called_together(type(parent).forward):
            members = [child for name in names if (child := parent._modules.get(name)) in targets]
            if len(members) > 1:
                groups.join(members)
    yield from targets.values()


PART = Part("projections", "PEFT's LoRA on linear layers", _targets)
"""PEFT's LoRA on linear layers: the base product, and the low-rank terms added to its result in place.

Every layer that PEFT has wrapped is one operator (:func:`~scattermoe_lora.lora_linear`), forward and backward; layers
that their parent calls with one input (queries, keys and values; gate and up) are one operator together while gradients
are recorded, outside of compiled code; of a copy's layers, once ``apply_to`` was called with the copy. A base layer of
another kind than ``torch.nn.Linear`` (bitsandbytes, float8, torchao, one with hooks) is called as it was, and the terms
are added to what it returns. Small calls without gradients (decoding) run through PEFT's own forward, which is faster
then; and so does what is not covered (DoRA and other variants, adapters by sample, a forward that something
else replaced), of which a warning says why. Adapters can be added, switched, merged, saved
and deleted as before; layers that get their first one later run fused once ``apply_to`` was called again.
"""
