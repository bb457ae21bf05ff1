"""PEFT's LoRA on expert parameters (``target_parameters``), handed to the fused experts as low-rank factors.

PEFT wraps an experts module in one ``ParamWrapper`` a targeted parameter; its forward replaces the parameter by the
merged weight while the module runs. The hook replaces that one method: where the module runs a registered experts
implementation, the wrapper adds its factors to the call's ``lora`` argument and merges nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch

_original: Callable[..., torch.Tensor] | None = None
_hooked: Callable[..., torch.Tensor] | None = None

_FUSED_PARAMETERS = ("gate_up_proj", "down_proj")


def hook(names: Collection[str]) -> None:
    """Lets ``ParamWrapper`` pass factors to modules whose experts implementation is in ``names`` (read at each call).

    Does nothing where PEFT is not installed, or where the hook is in place.
    """
    global _original, _hooked
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return
    if _hooked is not None:
        return
    original = ParamWrapper.forward

    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or not _is_fused(self, names):
            return original(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        factors = active_factors(self)
        if factors is not None:
            kwargs["lora"] = {**kwargs.get("lora", {}), self.parameter_name: factors}
        return self.base_layer(x, *args, **kwargs)

    ParamWrapper.forward = forward
    _original, _hooked = original, forward


def unhook() -> None:
    """Puts ``ParamWrapper`` back as it was before :func:`hook`."""
    global _original, _hooked
    if _hooked is None:
        return
    from peft.tuners.lora.layer import ParamWrapper

    # Where another build hooked in after this one, its wrapper holds ours, which passes everything on from now on
    # because no name is registered any more.
    if ParamWrapper.forward is _hooked:
        ParamWrapper.forward = _original
    _original = _hooked = None


def _is_fused(wrapper: Any, names: Collection[str]) -> bool:
    experts = wrapper.get_base_layer()
    config = getattr(experts, "config", None)
    return (
        getattr(config, "_experts_implementation", None) in names
        and wrapper.parameter_name in _FUSED_PARAMETERS
        and wrapper.num_experts > 1
    )


def active_factors(wrapper: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The low-rank factors of a wrapper's active adapters, concatenated along the rank.

    ``sum_i s_i B_i A_i = [s_1 B_1 ... s_n B_n] [A_1; ...; A_n]``, so any number of adapters is one pair of factors.

    Args:
        wrapper: A ``peft.tuners.lora.layer.ParamWrapper`` on a parameter ``[E, N_out, N_in]``. PEFT keeps A as
            ``[r * E, N_in]`` (expert-major) and B as ``[N_out, r * E]`` (rank-major).

    Returns:
        ``A`` ``[E, r, N_in]`` and ``B`` ``[E, N_out, r]`` in the parameter's dtype, contiguous, the scaling in ``B``;
        None where no adapter is active here.
    """
    dtype = wrapper.get_param().dtype
    experts = wrapper.num_experts
    a_s, b_s = [], []
    for adapter in wrapper.active_adapters:
        if adapter not in wrapper.lora_A:
            continue
        a = wrapper.lora_A[adapter].weight
        b = wrapper.lora_B[adapter].weight
        a_s.append(a.to(dtype).reshape(experts, -1, a.shape[-1]))
        # As a matrix [N_out * r, E] the transpose is all there is to do, and a plain transpose is fast.
        scaled = (b * wrapper.scaling[adapter]).to(dtype).reshape(-1, experts).t()
        b_s.append(scaled.contiguous().view(experts, b.shape[0], -1))
    if not a_s:
        return None
    if len(a_s) == 1:
        return a_s[0], b_s[0]
    return torch.cat(a_s, dim=1), torch.cat(b_s, dim=2)
