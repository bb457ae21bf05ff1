"""PyTorch's own flash attention for CPUs, with a gradient of the log-sum-exp.

Queries are ``[B, H, n, D]``, keys and values ``[B, Hkv, m, D]``, of any strides but the last, which is 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_aten = torch.ops.aten
# Columns that carry the gradient of the log-sum-exp. Two are needed; heads are multiples of 8 elements wide.
_COLUMNS = 8
# Above it a gradient of the log-sum-exp is divided by it: float16 ends at twice as much.
_LARGE = 1 << 15
# Rows of 16 bits from which each head is copied to be in one piece, since every block of queries reads all keys again:
# with heads of 128 a tenth of the time of 1,024 tokens. In float32 it gained nothing.
_MANY_ROWS = 512
# Whether the kernel takes fewer heads of keys than of queries: earlier versions would read past their end.
_SHARES_KEYS = torch.__version__ >= "2.13"


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, H, n, D]``, rows before heads in memory, and log-sum-exp ``[B, H, n]``.

    Args:
        q, k, v: The operands.
        mask: ``[n, m]`` of their dtype, added to the scores.
        is_causal: Query i sees the keys up to i.
        scale: Factor of the scores.
    """
    if not _SHARES_KEYS:
        k, v = _repeated(k, q), _repeated(v, q)
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in the shapes and the dtype of ``q``, ``k`` and ``v``."""
    batch, kv_heads, _, head_dim = k.shape
    if grad_lse is not None:
        q, k, v, grad_out, out = _with_columns(q, k, v, grad_out, out, grad_lse)
    # Threads share the key heads there are, and a key's gradient is rounded for each query head that is added.
    is_shared = _SHARES_KEYS and q.element_size() >= 4 and batch * kv_heads % torch.get_num_threads() == 0
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad_out,
        # Copied here, so that they are gone before the sums below.
        _by_head(q),
        _by_head(k if is_shared else _repeated(k, q)),
        _by_head(v if is_shared else _repeated(v, q)),
        out,
        lse,
        0.0,
        is_causal,
        attn_mask=mask,
        scale=scale,
    )
    if dk.shape[1] != kv_heads:
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    if grad_lse is not None:
        dq, dk, dv = (x[..., :head_dim] for x in (dq, dk, dv))
    return dq, dk, dv


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, H, n, D]``, each head's rows one behind the other if there are many, of 16 bits."""
    return x.contiguous() if x.shape[2] >= _MANY_ROWS and x.element_size() == 2 else x


def _repeated(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Keys or values for each head of ``q``."""
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


def _with_columns(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The operands in wider heads, of which ``<grad_out, out>`` is what it was minus ``grad_lse``.

    It is all that the kernel subtracts from the gradient of a probability, and a probability of more is what a larger
    log-sum-exp is. Zeros in the other operands keep the products as they were. Two columns hold ``grad_lse`` in a dtype
    of few digits: the number, and what rounding took from it; divided where the dtype might end below it.
    """
    q, k, v, grad_out, out = (F.pad(x, (0, _COLUMNS)) for x in (q, k, v, grad_out, out))
    factor = torch.where(grad_lse.abs() > _LARGE, _LARGE, 1)
    grad_out[..., -2:] = factor.unsqueeze(-1)
    grad_lse = grad_lse / factor
    out[..., -2] = -grad_lse
    out[..., -1] = -(grad_lse + out[..., -2])
    return q, k, v, grad_out, out
