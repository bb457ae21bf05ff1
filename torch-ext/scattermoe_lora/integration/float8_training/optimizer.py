"""What the optimizers of float8 weights share: a parameter at a time, rounded alike on processes that hold the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ops.float8.rounding import round_to_bfloat16
from ...ops.float8.tensor import Float8Tensor


class ParameterOptimizer(torch.optim.Optimizer):
    """An optimizer that steps one parameter after the other.

    The random numbers by which a weight is rounded come of the number of the step and of the parameter. Processes with
    a copy each (``DistributedDataParallel``) would draw others from torch's generator, and their copies would part.
    """

    def _step_of(self, parameter: Any, group: dict[str, Any], generator: torch.Generator) -> None:
        """One step of a parameter that has a gradient; ``generator`` is for rounding it."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            # Saved with the group, so that a run that is resumed does not draw the same numbers again.
            group["steps"] = group.get("steps", 0) + 1
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.numel():
                    generator = torch.Generator(parameter.device)
                    generator.manual_seed(hash((number, place, group["steps"])))
                    self._step_of(parameter, group, generator)
        return loss


def local(tensor: Any) -> Any:
    """What this process has of a parameter or a gradient."""
    tensor = tensor.detach()
    return getattr(tensor, "_local_tensor", tensor)


def matrices(tensor: Any) -> tuple[int, int, int]:
    """The number of matrices, and rows and columns of each."""
    if tensor.dim() == 3:
        return tuple(tensor.shape)
    rows = tensor.shape[0] if tensor.dim() else 1
    return 1, rows, tensor.numel() // max(rows, 1) if rows else 1


def write(weight: Any, matrix: int, numbers: torch.Tensor, generator: torch.Generator) -> None:
    """Puts float32 numbers into one matrix of a weight, which float8 and bfloat16 round stochastically."""
    if isinstance(weight, Float8Tensor):
        weight.write(matrix, numbers, stochastic=True, generator=generator)
        return
    if weight.dtype == torch.bfloat16:
        numbers = round_to_bfloat16(numbers, generator)
    target = weight[matrix] if weight.dim() == 3 else weight
    target.copy_(numbers.view(target.shape))
