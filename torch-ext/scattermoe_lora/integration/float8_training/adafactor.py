"""Adafactor that reads and writes float8 weights and gradients, one matrix in float32 at a time.

Source: Shazeer & Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory Cost* (2018), algorithms 4 and 5,
without momentum. A stack of experts is as many matrices, each with second moments and clipping of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ...ops.float8.gradient import compress_gradient
from ...ops.float8.tensor import Float8Tensor
from .optimizer import ParameterOptimizer, local, matrices, write

_EPSILON = 1e-30
_LEAST_SCALE = 1e-3


class Adafactor(ParameterOptimizer):
    """Adafactor for weights in float8 and any others, whose gradients it keeps in float8 between backward and step.

    Of a parameter with two or more dimensions a row and a column of second moments are kept in float32, of others a
    number for each element. From when the optimizer is made, gradients of matrices and stacks of matrices become
    float8 as soon as autograd has accumulated them. Weights in float8 and bfloat16 are rounded stochastically when
    they are written. Under FSDP2 it is made after ``fully_shard``; statistics are those of whole parameters.

    Args:
        params: Parameters or groups of them.
        lr: The step, as a multiple of the root mean square of an update that is not clipped.
        relative_step: Multiply each step by the root mean square of the parameter (at least 1e-3), the paper's
            step sizes, of which ``lr`` is then ``rho``.
        clip_threshold: Updates are scaled down to this root mean square: d of the paper.
        decay_rate: The decay of second moments after ``t`` steps is ``1 - t ** decay_rate``.
        weight_decay: Of each step ``lr * weight_decay`` times the parameter is taken from it.

    Raises:
        ValueError: Settings out of range.
        NotImplementedError: Parameters that several processes have split otherwise than FSDP2 alone does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        relative_step: bool = False,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, is_right in (
            ("lr", lr, lr >= 0),
            ("clip_threshold", clip_threshold, clip_threshold > 0),
            ("decay_rate", decay_rate, decay_rate <= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not is_right:
                bound = {"clip_threshold": "a positive number", "decay_rate": "at most 0"}.get(
                    name, "at least 0"
                )
                raise ValueError(f"Adafactor: {name}: expected {bound}, got {value}")
        defaults = {
            "lr": lr,
            "relative_step": relative_step,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose gradients become float8 from now on."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            _refuse_other_splits(parameter)
            if parameter.requires_grad and parameter.dim() in (2, 3):
                parameter.register_post_accumulate_grad_hook(compress_gradient)

    def _step_of(self, parameter: Any, group: dict[str, Any], generator: torch.Generator) -> None:
        weight, gradient, split = local(parameter), local(parameter.grad), _split_of(parameter)
        count, n, k = matrices(weight)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            is_factored = weight.dim() > 1
            names = ("rows", "columns") if is_factored else ("squares",)
            sizes = ((count, n), (count, k)) if is_factored else ((count, n, k),)
            for name, shape in zip(names, sizes, strict=True):
                state[name] = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        state["step"] += 1
        beta = 1 - float(state["step"]) ** group["decay_rate"]
        for matrix in range(count):
            update = _read(gradient, matrix, (count, n, k))
            _precondition(update, state, matrix, beta, split)
            update.div_((split.root_mean_square(update) / group["clip_threshold"]).clamp_(min=1))
            numbers = _read(weight, matrix, (count, n, k))
            size: Any = group["lr"]
            if group["relative_step"]:
                size = size * split.root_mean_square(numbers).clamp_(min=_LEAST_SCALE)
            numbers.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(size))
            write(weight, matrix, numbers, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` returned; second moments stay in float32.

        Raises:
            ValueError: The state of another optimizer.
        """
        saved = state_dict["state"]
        for number, values in saved.items():
            if not {"step"} <= values.keys() <= {"step", "rows", "columns", "squares"}:
                raise ValueError(
                    f"Adafactor: load_state_dict: parameter {number}: expected rows and columns of second moments, got "
                    f"{', '.join(sorted(values))}; the checkpoint is another optimizer's"
                )
        super().load_state_dict(state_dict)
        # torch gives state the parameter's dtype.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in saved.get(number, {}).items():
                if name != "step":
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)


class _Split(NamedTuple):
    """The processes that share a matrix along its rows, and its sizes."""

    group: Any
    rows: int
    columns: int

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place."""
        if self.group is not None:
            torch.distributed.all_reduce(numbers, group=self.group)
        return numbers

    def root_mean_square(self, numbers: torch.Tensor) -> torch.Tensor:
        """That of the whole matrix."""
        total = self.sum(torch.linalg.vector_norm(numbers).square_())
        return total.div_(max(1, self.rows * self.columns)).sqrt_()


def _precondition(
    gradient: torch.Tensor, state: dict[str, torch.Tensor], matrix: int, beta: float, split: _Split
) -> None:
    """Divides a gradient, in place, by the root of its second moments, and moves these on."""
    squares = gradient.square().add_(_EPSILON)
    if "squares" in state:
        moments = state["squares"][matrix].mul_(beta).add_(squares, alpha=1 - beta)
        gradient.mul_(moments.rsqrt())
        return
    rows, columns = state["rows"][matrix], state["columns"][matrix]
    rows.mul_(beta).add_(squares.mean(1), alpha=1 - beta)
    columns.mul_(beta).add_(split.sum(squares.sum(0)), alpha=(1 - beta) / split.rows)
    # The mean of the rows is that of the columns, which every process knows.
    gradient.mul_((rows / columns.mean()).rsqrt_().unsqueeze(1)).mul_(columns.rsqrt())


def _refuse_other_splits(parameter: Any) -> None:
    """Raises NotImplementedError for a parameter that is not split by rows alone.

    Copies of a part (hybrid sharding) would have gradients that were rounded by other random numbers, and so part.
    """
    if not hasattr(parameter, "device_mesh"):
        return
    from torch.distributed.tensor import Shard

    if tuple(parameter.placements) != (Shard(0),):
        raise NotImplementedError(
            "Adafactor: expected parameters that are whole or split along their first dimension alone (FSDP2 on a mesh "
            f"of one dimension), got {tuple(parameter.placements)}"
        )


def _split_of(parameter: Any) -> _Split:
    """How a parameter is split."""
    _, rows, columns = matrices(parameter)
    group = None
    if hasattr(parameter, "device_mesh") and parameter.dim() != 3:  # Stacks are split between matrices.
        group = parameter.device_mesh.get_group()
    return _Split(group, rows, columns)


def _read(tensor: Any, matrix: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """A float32 copy."""
    if isinstance(tensor, Float8Tensor):
        return tensor.read(matrix)
    return tensor.detach().reshape(shape)[matrix].to(torch.float32, copy=True)
