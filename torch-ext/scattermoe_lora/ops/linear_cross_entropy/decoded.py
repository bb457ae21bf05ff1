"""Statistics of the logits of a frozen head whose weight is decoded some rows at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .arguments import Settings, Statistics
from .op import forward

# Bytes of the weight that are decoded at a time.
_PART_BYTES = 1 << 26


@dataclass(frozen=True)
class DecodedWeight:
    """A frozen weight ``[V, H]`` that is kept as something else, a quantized head's.

    Attributes:
        shape: ``(V, H)``.
        dtype: What is decoded to: float64, float32, bfloat16 or float16.
        device: Where.
        decode: ``decode(start, stop)`` returns these rows, ``[stop - start, H]``; the same ones each time.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    decode: Callable[[int, int], torch.Tensor]


def statistics(
    rows: torch.Tensor,
    weight: DecodedWeight,
    bias: torch.Tensor | None,
    low: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    index: torch.Tensor,
    class_weight: torch.Tensor | None,
    settings: Settings,
) -> Statistics:
    """As :func:`.op.linear_cross_entropy_forward`, whose operands it takes, of a frozen weight.

    What is decoded is not kept for the backward, which decodes it again. ``settings`` ask for no ``pull``.
    """
    words, width = weight.shape
    size = max(_PART_BYTES // (width * rows.element_size()), 1)
    lses, labels, totals, means, peaks = [], [], [], [], []
    for start in range(0, words, size):
        stop = min(start + size, words)
        # Every token has a label in this part, so that its other statistics are computed; its own counts.
        own = (index >= start) & (index < stop)
        with _decoded_again(weight, start, stop) as part:
            lse, label_logit, logit_sum, entropy, peak, _ = forward(
                rows,
                part,
                None if bias is None else bias[start:stop],
                low,
                None if lora_b is None else lora_b[start:stop],
                (index - start).clamp(0, stop - start - 1).masked_fill(index < 0, -1),
                None if class_weight is None else class_weight[start:stop],
                *settings,
            )
        lses.append(lse)
        labels.append(torch.where(own, label_logit, 0.0))
        if settings.sums:
            totals.append(logit_sum)
        if settings.entropies:
            means.append(lse - entropy)
        if settings.peaks:
            peaks.append(peak)
    is_left_out = index < 0
    stacked = torch.stack(lses)
    lse = stacked.logsumexp(dim=0).masked_fill(is_left_out, 0.0)
    label_logit = torch.stack(labels).sum(dim=0).masked_fill(index >= words, torch.nan)
    empty = lse.new_empty(0)
    logit_sum = torch.stack(totals).sum(dim=0) if settings.sums else empty
    entropy = empty
    if settings.entropies:
        mean = ((stacked - lse).exp() * torch.stack(means)).sum(dim=0)
        entropy = (lse - mean).masked_fill(is_left_out, 0.0)
    peak = torch.stack(peaks).amax(dim=0) if settings.peaks else empty
    return Statistics(lse, label_logit, logit_sum, entropy, peak, rows.new_empty((0, width)))


@contextmanager
def _decoded_again(weight: DecodedWeight, start: int, stop: int) -> Iterator[torch.Tensor]:
    """The rows from ``start`` to ``stop``, of which what is saved for the backward keeps the bounds alone."""
    part = weight.decode(start, stop)
    shape = [stop - start, weight.shape[1]]
    if list(part.shape) != shape or part.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: weight: expected decode({start}, {stop}) to return {shape} of {weight.dtype}, got "
            f"{list(part.shape)} of {part.dtype}"
        )
    # By its address: autograd keeps this function.
    identity = part.data_ptr(), part.shape

    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        return None if (tensor.data_ptr(), tensor.shape) == identity else tensor

    def unpack(saved: torch.Tensor | None) -> torch.Tensor:
        return weight.decode(start, stop) if saved is None else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield part
