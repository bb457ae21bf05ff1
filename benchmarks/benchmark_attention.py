"""Attention of Gemma 4's layers, in the form that ``kernels benchmark`` runs.

Each workload is verified against, and timed next to, torch's ``scaled_dot_product_attention`` with K and V repeated
and, where "causal" does not say it all, a dense mask, as transformers calls it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

HEADS, KEY_HEADS = 8, 4
TOKENS = {"cpu": 512, "cuda": 8192}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# The runner allows an error of 0.01 whatever the results' size, and bfloat16 is off by more than that from 2 upwards.
SMALL = 1 / 8


# No Benchmark itself: the runner takes every one in this file, and refuses one without a workload.
class _Layer:
    seed = 0
    device: str
    kernel: Any
    out: torch.Tensor
    head_dim = 512
    window = 0
    sequences = 1
    decoding = False

    def setup(self) -> None:
        on_cpu = self.device == "cpu"
        tokens = TOKENS["cpu" if on_cpu else "cuda"] // self.sequences * self.sequences
        self.length = tokens // self.sequences
        dtype = getattr(torch, DTYPES["cpu" if on_cpu else "cuda"])

        def random(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(1, tokens, heads, self.head_dim, device=self.device).to(dtype)

        queries = 1 if self.decoding else tokens
        self.q = random(queries, HEADS).requires_grad_()
        self.k = random(tokens, KEY_HEADS).requires_grad_()
        # Results and the gradients of queries are in proportion to the values; a mean over all tokens is small already.
        scale = 1.0 if self.decoding else SMALL
        self.v = (scale * random(tokens, KEY_HEADS)).requires_grad_()
        self.grad = random(queries, HEADS)
        if on_cpu and self.window:
            self.window = 128
        self.boundaries = torch.arange(0, tokens + 1, self.length, dtype=torch.int32, device=self.device)
        rows, columns = (
            torch.arange(tokens - queries, tokens, device=self.device)[:, None],
            torch.arange(tokens, device=self.device),
        )
        visible = (columns <= rows) & (columns // self.length == rows // self.length)
        self.mask = visible & (columns > rows - self.window) if self.window else visible

    def forward(self) -> torch.Tensor:
        """The kernel's attention, ``[1, S, H, D]``."""
        window = (self.window - 1, 0) if self.window else (-1, -1)
        if self.sequences == 1:
            return self.kernel.flash_attn_func(self.q, self.k, self.v, causal=True, window_size=window)
        q, k, v = (x.squeeze(0) for x in (self.q, self.k, self.v))
        lengths = (self.boundaries, self.boundaries, self.length, self.length)
        return self.kernel.flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=window)[None]

    def sdpa(self) -> torch.Tensor:
        """torch's."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
        plain = not self.window and self.sequences == 1 and not self.decoding
        mask = None if plain else self.mask
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain).transpose(1, 2)


class _Forward(_Layer):
    @torch.no_grad()
    def benchmark_forward(self) -> None:
        self.out = self.forward()

    @torch.no_grad()
    def verify_forward(self) -> torch.Tensor:
        return self.sdpa()


class _Training(_Layer):
    def benchmark_step(self) -> None:
        self.out, *_ = torch.autograd.grad(self.forward(), [self.q, self.k, self.v], self.grad)

    def verify_step(self) -> torch.Tensor:
        return torch.autograd.grad(self.sdpa(), [self.q, self.k, self.v], self.grad)[0]


class GlobalPrefill(_Forward, Benchmark):
    """A global layer, all tokens at once, no gradients."""


class GlobalDecode(_Forward, Benchmark):
    """A global layer, one token after the others, no gradients."""

    decoding = True


class GlobalTraining(_Training, Benchmark):
    """A global layer, forward and backward; the result is the gradient of the queries."""


class PackedTraining(_Training, Benchmark):
    """The same for eight sequences in one row."""

    sequences = 8


class SlidingTraining(_Training, Benchmark):
    """A sliding layer, forward and backward."""

    head_dim = 256
    window = 1024
