"""Weights in float8 (E4M3), as parameters that are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..quantization.encode import layout_of
from ..quantization.stack import QuantizedStack
from . import products
from .rounding import BLOCK, E4M3, Float8, blocks_of
from .tensor import Float8Tensor


class Float8Weight(Float8Tensor):
    """A weight in E4M3 with the shape and dtype of the dense one: of a linear layer, or of a stack of experts.

    A linear layer decodes it for each use, and its gradient is a :class:`.gradient.Float8Gradient`. Whatever else
    computes with it gets a dense copy and a dense gradient.

    FSDP2 splits it along its first dimension, gathers codes and scales, and reduces dense gradients.
    """

    kind: ClassVar[Float8] = E4M3
    has_float8_products: ClassVar[bool] = False

    @property
    def stack(self) -> QuantizedStack:
        """Its codes and scales as the operators of quantized experts take them."""
        return QuantizedStack(self.codes, (self.scales,), layout_of("fp8"), self.dtype)

    def standard(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes in the weight's shape as float8_e4m3fn, and the scales of blocks that begin with the whole weight."""
        codes, scales = self.codes, self.scales
        if self.layout_dims == 2 and len(codes) > 1:
            if codes.shape[1] % BLOCK == 0:
                scales = scales.flatten(0, 1).unsqueeze(0)
            else:  # Blocks began anew with the part of each process.
                whole = Float8Weight.from_dense(self.dequantize(), stochastic=False)
                codes, scales = whole.codes, whole.scales
        scales = scales[0] if self.layout_dims == 2 else scales
        return codes.view(self.shape).view(torch.float8_e4m3fn), scales

    @staticmethod
    def from_standard(
        codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, name: str
    ) -> Float8Weight:
        """The weight of codes ``[N, K]`` or ``[E, N, K]`` and the scales of their blocks.

        Scales that are no powers of two make one rounding to those.

        Raises:
            ValueError: Another dtype or number of scales, or scales that are NaN or infinite; the message names it.
        """
        if codes.dtype != torch.float8_e4m3fn or codes.dim() not in (2, 3):
            raise ValueError(
                f"{name}: expected float8_e4m3fn [N, K] or [E, N, K], got {codes.dtype} {list(codes.shape)}"
            )
        *experts, n, k = codes.shape
        expected = [*experts, blocks_of(n), blocks_of(k)]
        if list(scales.shape) != expected:
            raise ValueError(
                f"{name}_scale_inv: expected {expected} for blocks of {BLOCK} x {BLOCK}, got {list(scales.shape)}"
            )
        scales = scales.float()
        if not bool(scales.isfinite().all()):
            raise ValueError(f"{name}_scale_inv: expected finite scales, got some that are NaN or infinite")
        dims = codes.dim()
        codes, scales = codes.view(torch.uint8), scales.clone()
        if dims == 2:
            codes, scales = codes.unsqueeze(0), scales.unsqueeze(0)
        weight = Float8Weight(codes.clone(), scales, dtype, dims)
        if bool((torch.frexp(scales)[0].abs() != 0.5).any()):
            for matrix in range(len(codes)):
                weight.write(matrix, weight.read(matrix), stochastic=False)
        return weight

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Codes and scales to gather along their first dimension, and how to read them."""
        return (self.codes.contiguous(), self.scales.contiguous()), self.layout_dims

    def fsdp_post_all_gather(
        self,
        outputs: tuple[torch.Tensor, ...],
        metadata: int,
        param_dtype: torch.dtype,
        *,
        out: Float8Weight | None = None,
    ) -> tuple[Float8Weight, tuple[torch.Tensor, ...]] | None:
        """The whole weight of what was gathered; ``out`` has been made of the same memory."""
        if out is not None:
            return None
        codes, scales = outputs
        return type(self)(codes, scales, param_dtype, metadata, is_gathered=True), outputs

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return products.linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


class MultipliedWeight(Float8Weight):
    """A weight of a linear layer whose forward product runs in float8."""

    has_float8_products: ClassVar[bool] = True
