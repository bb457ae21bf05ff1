"""Factors in the kernels' layout have the bits that torch gives them. Natively, and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from helpers import TRITON

# Sides below, at and above a block's, of one, and none; few experts and many rows, as far as a block's longer side.
SHAPES = [(1, 1), (5, 1), (1, 70), (130, 33), (64, 128), (600, 7), (0, 4), (4, 0)]
# 14 / 3, which no float holds, 4 / sqrt(2) of rank-stabilised LoRA, none and nothing.
SCALINGS = [14 / 3, 4 / 2**0.5, 1, 0]


@pytest.mark.parametrize(
    ("stored", "used"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_factors_and_gradients_are_scaled_in_the_wider_dtype_and_rounded_once(
    submodule, bfloat16, stored, used
) -> None:
    transpose = submodule("ops.grouped_linear.transpose").transpose_and_scale
    wide = torch.promote_types(stored, used)
    for shape, scaling in ((shape, scaling) for shape in SHAPES for scaling in SCALINGS):
        matrix = torch.randn(shape).to(stored).requires_grad_()
        # As a gradient comes from several adapters: a part of a wider one.
        grad = torch.randn(shape[1], shape[0] + 1).to(used)[:, 1:]
        result = transpose(matrix, scaling, used)
        assert result.is_contiguous()
        assert same_bits(result, (matrix.detach().to(wide) * scaling).to(used).t())
        (got,) = torch.autograd.grad(result, matrix, grad)
        assert got.is_contiguous() or not TRITON
        assert same_bits(got, (grad.to(wide) * scaling).to(stored).t())


if TRITON:

    def test_the_operator_keeps_torchs_rules_and_refuses_a_tangent(submodule) -> None:
        module = submodule("ops.grouped_linear.transpose")
        matrix = torch.randn(5, 3, requires_grad=True)
        torch.library.opcheck(module.scaled_transpose, (matrix, 1.5, torch.float16))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            torch.func.jvp(
                lambda t: module.transpose_and_scale(t, 1.5, t.dtype),
                (matrix.detach(),),
                (torch.ones(5, 3),),
            )
