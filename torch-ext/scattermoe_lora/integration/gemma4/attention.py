"""Gemma 4's attention with its norms and rotary embedding fused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ...ops.norm_rotary.api import rms_norm_rotary
from ..fused_classes import Part, Target, is_plain
from . import shared_kv

_PARAMETERS = [
    "self",
    "hidden_states",
    "position_embeddings",
    "attention_mask",
    "shared_kv_states",
    "past_key_values",
    "kwargs",
]


class _Family(NamedTuple):
    """Names of an attention with this forward in transformers: its module, its class and its norm's class."""

    modeling: str
    attention: str
    norm: str


_FAMILIES = (
    _Family("transformers.models.gemma4.modeling_gemma4", "Gemma4TextAttention", "Gemma4RMSNorm"),
    _Family(
        "transformers.models.gemma4_unified.modeling_gemma4_unified",
        "Gemma4UnifiedTextAttention",
        "Gemma4UnifiedRMSNorm",
    ),
)


def _targets(model: torch.nn.Module, _named: bool) -> Iterator[Target]:
    # A model can only have layers of a class whose module is imported: nothing else needs to be.
    families = [family for family in _FAMILIES if family.modeling in sys.modules]
    for name, module in model.named_modules():
        for family in families:
            base = getattr(sys.modules[family.modeling], family.attention)
            if isinstance(module, base):
                yield Target(name, module, base, _fused_forward(family), _PARAMETERS)


PART = Part("attention", "layers of " + " or ".join(family.attention for family in _FAMILIES), _targets)
"""The norms and the rotary embedding of Gemma 4's text attention, in every layer.

Queries and keys are normalised and rotated, and values normalised, in one operator each
(:func:`~scattermoe_lora.rms_norm_rotary`), forward and backward. Projections (LoRA or not), caches, shared keys and
values, and whatever ``attn_implementation`` names, run as before, and so do norms that have hooks or a class of their
own. Under checkpointing, keys and values that layers share are held by the graph of those layers alone.
"""


def _is_plain(norm: torch.nn.Module, norm_class: type[torch.nn.Module]) -> bool:
    """True if calling ``norm`` computes what its class does from its weight, and nothing else happens."""
    return (
        type(norm).forward is norm_class.forward
        and is_plain(norm)
        # Hooks on all modules: a profiler's, or a debugger's.
        and not torch.nn.modules.module._has_any_global_hook()
    )


@functools.cache
def _fused_forward(family: _Family) -> Callable[..., Any]:
    """The forward for a family's attention; the same object for the same family."""
    modeling = sys.modules[family.modeling]
    norm_class = getattr(modeling, family.norm)

    def normed(
        norm: Any, x: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        if _is_plain(norm, norm_class):
            weight = norm.weight if norm.with_scale else None
            if cos is None or sin is None:
                return rms_norm_rotary(x, weight, eps=norm.eps)
            # Under autocast, or from a projection in a dtype of its own, x may have another one than the angles: their
            # product is of the dtype that both promote to, and so it is if the angles are promoted before.
            promoted = torch.promote_types(x.dtype, cos.dtype)
            if promoted in (x.dtype, torch.float32):
                return rms_norm_rotary(x, weight, cos.to(promoted), sin.to(promoted), norm.eps)
        x = norm(x)
        return x if cos is None else modeling.apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)

    # Its name is its place's: a pickled model then names the class's own forward.
    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        shared_kv_states: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the class's forward, of transformers 5.22."""
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        cos, sin = position_embeddings
        later = self.config.layer_types[self.layer_idx + 1 : self.config.num_hidden_layers]
        # Compiled code has no such circle, nor has a caller who asked for the states; both get a plain tuple.
        plain = torch.compiler.is_compiling() or kwargs.get("return_shared_kv_states", False)

        query = normed(self.q_norm, self.q_proj(hidden_states).view(heads), cos, sin).transpose(1, 2)
        if self.is_kv_shared_layer:
            if plain:
                key, value = shared_kv_states[self.layer_type]
            else:
                query, key, value = shared_kv.read(shared_kv_states, self.layer_type, query)
            # A model split over devices may have computed them on another one.
            key, value = key.to(query.device), value.to(query.device)
        else:
            key = self.k_proj(hidden_states).view(heads)
            value = key if self.v_proj is None else self.v_proj(hidden_states).view(heads)
            key = normed(self.k_norm, key, cos, sin).transpose(1, 2)
            value = normed(self.v_norm, value).transpose(1, 2)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        if self.store_full_length_kv:
            if plain:
                shared_kv_states[self.layer_type] = key, value
            else:
                shared_kv.store(shared_kv_states, self.layer_type, key, value)
        if not plain and self.layer_type not in later:
            shared_kv.forget(shared_kv_states, self.layer_type)

        attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling.eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*input_shape, -1).contiguous()), weights

    return forward
