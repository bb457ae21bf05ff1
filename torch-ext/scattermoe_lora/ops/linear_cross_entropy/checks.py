"""Refusal of arguments that do not fit together, each with one message."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .decoded import DecodedWeight

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_REDUCTIONS = ("mean", "sum", "none")


def _refuse(name: str, expected: str, got: object) -> None:
    raise ValueError(f"linear_cross_entropy: {name}: expected {expected}, got {got}")


def _check_tensor(
    name: str, tensor: torch.Tensor | DecodedWeight, shape: list[int], hidden: torch.Tensor
) -> None:
    if list(tensor.shape) != shape:
        _refuse(name, f"shape {shape}", list(tensor.shape))
    if tensor.dtype not in _DTYPES:
        _refuse(name, "float64, float32, bfloat16 or float16", tensor.dtype)
    if tensor.device != hidden.device:
        _refuse(name, f"device of hidden, {hidden.device}", tensor.device)


def check(
    hidden: torch.Tensor,
    weight: torch.Tensor | DecodedWeight,
    labels: torch.Tensor,
    by_word: Mapping[str, torch.Tensor | None],
    lora: tuple[torch.Tensor | None, torch.Tensor | None],
    token_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: float | torch.Tensor | None,
) -> None:
    """Raises ValueError for arguments of :func:`.api.linear_cross_entropy` that do not fit together.

    ``by_word`` holds those that have an element for each word.
    """
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        _refuse("hidden", "[..., H]", list(hidden.shape))
    if hidden.dtype not in _DTYPES:
        _refuse("hidden", "float64, float32, bfloat16 or float16", hidden.dtype)
    width = hidden.shape[-1]
    if len(weight.shape) != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        _refuse("weight", f"[V, {width}], the width of hidden", list(weight.shape))
    vocabulary = weight.shape[0]
    _check_tensor("weight", weight, [vocabulary, width], hidden)
    # Autocast lets every product cast its operands.
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        _refuse("weight", f"dtype of hidden, {hidden.dtype}", weight.dtype)
    for name, tensor in by_word.items():
        if tensor is not None:
            _check_tensor(name, tensor, [vocabulary], hidden)
    a, b = lora
    if (a is None) != (b is None):
        raise ValueError("linear_cross_entropy: lora_a and lora_b are given together or not at all")
    if a is not None and b is not None:
        if a.dim() != 2 or a.shape[0] == 0:
            _refuse("lora_a", f"[r, {width}] with r >= 1", list(a.shape))
        _check_tensor("lora_a", a, [a.shape[0], width], hidden)
        _check_tensor("lora_b", b, [vocabulary, a.shape[0]], hidden)
    if token_weight is not None:
        _check_tensor("token_weight", token_weight, list(labels.shape), hidden)
    if softcap is not None and not 0 < softcap < float("inf"):
        _refuse("softcap", "a finite number above 0, or None", softcap)
    for name, number in (("logit_scale", logit_scale), ("z_loss", z_loss)):
        if not -float("inf") < number < float("inf"):
            _refuse(name, "a finite number", number)
    if not 0 <= label_smoothing <= 1:
        _refuse("label_smoothing", "a number between 0 and 1", label_smoothing)
    if reduction not in _REDUCTIONS:
        _refuse("reduction", "'mean', 'sum' or 'none'", repr(reduction))
    if num_items_in_batch is not None:
        if reduction != "mean":
            _refuse(
                "reduction", "'mean' with num_items_in_batch, which says what to divide by", repr(reduction)
            )
        # A tensor may be on a device that nobody waits for.
        if isinstance(num_items_in_batch, torch.Tensor):
            if num_items_in_batch.numel() != 1:
                _refuse("num_items_in_batch", "one number", list(num_items_in_batch.shape))
        elif not num_items_in_batch >= 0:
            _refuse("num_items_in_batch", "a number of labels, 0 or more", num_items_in_batch)
    _check_labels(labels, hidden, vocabulary, ignore_index)


def _check_labels(labels: torch.Tensor, hidden: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        _refuse("labels", "integers", labels.dtype)
    if labels.shape != hidden.shape[:-1]:
        _refuse(
            "labels",
            f"shape of hidden without its last dimension, {list(hidden.shape[:-1])}",
            list(labels.shape),
        )
    if labels.device != hidden.device:
        _refuse("labels", f"device of hidden, {hidden.device}", labels.device)
    # On a GPU it would have to wait for the device, and nothing can be known of a graph's values.
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(outside.any()):
        first = int(labels[outside][0])
        _refuse("labels", f"values from 0 to {vocabulary - 1}, or ignore_index {ignore_index}", first)
