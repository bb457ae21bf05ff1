"""The oracle: cross entropy of all logits as plain PyTorch, in the precision of its input."""

from __future__ import annotations

import torch


def logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """``[*, V]``, the logits whose cross entropy is taken."""
    x = hidden @ weight.T
    if lora_a is not None and lora_b is not None:
        x = x + scaling * (hidden @ lora_a.T @ lora_b.T)
    if bias is not None:
        x = x + bias
    x = x * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: float | None = None,
    **head: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, log-probabilities and entropies of :func:`..api.linear_cross_entropy`."""
    x = logits(hidden, weight, **head)  # type: ignore[arg-type]
    valid = labels != ignore_index
    index = labels.masked_fill(~valid, 0)
    weights = x.new_ones(x.shape[-1]) if class_weight is None else class_weight.to(x)
    by_token = valid.to(x) * (1 if token_weight is None else token_weight)
    log_p = x.log_softmax(dim=-1)
    log_probs = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    smooth = -(weights * log_p).mean(dim=-1)
    loss = -(1 - label_smoothing) * weights[index] * log_probs + label_smoothing * smooth
    loss = by_token * (loss + z_loss * x.logsumexp(dim=-1).square())
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        count = (by_token * weights[index]).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / count if count else loss * 0
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return loss, log_probs * valid, entropy * valid
