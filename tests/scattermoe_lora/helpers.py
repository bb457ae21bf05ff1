"""Helpers of the kernel tests: experts modules, routing and comparisons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether the Triton kernels run, which take no float64: in the interpreter, or on the GPU that test_gpu.py asks for.
TRITON = INTERPRETED or os.environ.get("KERNEL_TESTS_DEVICE", "cpu") != "cpu"
ACTIVATION_NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


@dataclass(frozen=True)
class Shape:
    """Sizes of one experts layer."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    rank: int


# One token; an odd size in every dimension; more experts than pairs; one expert; a rank above every block.
AWKWARD = [
    Shape(tokens=1, experts=4, top_k=2, hidden=16, intermediate=8, rank=4),
    Shape(tokens=7, experts=5, top_k=3, hidden=33, intermediate=20, rank=3),
    Shape(tokens=3, experts=11, top_k=1, hidden=24, intermediate=17, rank=1),
    Shape(tokens=19, experts=1, top_k=1, hidden=40, intermediate=36, rank=8),
    Shape(tokens=37, experts=3, top_k=2, hidden=70, intermediate=40, rank=67),
]


def experts_module(shape: Shape, activation: str = "gelu_tanh", dtype: torch.dtype = torch.float32) -> Any:
    """A real ``Gemma4TextExperts`` with random weights."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    config = Gemma4TextConfig(
        num_experts=shape.experts,
        top_k_experts=shape.top_k,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        hidden_activation=ACTIVATION_NAMES[activation],
        enable_moe_block=True,
    )
    config._experts_implementation = "eager"
    module = Gemma4TextExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    # Sentinels are routed to it in some tests; without any it makes no difference.
    module._is_expert_parallel = True
    return module.to(dtype)


def route(shape: Shape, sentinels: bool = False) -> torch.Tensor:
    """``[T, K]`` expert indices, each token's distinct; with ``sentinels`` about one in three is ``E``."""
    index = torch.rand(shape.tokens, shape.experts).topk(shape.top_k).indices
    if sentinels:
        index[torch.rand(index.shape) < 1 / 3] = shape.experts
    return index


def low_rank(experts: int, n_out: int, n_in: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors ``A`` ``[E, r, N_in]`` and ``B`` ``[E, N_out, r]``."""
    return torch.randn(experts, rank, n_in) * n_in**-0.5, torch.randn(experts, n_out, rank) * rank**-0.5


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error relative to the largest value, in float64."""
    difference = (got.detach().double() - exact.detach().double()).abs().max()
    return float(difference / exact.detach().double().abs().max().clamp(min=1e-12))


def assert_close(
    got: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    tolerance: float,
    plain: Sequence[torch.Tensor] | None = None,
) -> None:
    """``plain`` are the reference's results in the precision of ``got``: where they are off, ``got`` may be as well.

    A gradient whose parts cancel out is nearly zero, and then rounding alone is large beside it.
    """
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert g.shape == e.shape
        allowed = tolerance if plain is None else max(tolerance, 3 * error(plain[i], e))
        assert error(g, e) < allowed, f"tensor {i} of shape {list(g.shape)}: error {error(g, e):.2e}"
