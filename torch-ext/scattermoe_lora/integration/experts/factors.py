"""What PEFT's wrappers of an expert parameter hold, as the kernels take it."""

from __future__ import annotations

from typing import Any

import torch

from ...ops.grouped_linear.adapters import Adapter, row_norms
from ...ops.grouped_linear.transpose import transpose_and_scale
from .expert_parallel import check_split, is_split, of_all, own_adapters
from .quantized.parameter import QuantizedWeight


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
    pairs = [_factors(wrapper, adapter, dtype, dtype, only) for adapter in _active(wrapper)]
    if not pairs:
        return None
    a, b = (
        pairs[0]
        if len(pairs) == 1
        else (torch.cat([a for a, _ in pairs], 1), torch.cat([b for _, b in pairs], 2))
    )
    if only is None:
        return a.contiguous(), b.contiguous()
    return _spread(a, only, wrapper.num_experts), _spread(b, only, wrapper.num_experts)


def outputs(wrapper: Any) -> int:
    """N_out of the wrapper's parameter, which PEFT before 0.20 takes for N_in."""
    return int(wrapper.get_param().shape[-1 if wrapper.get_base_layer().is_transposed else -2])


def active_settings(wrapper: Any) -> list[str]:
    """The settings of active adapters that count in this forward and that plain factors cannot express, as PEFT calls
    them."""
    adapters = _active(wrapper)
    uses = {
        "lora_dropout": any(_dropout(wrapper, adapter) for adapter in adapters),
        "lora_bias": any(bias_of(wrapper, adapter) is not None for adapter in adapters),
        "use_dora": any(adapter in wrapper.lora_magnitude_vector for adapter in adapters),
    }
    return [name for name, is_used in uses.items() if is_used]


def active_adapters(wrapper: Any, dtype: torch.dtype) -> list[Adapter]:
    """The active adapters with all their settings, in PEFT's order.

    Args:
        wrapper: As in :func:`active_factors`.
        dtype: Of the parameter.
    """
    return [_adapter(wrapper, adapter, dtype) for adapter in _active(wrapper)]


def bias_of(wrapper: Any, adapter: str) -> torch.nn.Parameter | None:
    """An adapter's biases ``[E, N_out]``, or None.

    Where PEFT's own refusal misses the setting (of an adapter that is added later), PEFT makes one ``[N_out]`` that it
    does not use.
    """
    bias = wrapper.lora_B[adapter].bias
    return bias if bias is not None and bias.dim() == 2 else None


def weight_norms(wrapper: Any, adapter: str) -> torch.Tensor:
    """The norms of the rows of the wrapper's unmerged weight with one adapter, ``[E, out]``."""
    parameter = wrapper.get_param()
    parts = _adapter(wrapper, adapter, parameter.dtype)
    weight, split = parameter, is_split(wrapper.get_base_layer(), parameter)
    if split:
        check_split(wrapper.get_base_layer(), wrapper.parameter_name, parameter)
        weight, (parts,) = weight.to_local(), own_adapters([parts], parameter)
    if isinstance(weight, QuantizedWeight):
        weight = weight.stack
    norms = row_norms(weight.mT if wrapper.get_base_layer().is_transposed else weight, parts.a, parts.b)
    return of_all(norms, parameter) if split else norms


def _active(wrapper: Any) -> list[str]:
    return [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]


def _dropout(wrapper: Any, adapter: str) -> float:
    module = wrapper.lora_dropout[adapter]
    return float(module.p) if isinstance(module, torch.nn.Dropout) and module.training else 0.0


def _adapter(wrapper: Any, adapter: str, dtype: torch.dtype) -> Adapter:
    wide = torch.promote_types(wrapper.lora_B[adapter].weight.dtype, dtype)
    a, b = _factors(wrapper, adapter, dtype, wide, None)
    bias, magnitudes = bias_of(wrapper, adapter), wrapper.lora_magnitude_vector
    return Adapter(
        a.contiguous(),
        b,
        None if bias is None else bias * wrapper.scaling[adapter],
        magnitudes[adapter].weight if adapter in magnitudes else None,
        _dropout(wrapper, adapter),
    )


def _factors(
    wrapper: Any, adapter: str, a_dtype: torch.dtype, b_dtype: torch.dtype, only: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One adapter's ``A`` and ``B``, of all experts or of those in ``only``, the scaling in one of them."""
    # What PEFT takes for the parameter's input is its output where the two disagree about its orientation: PEFT before
    # 0.20 always does.
    turned = wrapper._did_swap_in_out_features == wrapper.get_base_layer().is_transposed
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    scaling = wrapper.scaling[adapter]
    a = a.reshape(wrapper.num_experts, -1, a.shape[-1])
    # As a matrix [out * r, E] the transpose is all there is to do.
    columns = b.reshape(-1, wrapper.num_experts)
    if only is not None:
        a, columns = a.index_select(0, only), columns.index_select(1, only)
    # In the wider of both dtypes: PEFT's own path rounds no product to that of narrow adapters either.
    by_expert = transpose_and_scale(columns, scaling, b_dtype)
    a, b = a.to(a_dtype), by_expert.view(a.shape[0], b.shape[0], a.shape[1])
    return (b.mT, a.mT) if turned else (a, b)


def _spread(rows: torch.Tensor, only: torch.Tensor, experts: int) -> torch.Tensor:
    """``[E, *, *]`` with ``rows`` at the experts ``only``, and nothing written elsewhere."""
    spread = rows.new_empty((experts, *rows.shape[1:]))
    return spread.index_copy_(0, only, rows)
