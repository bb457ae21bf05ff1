"""PEFT's LoRA on expert parameters (``target_parameters``), handed to the fused experts as low-rank factors.

PEFT wraps an experts module in one ``ParamWrapper`` a targeted parameter; its forward replaces the parameter by the
merged weight while the module runs. The hook replaces that one method: where the module runs a registered experts
implementation, the wrapper adds its factors to the call's ``lora`` argument and merges nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from ..wrapping import unwrap, wrap
from .checks import DTYPES
from .expert_parallel import check_split, handed, is_split, own_adapters, own_part
from .factors import active_adapters, active_factors, active_settings
from .lora_settings import accept, obstacle_of, refuse, runs_here

_hooked: Any = None
_warned: set[str] = set()


def hook(names: Collection[str]) -> None:
    """Lets ``ParamWrapper`` pass factors to modules whose experts implementation is in ``names`` (read at each call).

    Does nothing where PEFT is not installed, or where the hook is in place.
    """
    global _hooked
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return
    if _hooked is not None:
        return

    def make(inner: list[Callable[..., torch.Tensor]]) -> Callable[..., torch.Tensor]:
        def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.disable_adapters or self.merged or not runs_here(self, names):
                return inner[0](self, x, *args, **kwargs)
            # Once: of a quantized weight behind a parametrization, each reading computes the whole.
            parameter, experts = self.get_param(), self.get_base_layer()
            obstacle = obstacle_of(self)
            if obstacle is not None:
                _warn_once(obstacle)
                return inner[0](self, x, *args, **kwargs)
            if parameter.dtype not in DTYPES:
                raise NotImplementedError(
                    f"scattermoe: LoRA on {self.parameter_name}: expected a weight of one of "
                    f"{', '.join(map(str, DTYPES))}, got {parameter.dtype}"
                )
            self._check_forward_args(x, *args, **kwargs)
            if kwargs.pop("adapter_names", None) is not None:
                raise ValueError(
                    "scattermoe: LoRA on experts takes one set of adapters for all samples of a batch"
                )
            index = args[0] if args else kwargs.get("top_k_index")
            split = is_split(experts, parameter)
            if split:
                check_split(experts, self.parameter_name, parameter)
            only = None if split else _few_experts(index, self.num_experts)
            lora, adapters = kwargs.pop("lora", {}), kwargs.pop("adapters", {})
            if active_settings(self):
                own = active_adapters(self, parameter.dtype)
                own = own_adapters(own, parameter) if split else own
                adapters = {**adapters, self.parameter_name: own}
            elif (factors := active_factors(self, parameter.dtype, only)) is not None:
                lora = {**lora, self.parameter_name: own_part(factors, parameter) if split else factors}
            del parameter  # What was computed does not stay while the experts run.
            if split and self.base_layer is experts:
                with handed(experts, lora, adapters):
                    return experts(x, *args, **kwargs)
            kwargs |= {"lora": lora} if lora else {}
            kwargs |= {"adapters": adapters} if adapters else {}
            return self.base_layer(x, *args, **kwargs)

        return forward

    _hooked = wrap(ParamWrapper, "forward", make)
    accept(names)


def unhook() -> None:
    """Puts ``ParamWrapper`` back as it was before :func:`hook`, but for what other builds hooked in since."""
    global _hooked
    if _hooked is None:
        return
    from peft.tuners.lora.layer import ParamWrapper

    refuse()
    unwrap(ParamWrapper, "forward", _hooked)
    _hooked = None
    _warned.clear()


def _warn_once(obstacle: str) -> None:
    if obstacle not in _warned:
        _warned.add(obstacle)
        warnings.warn(
            f"scattermoe: LoRA on experts runs through PEFT's merged weights, not fused: {obstacle}",
            stacklevel=4,
        )


def _few_experts(index: Any, experts: int) -> torch.Tensor | None:
    """The experts of so few pairs that bringing every expert's factors in order would cost more than the layer.

    None in training, where all experts' factors get a gradient, and where a graph is made for any number of pairs.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(index, torch.Tensor):
        return None
    # Indices outside the experts, or of another dtype, are for the operator to judge; index_copy_ takes int64 alone.
    return index.reshape(-1).long().clamp(0, experts - 1) if 2 * index.numel() <= experts else None
