"""The ways a layer's attention can go: our kernel, another flash attention, or transformers' own."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, NamedTuple

import torch

from ...ops.attention.api import flash_attn_func, flash_attn_varlen_func
from ...ops.attention.segments import segments_forward
from ...ops.attention.sequences import select_tokens
from .masks import for_sdpa, supports
from .plans import Plan, dense

_LOGGER = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What these mean, only a model's own code knows.
_EAGER_ALONE = ("output_attentions", "position_bias", "indices", "block_indices")
_logged: set[str] = set()

Result = tuple[torch.Tensor, torch.Tensor | None]
"""The result of transformers' attention functions: ``[B, Sq, Hq, D]``, and the weights where eager mode ran."""


class Call(NamedTuple):
    """One call of a layer's attention, as transformers makes it; tensors are ``[B, H, S, D]``."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    dropout: float
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    is_causal: bool | None
    s_aux: torch.Tensor | None
    others: dict[str, Any]


def obstacle(call: Call, plan: Plan) -> str | None:
    """The reason why the kernel cannot run a call whose mask it can express, or None where it can."""
    query, key, value = call.query, call.key, call.value
    head_dim = query.shape[-1]
    if plan.deferred and call.s_aux is not None:
        return "sinks in a traced graph"
    if call.dropout:
        return f"dropout {call.dropout}"
    if (name := _for_eager(call)) is not None:
        return name
    if query.device.type not in ("cpu", "cuda"):
        return f"the device {query.device.type}"
    if not query.dtype == key.dtype == value.dtype:
        return f"{query.dtype} queries with {key.dtype} keys and {value.dtype} values"
    if query.dtype not in _DTYPES and (query.dtype, query.device.type) != (torch.float64, "cpu"):
        return f"{query.dtype}"
    if not head_dim == key.shape[-1] == value.shape[-1]:
        return f"keys of {key.shape[-1]} and values of {value.shape[-1]}"
    if not 16 <= head_dim <= 512 or head_dim % 8:
        return "head_dim, of which the kernel takes multiples of 8 from 16 to 512"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads over {key.shape[1]} key heads"
    return None


def _for_eager(call: Call) -> str | None:
    """The name of an argument that only eager mode can serve, or None."""
    # output_attentions=False is an argument, too, and no tensor may be asked whether it is true.
    for name in _EAGER_ALONE:
        if call.others.get(name) is not None and call.others[name] is not False:
            return name
    return None


def kernel(call: Call, plan: Plan, segments: torch.Tensor | None) -> Result:
    """Runs our kernel."""
    _log_once(call, "the kernel", None)
    query, key = call.query.transpose(1, 2), call.key.transpose(1, 2)
    value = key if call.value is call.key else call.value.transpose(1, 2)
    options: dict[str, Any] = {
        "softmax_scale": call.scaling,
        "causal": plan.causal,
        "window_size": plan.window,
        "softcap": call.softcap or 0.0,
        "s_aux": call.s_aux,
    }
    sequences = plan.sequences
    if plan.deferred:
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        numbers = (plan.causal, plan.packed, scale, *plan.window, call.softcap or 0.0)
        out, _ = segments_forward(query, key, None if value is key else value, segments, *numbers)
        return out, None
    if sequences is None:
        return flash_attn_func(query, key, value, **options), None
    q, k = select_tokens(query, sequences.query_index), select_tokens(key, sequences.key_index)
    v = k if value is key else select_tokens(value, sequences.key_index)
    lengths = sequences.cu_query, sequences.cu_key, sequences.max_query, sequences.max_key
    out = flash_attn_varlen_func(q, k, v, *lengths, **options)
    if sequences.query_index is not None:
        rows = query.shape[0] * query.shape[1]
        out = out.new_zeros(rows, *out.shape[1:]).index_copy(0, sequences.query_index, out)
    return out.view(query.shape), None


def is_flash_package(implementation: str) -> bool:
    """Tell whether a name stands for a package that transformers loads flash attention from, or for a Hub kernel."""
    return re.fullmatch(r"flash_attention_\d|[^/:]+/[^/:]+", implementation) is not None


def fits_hybrid(call: Call, plan: Plan, implementation: str) -> bool:
    """Tell whether another flash attention can run a call that our kernel can run."""
    if is_flash_package(implementation) and (
        call.query.device.type != "cuda" or call.query.dtype not in (torch.bfloat16, torch.float16)
    ):
        return False
    # It takes a padding mask's rows for the queries, too, which is right where they are the same tokens.
    if plan.deferred:
        return False
    own_tokens = plan.sequences is None or plan.packed or plan.sequences.query_index is not None
    return call.query.shape[-1] <= 256 and own_tokens and call.s_aux is None


def hybrid(call: Call, plan: Plan, segments: torch.Tensor | None, implementation: str) -> Result:
    """Runs another flash attention, which takes padding as a mask ``[B, K]`` and packed sequences by their lengths."""
    from transformers import AttentionInterface

    _log_once(call, implementation, None)
    others = {**call.others, "position_ids": None}
    mask, sequences = None, plan.sequences
    if plan.packed and sequences is not None:
        others.update(cu_seq_lens_q=sequences.cu_query, cu_seq_lens_k=sequences.cu_key)
        others.update(max_length_q=sequences.max_query, max_length_k=sequences.max_key)
    elif sequences is not None and segments is not None:
        mask = segments > 0
    return AttentionInterface._global_mapping[implementation](
        _Under(call.module, config=_Under(call.module.config, _attn_implementation=implementation)),
        call.query,
        call.key,
        call.value,
        mask,
        dropout=0.0,
        scaling=call.scaling,
        sliding_window=plan.window[0] + 1 if plan.window[0] >= 0 else None,
        softcap=call.softcap,
        is_causal=plan.causal,
        **others,
    )


class _Under:
    """An object with some attributes replaced, so that a layer can be run under another implementation's name."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def transformers_own(
    call: Call,
    mask: torch.Tensor | None,
    reason: str,
    plan: Plan | None = None,
) -> Result:
    """Runs sdpa, or the model's eager attention where sdpa cannot.

    Args:
        call: The call.
        mask: With a plan, its segments ``[B, K]``; without one the dense mask.
        reason: Why the kernel does not run, for the log.
        plan: What the segments mean.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    needs_eager = call.softcap is not None or call.s_aux is not None
    needs_eager |= _for_eager(call) is not None
    config = getattr(call.module, "config", None)
    if needs_eager or not supports(config, "_supports_sdpa"):
        function, where = _eager(call.module), "eager"
    else:
        function, where = sdpa_attention_forward, "sdpa"
    _log_once(call, f"transformers' {where}", reason)
    is_causal = call.is_causal
    if plan is not None and mask is not None:
        queries, keys = call.query.shape[2], call.key.shape[2]
        plain = plan.sequences is None and not plan.deferred and plan.window == (-1, -1)
        is_causal = plan.causal
        if plain and (queries == 1 or not plan.causal or (where == "sdpa" and queries == keys)):
            mask = None
        else:
            mask = dense(plan, mask, queries)
    if mask is not None and not mask.is_floating_point():
        # Numbers of sequences, or ones and zeros: what is added to the scores is never of an integer dtype.
        mask = mask > 0
    if mask is not None and mask.dtype == torch.bool and where == "eager":
        lowest = torch.finfo(call.query.dtype).min
        mask = torch.zeros(mask.shape, dtype=call.query.dtype, device=mask.device).masked_fill(~mask, lowest)
    if mask is not None and where == "sdpa":
        mask = for_sdpa(mask, call.query.dtype)
    options = {
        "sliding_window": call.sliding_window,
        "softcap": call.softcap,
        "is_causal": is_causal,
        "s_aux": call.s_aux,
    }
    options = {name: value for name, value in options.items() if value is not None}
    return function(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        **options,
        **call.others,
    )


def _eager(module: Any) -> Any:
    """The eager attention beside the module's class, or beside the first of its bases that has one.

    The class itself may have been made elsewhere: by ``apply_to``, by FSDP2, by a user.
    """
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotImplementedError(
        f"scattermoe attention: {type(module).__name__} needs an eager attention, and no module that defines it or a "
        'base of it has an eager_attention_forward; use attn_implementation="eager" for this model'
    )


def _log_once(call: Call, where: str, reason: str | None) -> None:
    """One line of the log for each kind of layer and way, the first time."""
    if torch.compiler.is_compiling():
        return
    layer_type = getattr(call.module, "layer_type", None)
    kind = f"{type(call.module).__name__}{f' ({layer_type})' if layer_type else ''}, head_dim {call.query.shape[-1]}"
    line = f"attention of {kind}: {where}" + (f", because of {reason}" if reason else "")
    if line not in _logged:
        _logged.add(line)
        _LOGGER.log(logging.INFO if reason is None else logging.WARNING, line)


def forget() -> None:
    """Lets every line of the log come again."""
    _logged.clear()
