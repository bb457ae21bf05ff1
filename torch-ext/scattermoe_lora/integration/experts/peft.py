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
from .expert_parallel import check_split, handed, is_split, own_part

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
            if self.disable_adapters or self.merged or not _runs_here(self, names):
                return inner[0](self, x, *args, **kwargs)
            # Once: of a quantized weight behind a parametrization, each reading computes the whole.
            parameter, experts = self.get_param(), self.get_base_layer()
            obstacle = _obstacle(self)
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
            factors = active_factors(self, parameter.dtype, only)
            lora = kwargs.pop("lora", {})
            if factors is not None:
                lora = {**lora, self.parameter_name: own_part(factors, parameter) if split else factors}
            del parameter  # What was computed does not stay while the experts run.
            if split and self.base_layer is experts:
                with handed(experts, lora):
                    return experts(x, *args, **kwargs)
            return self.base_layer(x, *args, **kwargs, **({"lora": lora} if lora else {}))

        return forward

    _hooked = wrap(ParamWrapper, "forward", make)


def unhook() -> None:
    """Puts ``ParamWrapper`` back as it was before :func:`hook`, but for what other builds hooked in since."""
    global _hooked
    if _hooked is None:
        return
    from peft.tuners.lora.layer import ParamWrapper

    unwrap(ParamWrapper, "forward", _hooked)
    _hooked = None
    _warned.clear()


def _runs_here(wrapper: Any, names: Collection[str]) -> bool:
    """True if the wrapped module is an experts module whose implementation is ours."""
    base = wrapper.get_base_layer()
    config = getattr(base, "config", None)
    return hasattr(base, "has_gate") and getattr(config, "_experts_implementation", None) in names


def _obstacle(wrapper: Any) -> str | None:
    """The reason why a wrapper's adapters cannot be factors of the fused experts, or None where they can."""
    experts = wrapper.get_base_layer()
    weights = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    if wrapper.parameter_name not in weights:
        return f"{wrapper.parameter_name} is none of the weights {' and '.join(weights)}"
    if wrapper.num_experts == 1 and not wrapper._did_swap_in_out_features:
        return f"PEFT takes {wrapper.parameter_name} of a single expert for the weight of a plain layer"
    return None


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


def active_factors(
    wrapper: Any, dtype: torch.dtype, only: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The low-rank factors of a wrapper's active adapters, concatenated along the rank.

    ``sum_i s_i B_i A_i = [s_1 B_1 ... s_n B_n] [A_1; ...; A_n]``, so any number of adapters is one pair of factors.

    Args:
        wrapper: A ``peft.tuners.lora.layer.ParamWrapper`` on a parameter ``[E, *, *]`` of an experts module. PEFT keeps
            A as ``[r * E, in]`` (expert-major) and B as ``[out, r * E]`` (rank-major).
        dtype: Of the parameter.
        only: Experts, in any order and number; the others' factors are then left uninitialised. None for all.

    Returns:
        ``A`` ``[E, r, N_in]`` and ``B`` ``[E, N_out, r]`` of the linear map that the module computes with the parameter
        in ``dtype``, contiguous, the scaling in one of them; None where no adapter is active here.
    """
    experts = wrapper.num_experts
    # What PEFT takes for the parameter's input is its output where the two disagree about its orientation: PEFT before
    # 0.20 always does.
    turned = wrapper._did_swap_in_out_features == wrapper.get_base_layer().is_transposed
    a_s, b_s = [], []
    for adapter in wrapper.active_adapters:
        if adapter not in wrapper.lora_A:
            continue
        a = wrapper.lora_A[adapter].weight
        b = wrapper.lora_B[adapter].weight
        scaling = wrapper.scaling[adapter]
        a = a.reshape(experts, -1, a.shape[-1])
        # As a matrix [out * r, E] the transpose is all there is to do, and a plain transpose is fast.
        columns = b.reshape(-1, experts)
        if only is not None:
            a, columns = a.index_select(0, only), columns.index_select(1, only)
        if scaling != 1:
            # In the wider of both dtypes: PEFT's own path rounds no product to that of narrow adapters either.
            columns = columns.to(torch.promote_types(columns.dtype, dtype)) * scaling
        a, b = a.to(dtype), columns.to(dtype).t().contiguous().view(a.shape[0], b.shape[0], a.shape[1])
        a_s.append(b.mT if turned else a)
        b_s.append(a.mT if turned else b)
    if not a_s:
        return None
    a, b = (ts[0] if len(ts) == 1 else torch.cat(ts, dim) for ts, dim in ((a_s, 1), (b_s, 2)))
    if only is None:
        return a.contiguous(), b.contiguous()
    return _spread(a, only, experts), _spread(b, only, experts)


def _spread(rows: torch.Tensor, only: torch.Tensor, experts: int) -> torch.Tensor:
    """``[E, *, *]`` with ``rows`` at the experts ``only``, and nothing written elsewhere."""
    spread = rows.new_empty((experts, *rows.shape[1:]))
    return spread.index_copy_(0, only, rows)
