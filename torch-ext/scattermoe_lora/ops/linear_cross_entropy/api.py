"""The public building block: cross entropy straight from hidden states and the weight of the head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import dispatch
from .arguments import Objective, Operands, Settings, Statistics
from .checks import check
from .decoded import DecodedWeight, statistics
from .op import forward
from .total import forward as forward_total


class LinearCrossEntropy(NamedTuple):
    """The loss, and what else was asked for.

    Attributes:
        loss: A scalar, or of the shape of the labels with ``reduction="none"``.
        log_probs: Of the labels' shape, the log-probability of each label; 0 where it is ignored. Or None.
        entropy: Of the labels' shape, the entropy of each token's distribution; 0 where ignored. Or None.
    """

    loss: torch.Tensor
    log_probs: torch.Tensor | None
    entropy: torch.Tensor | None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | DecodedWeight,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: float | torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    return_log_probs: bool = False,
    return_entropy: bool = False,
) -> torch.Tensor | LinearCrossEntropy:
    """Cross entropy of ``logits = cap(logit_scale * (hidden W^T + scaling * hidden A^T B^T + bias))``.

    The logits of more than a block of tokens are never in memory, forward or backward; they are in float32. Where the
    loss is one number its gradients are computed with it. What a frozen head would need for one is not computed.
    Differentiable once in ``hidden``, ``weight``, ``bias``, ``lora_a``, ``lora_b`` and ``token_weight``, through every
    result. The same input gives the same bits.

    Args:
        hidden: ``[..., H]``, any strides; float64 (on the CPU only), float32, bfloat16 or float16.
        weight: ``[V, H]``, dtype of ``hidden``. Under autocast, any of these dtypes: it is read block by block in the
            dtype that autocast computes in, and its gradient is of its own. Or a :class:`DecodedWeight`, frozen: 64 MB
            of it are decoded at a time, forward and backward.
        labels: ``[...]`` integers: as ``hidden`` without its last dimension. Those below 0 or above ``V - 1`` other
            than ``ignore_index`` are refused on the CPU, and make the loss NaN on a GPU, which nobody waits for.
        bias: ``[V]``, any of the dtypes.
        softcap: ``c`` of ``cap(x) = c * tanh(x / c)``, as Gemma's ``final_logit_softcapping``; None for none.
        logit_scale: Factor of the logits, for temperature, or as models of Cohere and Granite have it.
        ignore_index: The label of tokens that do not count.
        label_smoothing: ``e`` in ``(1 - e) * loss + e * mean over the vocabulary of -log p`` (Szegedy et al., 2016).
        z_loss: Factor of ``logsumexp(logits)^2``, which is added (Chowdhery et al., *PaLM*, 2022).
        class_weight: ``[V]``, weights of the vocabulary, as in ``torch.nn.functional.cross_entropy``.
        token_weight: ``[...]``, factors of each token's loss.
        reduction: ``"mean"``, over tokens that count, weighted by ``class_weight`` and ``token_weight``; ``"sum"``; or
            ``"none"``, a loss for each token. Where no token counts, mean and sum are 0.
        num_items_in_batch: Divides the sum in place of the weight of these tokens: the number of labels in all
            micro-batches of a step, as transformers' Trainer passes it.
        lora_a, lora_b: ``[r, H]`` and ``[V, r]``, any of the dtypes, given together; used in the dtype of ``hidden``.
        scaling: Factor of the low-rank logits (LoRA's ``alpha / r``).
        return_log_probs, return_entropy: Whether to return each token's, too, from the same pass.

    Returns:
        The loss in float32 (float64 for float64); with one of the last two flags a :class:`LinearCrossEntropy`.

    Raises:
        ValueError: Arguments that do not fit together; the message names argument, expected and got.
        NotImplementedError: float64 on a GPU; forward-mode differentiation, ``torch.func.grad`` and second derivatives.
    """
    hidden = _cast(hidden)
    check(
        hidden,
        weight,
        labels,
        {"bias": bias, "class_weight": class_weight},
        (lora_a, lora_b),
        token_weight,
        softcap,
        logit_scale,
        label_smoothing,
        z_loss,
        ignore_index,
        reduction,
        num_items_in_batch,
    )
    head_weight = weight if isinstance(weight, torch.Tensor) else None
    dispatch.refuse_transforms(
        "linear_cross_entropy", hidden, head_weight, bias, lora_a, lora_b, token_weight
    )
    valid = (labels != ignore_index).reshape(-1)
    index = _index(labels, valid, weight.shape[0])
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    head = (bias, *_low_rank(rows, lora_a, lora_b, scaling))
    wide = torch.promote_types(rows.dtype, torch.float32)
    settings = Settings(
        float(logit_scale), float(softcap or 0.0), bool(label_smoothing), return_entropy, False, False
    )
    factors, weights = _factors(
        index, valid, weight.shape[0], label_smoothing, z_loss, class_weight, token_weight, wide
    )
    divisor, unit = _divisor(weights, reduction, num_items_in_batch, rows.dtype)
    objective = Objective._make(None if factor is None else factor / divisor for factor in factors)
    trained = _trained(rows, head_weight, *head)
    is_total = any(trained) and reduction != "none" and not _pulls(rows, trained, settings)
    if head_weight is not None and is_total:
        operands = Operands(rows, head_weight.contiguous(), *head, index, class_weight)
        total, *first, _ = forward_total(*operands, *objective, *settings, trained)
        results = Statistics._make((*first, rows.new_empty(0), rows.new_empty(0)))
    else:
        results = _statistics(rows, weight, *head, index, class_weight, settings)
        total = objective.by_token(results, class_weight, weight.shape[0])
        total = total.view(labels.shape) if reduction == "none" else total.sum()
    loss = total / unit
    if not return_log_probs and not return_entropy:
        return loss
    log_probs = results.label_logit - results.lse
    return LinearCrossEntropy(
        loss,
        log_probs.view(labels.shape) if return_log_probs else None,
        results.entropy.view(labels.shape) if return_entropy else None,
    )


def token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor | DecodedWeight,
    labels: torch.Tensor,
    settings: Settings,
    *,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
) -> Statistics:
    """The statistics of each token's logits that ``settings`` ask for, of tokens ``[T]`` that all have a label.

    The arguments are those of :func:`linear_cross_entropy`, and so is what is raised.
    """
    hidden = _cast(hidden)
    softcap = settings.softcap or None
    check(
        hidden,
        weight,
        labels,
        {"bias": bias},
        (lora_a, lora_b),
        None,
        softcap,
        settings.scale,
        0.0,
        0.0,
        -1,
        "none",
        None,
    )
    index = _index(labels, torch.ones_like(labels, dtype=torch.bool), weight.shape[0])
    head = (bias, *_low_rank(hidden, lora_a, lora_b, 1.0))
    return _statistics(hidden.contiguous(), weight, *head, index, None, settings)


def _cast(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states in the dtype that they are multiplied in."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden


def _index(labels: torch.Tensor, valid: torch.Tensor, words: int) -> torch.Tensor:
    """The labels as the operator takes them: ``words``, which has no logit, for one outside the vocabulary."""
    flat = labels.reshape(-1).long()
    return flat.masked_fill(flat < 0, words).masked_fill(~valid, -1)


def _low_rank(
    rows: torch.Tensor, lora_a: torch.Tensor | None, lora_b: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``low`` and ``b`` of the operator."""
    if lora_a is None or lora_b is None:
        return None, None
    return F.linear(rows, lora_a.to(rows.dtype)), (lora_b * scaling).to(rows.dtype).contiguous()


def _statistics(
    rows: torch.Tensor,
    weight: torch.Tensor | DecodedWeight,
    bias: torch.Tensor | None,
    low: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    index: torch.Tensor,
    class_weight: torch.Tensor | None,
    settings: Settings,
) -> Statistics:
    rest = (bias, low, lora_b, index, class_weight)
    if isinstance(weight, DecodedWeight):
        return statistics(rows, weight, *rest, settings)
    trained = _trained(rows, weight, bias, low, lora_b)
    settings = settings._replace(pulls=_pulls(rows, trained, settings))
    return Statistics(*forward(rows, weight.contiguous(), *rest, *settings))


def _trained(*operands: torch.Tensor | None) -> list[bool]:
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in operands]


