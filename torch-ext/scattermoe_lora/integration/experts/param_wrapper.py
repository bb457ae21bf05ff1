"""PEFT's wrapper of an expert parameter, for adapters with settings that PEFT's own path has not.

Imports PEFT, and is imported where PEFT is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .expert_parallel import is_split
from .factors import active_settings, bias_of, weight_norms
from .quantized.peft import decode_weight

try:
    from peft.tuners.lora import layer
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise ImportError(f"scattermoe: LoRA on experts needs PEFT 0.19 or later: {error}") from error

_STATE = "scattermoe"


# PEFT finds wrappers by the name of their class.
class ParamWrapper(layer.ParamWrapper):
    """Merges DoRA and biases, and keeps PEFT's own path from leaving them out."""

    merged_adapters: list[str]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        used = active_settings(self)
        if used:
            implementation = self.get_base_layer().config._experts_implementation
            raise ValueError(
                f"scattermoe: LoRA on {self.parameter_name} with {', '.join(used)}: expected the experts "
                f"implementation of the kernel, which alone computes it, got {implementation!r}; register the kernel "
                "and call set_experts_implementation with its name, or merge the adapter"
            )
        with super()._activate_lora(active_adapters):
            yield

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the weight, decoding a quantized one, and their biases into the module's.

        Raises:
            RuntimeError: The module has no biases that an adapter's could be added to; nothing is merged then.
            ValueError: With ``safe_merge``, where the result is not finite; no adapter is merged then.
            NotImplementedError: DoRA or biases, and a weight that is split over processes.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if is_split(self.get_base_layer(), self.get_param()):
            if any(n in self.lora_magnitude_vector or bias_of(self, n) is not None for n in names):
                raise NotImplementedError(
                    f"scattermoe: LoRA on {self.parameter_name}: adapters with use_dora or lora_bias are not merged "
                    "into weights that are split over processes; load the adapter into a whole model and merge there"
                )
            super().merge(safe_merge, names)
            return
        bias = self._base_bias()
        for name in names:
            if bias is None and bias_of(self, name) is not None:
                raise RuntimeError(
                    f"scattermoe: LoRA on {self.parameter_name}: adapter {name!r} has lora_bias=True, and "
                    f"{type(self.get_base_layer()).__name__} has no {self.parameter_name}_bias to merge it into"
                )
        decode_weight(self)
        # A norm is that of the unmerged weight with one adapter, whichever adapters are merged before it.
        names = self.merged_adapters + names
        if self.merged:
            self.unmerge()
        norms = {name: weight_norms(self, name) for name in names if name in self.lora_magnitude_vector}
        parameter = self.get_param()
        weight = parameter.data.clone() if safe_merge else parameter.data
        shift = None if bias is None else torch.zeros_like(bias)
        scales = {}
        for name in names:
            weight += self.get_delta_weight(name).to(weight.dtype)
            if shift is not None and (own_bias := bias_of(self, name)) is not None:
                shift += own_bias.data * self.scaling[name]
            if name in norms:
                scales[name] = scale = self.lora_magnitude_vector[name].weight.data / norms[name]
                weight *= scale.unsqueeze(self._input_dimension())
                if shift is not None:
                    shift *= scale
        if safe_merge and not all(t.isfinite().all() for t in (weight, shift) if t is not None):
            raise ValueError(
                f"scattermoe: LoRA on {self.parameter_name}: merging gives NaN or infinite weights"
            )
        self._cache_store(_STATE, (scales, None if bias is None else bias.data.clone()))
        parameter.data = weight
        if bias is not None and shift is not None:
            bias.data += shift
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Takes all merged adapters out of the weight, and their biases out of the module's."""
        if not self.merged:
            super().unmerge()  # It warns.
            return
        # There is no state where PEFT merged before an adapter with settings came.
        scales, bias = self._caches.pop(_STATE, ({}, None))
        weight = self.get_param().data
        for name in reversed(self.merged_adapters):
            if name in scales:
                weight /= scales[name].unsqueeze(self._input_dimension())
            weight -= self.get_delta_weight(name).to(weight.dtype)
        if bias is not None:
            self._base_bias().data.copy_(bias)
        self.merged_adapters = []

    def _base_bias(self) -> Any:
        experts: Any = self.get_base_layer()
        return getattr(experts, f"{self.parameter_name}_bias") if experts.has_bias else None

    def _input_dimension(self) -> int:
        return -2 if self.get_base_layer().is_transposed else -1
