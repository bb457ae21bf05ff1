"""One Gemma 4 experts layer with LoRA on both projections, in the form that ``kernels benchmark`` runs.

Each workload is verified against, and timed next to, transformers' eager layer with the update merged into its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernels.benchmark import Benchmark
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer: experts, hidden, intermediate, top-k, tokens, rank; and its dtype."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    dtype: str
    rank: int = 16


# Gemma 4 26B-A4B's layer, and one that a CPU finishes in milliseconds.
GPU = Layer(experts=128, hidden=2816, intermediate=704, top_k=8, tokens=8192, dtype="bfloat16")
CPU = Layer(experts=32, hidden=512, intermediate=256, top_k=4, tokens=512, dtype="float32")
# The runner allows an error of 0.01 whatever the results' size, and bfloat16 is off by more than that from 2 upwards.
SMALL = 1 / 4


# No Benchmark itself: the runner takes every one in this file, and refuses one without a workload.
class _Experts:
    seed = 0
    device: str
    kernel: Any
    out: torch.Tensor
    single_token = False

    def setup(self) -> None:
        size = CPU if self.device == "cpu" else GPU
        dtype = getattr(torch, size.dtype)
        tokens = 1 if self.single_token else size.tokens
        config = Gemma4TextConfig(
            num_experts=size.experts,
            hidden_size=size.hidden,
            moe_intermediate_size=size.intermediate,
            top_k_experts=size.top_k,
            enable_moe_block=True,
        )
        config._experts_implementation = "eager"

        def random(*shape: int, std: float) -> torch.Tensor:
            return (torch.randn(*shape, device=self.device) * std).to(dtype)

        self.plain, self.merged = (
            Gemma4TextExperts(config).to(self.device, dtype).requires_grad_(False) for _ in "pm"
        )
        self.lora = {}
        for name, weight in self.plain.named_parameters():
            _, n_out, n_in = weight.shape
            weight.copy_(random(*weight.shape, std=n_in**-0.5))
            a = random(size.experts, size.rank, n_in, std=n_in**-0.5)
            b = random(size.experts, n_out, size.rank, std=0.1)
            self.lora[name] = (a, b)
            getattr(self.merged, name).copy_(weight + b @ a)
        self.x = random(tokens, size.hidden, std=1.0).requires_grad_()
        self.grad = random(tokens, size.hidden, std=0.5)
        self.index = torch.rand(tokens, size.experts, device=self.device).topk(size.top_k).indices
        # A router's sum to one.
        self.weights = SMALL * torch.rand(tokens, size.top_k, device=self.device).softmax(dim=-1).to(dtype)

    def forward(self) -> torch.Tensor:
        """The kernel's layer."""
        return self.kernel.experts_forward(self.plain, self.x, self.index, self.weights, lora=self.lora)

    def eager(self) -> torch.Tensor:
        """transformers' layer."""
        return self.merged(self.x, self.index, self.weights)


class Prefill(_Experts, Benchmark):
    """All tokens at once, no gradients."""

    @torch.no_grad()
    def benchmark_forward(self) -> None:
        self.out = self.forward()

    @torch.no_grad()
    def verify_forward(self) -> torch.Tensor:
        return self.eager()


class Decode(_Experts, Benchmark):
    """One token, no gradients."""

    single_token = True

    @torch.no_grad()
    def benchmark_forward(self) -> None:
        self.out = self.forward()

    @torch.no_grad()
    def verify_forward(self) -> torch.Tensor:
        return self.eager()


class Training(_Experts, Benchmark):
    """Forward and backward. The result is the gradient of the hidden states; the factors' are computed, too."""

    def setup(self) -> None:
        super().setup()
        self.factors = [factor.requires_grad_() for pair in self.lora.values() for factor in pair]

    def benchmark_step(self) -> None:
        self.out, *_ = torch.autograd.grad(self.forward(), [self.x, *self.factors], self.grad)

    def verify_step(self) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(self.eager(), [self.x], self.grad)
        return gradient