def _pulls(rows: torch.Tensor, trained: list[bool], settings: Settings) -> bool:
    """True where hidden states alone get a gradient, which a CPU's forward has ready, whatever the losses become."""
    is_alone = trained[0] and not any(trained[1:]) and not settings.sums and not settings.entropies
    return is_alone and not dispatch.use_triton(rows)


def _factors(
    index: torch.Tensor,
    valid: torch.Tensor,
    words: int,
    label_smoothing: float,
    z_loss: float,
    class_weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    wide: torch.dtype,
) -> tuple[Objective, torch.Tensor]:
    """Factors of the terms of each token's loss, and the weights ``[T]`` that a mean divides by."""
    every = valid.to(wide)
    if token_weight is not None:
        every = token_weight.reshape(-1).to(wide).masked_fill(~valid, 0.0)
    weights = every
    if class_weight is not None:
        # What is outside the vocabulary is NaN already, whatever its weight.
        weights = every * class_weight.to(wide)[index.clamp(0, words - 1)]
    smooth = every * (label_smoothing / words) if label_smoothing else None
    return Objective(weights * (1 - label_smoothing), smooth, every * z_loss if z_loss else None), weights


def _divisor(
    weights: torch.Tensor,
    reduction: str,
    num_items_in_batch: float | torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """What the tokens' factors are divided by, and what their sum is divided by afterwards.

    In float16 the gradients of a mean over thousands of tokens are too small until a gradient scaler's factor comes to
    them. So the sum takes the divisor's power of two, which rounds nothing, and the factors the rest.
    """
    if reduction != "mean":
        return 1.0, 1.0
    if num_items_in_batch is None:
        count = weights.sum()
    else:
        count = torch.as_tensor(num_items_in_batch, dtype=weights.dtype, device=weights.device)
    # Nothing counts: nothing over nothing is 0 here, and so is its gradient.
    count = count.masked_fill(count == 0, 1.0)
    if dtype != torch.float16:
        return count, 1.0
    power = torch.ldexp(torch.ones_like(count), torch.frexp(count.detach()).exponent)
    return count / power, power
