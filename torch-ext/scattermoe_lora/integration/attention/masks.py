"""The mask function that transformers calls, which reads a mask from its description.

transformers describes a mask by a function of indices, and the implementation's mask function makes of it what its
attention takes. Ours reads the description; what the kernels cannot express becomes the dense mask of eager mode.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch

from . import traced_masks
from .plans import make_plan, with_plan

_REASON = "_scattermoe_reason"
_kinds: list[tuple[CodeType, str]] = []


class Pattern(NamedTuple):
    """The mask that a function of transformers describes, apart from padding.

    Attributes:
        causal: Whether a query sees no later key.
        left, right: Keys to the left and to the right of its own that a query sees, -1 for all.
        ids: ``[B, Q]``, the number of each token's sequence, counting from 0; None where nothing is packed.
    """

    causal: bool = False
    left: int = -1
    right: int = -1
    ids: torch.Tensor | None = None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function for transformers' ``AttentionMaskInterface``; the arguments are the interface's.

    Returns:
        int64 ``[B, K]``, the number of each key's sequence, counting from 1, or 0 for padding, with its plan;
        ``K <= kv_length``: keys after the last query's are left out. Where the kernels cannot express the mask, what
        transformers makes for eager mode: ``[B, 1, Q, kv_length]`` to be added to the scores.
    """
    from transformers import masking_utils

    mask_function = mask_function or masking_utils.causal_mask_function
    result: torch.Tensor | str
    if not supports(config, "_supports_flash_attn"):
        result = "transformers gives this model no flash attention"
    elif (
        q_length == 1
        and not kwargs.get("allow_is_causal_skip", True)
        and "allow_is_bidirectional_skip" not in kwargs
    ):
        # transformers' sign for a step of decoding that it may compile: shapes have to stay what they are.
        result = "a step of decoding with a static cache"
    elif torch.compiler.is_compiling():
        result = traced_masks.segments(
            batch_size,
            q_length,
            kv_length,
            (q_offset, kv_offset),
            mask_function,
            attention_mask,
            _kind(mask_function),
            config,
            kwargs,
        )
    else:
        offsets, device = (int(q_offset), kv_offset), kwargs.get("device", "cpu")
        result = _segments(batch_size, q_length, kv_length, offsets, mask_function, attention_mask, device)
    if isinstance(result, torch.Tensor):
        return result
    dense = masking_utils.eager_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )
    if dense is not None:
        setattr(dense, _REASON, result)
    return dense


def _segments(
    batch: int,
    queries: int,
    kv_length: int,
    offsets: tuple[int, int],
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> torch.Tensor | str:
    """The segments that stand for a mask, or the reason why none do."""
    q_offset, kv_offset = offsets
    pattern = read(mask_function, kv_length + kv_offset)
    if isinstance(pattern, str):
        return pattern
    windowed = pattern.left >= 0 or pattern.right >= 0
    # The number of keys up to the last query's own.
    keys_through = q_offset + queries - kv_offset
    keys = keys_through if pattern.causal else kv_length
    if (pattern.causal and not queries <= keys_through <= kv_length) or (windowed and keys_through != keys):
        return "queries and keys that do not end at the same token"
    valid = None if attention_mask is None else _valid_keys(attention_mask, kv_offset, kv_offset + keys)
    packed, padded = pattern.ids is not None, valid is not None
    if packed and (padded or queries != keys):
        return "packed sequences with padding or earlier keys"
    if valid is not None and windowed and bool((_starts(valid).sum(1) > 1).any()):
        return "a window over keys with padding between them"
    if pattern.ids is not None:
        segments = (pattern.ids.expand(batch, -1) + 1).int()
    elif valid is not None:
        segments = valid.int()
    else:
        segments = torch.ones(batch, keys, dtype=torch.int32, device=device)
    left, right = (-1 if reach >= keys - 1 else reach for reach in (pattern.left, pattern.right))
    plan = make_plan(segments, queries, pattern.causal, (left, right), packed, padded)
    return with_plan(segments, plan._replace(kv_length=kv_length))


def _valid_keys(attention_mask: torch.Tensor, begin: int, end: int) -> torch.Tensor | None:
    """True for keys that are no padding, ``[B, end - begin]``; None if all are. A cache's mask may end early."""
    missing = max(0, end - attention_mask.shape[1])
    valid = torch.nn.functional.pad(attention_mask, (0, missing))[:, begin:end].bool()
    return None if valid.all() else valid


def _starts(valid: torch.Tensor) -> torch.Tensor:
    """True where a run of valid keys begins."""
    before = torch.nn.functional.pad(valid, (1, 0))[:, :-1]
    return valid & ~before


def reason_of(dense: torch.Tensor) -> str:
    """The reason why :func:`mask` made a dense mask."""
    return getattr(dense, _REASON, "a mask of its own")


def for_sdpa(dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense mask as sdpa takes it to queries of ``dtype``, which under autocast is not that of the mask.

    What :func:`mask` made says yes or no, and its numbers for "no" are none in every dtype.
    """
    if dense.dtype == torch.bool:
        return dense
    return dense >= 0 if hasattr(dense, _REASON) else dense.to(dtype)


def read(function: Callable[..., Any], length: int) -> Pattern | str:
    """The mask that a function of transformers describes for ``length`` tokens, or why the kernels cannot express it.

    Functions are known by their code, which is that of transformers' own; the numbers in them come from their closures.
    """
    kind = _kind(function)
    if kind in ("causal", "bidirectional"):
        return Pattern(causal=kind == "causal")
    inside = {} if kind is None else _closure(function)
    if kind == "and":
        return _all_of([read(part, length) for part in inside["mask_functions"]])
    if kind == "or":
        return _any_of(inside["mask_functions"], length)
    if kind == "window":
        return Pattern(left=inside["sliding_window"] - 1)
    if kind == "window both ways":
        return Pattern(left=inside["sliding_window"], right=inside["sliding_window"])
    if kind == "packed":
        return Pattern(ids=inside["packed_sequence_mask"])
    if kind == "chunks" and length <= inside["chunk_size"]:
        return Pattern()
    return {"chunks": "attention in chunks", "blocks": "spans that see themselves whole"}.get(
        kind or "", "a mask function that is not transformers' own"
    )


def _all_of(parts: list[Pattern | str]) -> Pattern | str:
    whole = Pattern()
    for part in parts:
        if isinstance(part, str):
            return part
        if whole.ids is not None and part.ids is not None:
            return "sequences packed in two ways"
        whole = Pattern(
            whole.causal or part.causal,
            _narrower(whole.left, part.left),
            _narrower(whole.right, part.right),
            part.ids if whole.ids is None else whole.ids,
        )
    return whole


def _narrower(a: int, b: int) -> int:
    return max(a, b) if a < 0 or b < 0 else min(a, b)


def _any_of(functions: tuple[Callable[..., Any], ...], length: int) -> Pattern | str:
    # Blocks come with every batch of a model for images, of text alone, too.
    kept = [
        function
        for function in functions
        if _kind(function) != "blocks" or bool((_closure(function)["block_sequence_ids"] >= 0).any())
    ]
    if len(kept) == 1:
        return read(kept[0], length)
    reasons = [part for part in (read(function, length) for function in kept) if isinstance(part, str)]
    return reasons[0] if reasons else "a union of masks"


def _kind(function: Any) -> str | None:
    code = getattr(function, "__code__", None)
    for own, kind in _kinds:
        if code is own:
            return kind
    return None


def know_functions() -> None:
    """Learns the code of transformers' mask functions, which a traced graph could not."""
    from transformers import masking_utils

    # Not as a decorator: the compiler would double the time that an import of the package takes.
    torch.compiler.assume_constant_result(supports)
    _kinds.clear()
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    builders = {
        "and": ("and_masks", (masking_utils.causal_mask_function,)),
        "or": ("or_masks", (masking_utils.causal_mask_function,)),
        "window": ("sliding_window_overlay", (1,)),
        "window both ways": ("sliding_window_bidirectional_overlay", (1,)),
        "packed": ("packed_sequence_mask_function", (nothing,)),
        "chunks": ("chunked_overlay", (1, nothing)),
        "blocks": ("blockwise_overlay", (nothing,)),
    }
    for kind, (name, arguments) in builders.items():
        # What a version of transformers does not have, no mask of its holds.
        if hasattr(masking_utils, name):
            _kinds.append((getattr(masking_utils, name)(*arguments).__code__, kind))
    _kinds.append((masking_utils.causal_mask_function.__code__, "causal"))
    _kinds.append((masking_utils.bidirectional_mask_function.__code__, "bidirectional"))


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def supports(config: Any, flag: str) -> bool:
    """Tell whether every model class for configs of this class has ``flag`` set.

    Those are the classes beside the config, and others that set the flag themselves: a user's class around a model that
    says nothing of it does not speak for the model. ``_supports_flash_attn`` says that a model sends masks on unread:
    towers with an attention of their own (Gemma 4's for audio) slice, add or gather the mask that eager mode takes.
    """
    from transformers import PreTrainedModel

    kind = type(config)
    # Not kept: a class may come later, and to look takes 10 microseconds (1 ms with all of transformers loaded).
    pending, flags = [PreTrainedModel], []
    while pending:
        subclasses = pending.pop().__subclasses__()
        flags += [
            getattr(model, flag, False)
            for model in subclasses
            if model.config_class is kind and (flag in vars(model) or _beside(kind, model))
        ]
        pending += subclasses
    return bool(flags) and all(flags)


def _beside(kind: type, model: type) -> bool:
    """True if a model's class is defined in the module of its config, or in one next to it."""
    config_parts, model_parts = (owner.__module__.rpartition(".") for owner in (kind, model))
    return config_parts == model_parts or (config_parts[0] == model_parts[0] != "")
