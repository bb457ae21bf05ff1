"""Another optimizer, such as AdamW with states in 8 bits, over weights in float8: a dense parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...ops.float8.tensor import Float8Tensor
from .optimizer import ParameterOptimizer, local, matrices, write


class Float8Optimizer(ParameterOptimizer):
    """An optimizer of another library that steps weights in float8, one of them in float32 at a time.

    ``Float8Optimizer(bitsandbytes.optim.AdamW8bit, model.parameters(), lr=1e-5)``. Each parameter has an optimizer of
    that class for itself; what this one keeps (its states in 8 bits) stays, and the float32 copy of the weight and of
    its gradient goes when the step is made. Weights in float8 and bfloat16 are rounded stochastically.

    Args:
        optimizer_class: Takes parameters and ``settings``. It must not look from one parameter to another.
        params: Parameters or groups of them.
        lr: The learning rate, which schedulers change.
        settings: Further settings of the class; groups may have others.
    """

    def __init__(
        self, optimizer_class: Callable[..., Any], params: Iterable[Any], lr: float, **settings: Any
    ) -> None:
        self._optimizer_class = optimizer_class
        self._optimizers: dict[torch.Tensor, Any] = {}
        super().__init__(params, {"lr": lr, **settings})

    def _step_of(self, parameter: Any, group: dict[str, Any], generator: torch.Generator) -> None:
        weight = local(parameter)
        optimizer = self._optimizer_of(parameter, group)
        (dense,) = optimizer.param_groups[0]["params"]
        dense.data, dense.grad = _dense(weight), _dense(local(parameter.grad))
        for name, value in group.items():
            current = optimizer.param_groups[0].get(name)
            if name in ("params", "steps"):
                continue
            if isinstance(current, torch.Tensor):  # torchao's learning rate
                current.fill_(value)
            else:
                optimizer.param_groups[0][name] = value
        optimizer.step()
        self._show_state(parameter)
        for matrix, numbers in enumerate(dense.detach().reshape(matrices(weight))):
            write(weight, matrix, numbers, generator)
        _forget(dense)

    def _optimizer_of(self, parameter: Any, group: dict[str, Any]) -> Any:
        if parameter not in self._optimizers:
            dense = torch.nn.Parameter(_dense(local(parameter)))
            settings = {name: value for name, value in group.items() if name in self.defaults}
            self._optimizers[parameter] = self._optimizer_class([dense], **settings)
        return self._optimizers[parameter]

    def _show_state(self, parameter: Any) -> None:
        # From an optimizer without state torch.distributed.checkpoint makes one by a step before it saves.
        self.state[parameter] = next(iter(self._optimizers[parameter].state.values()), {})

    def state_dict(self) -> dict[str, Any]:
        """The states of all parameters, by number, and the groups."""
        result = super().state_dict()
        for number, parameter in enumerate(self._parameters()):
            if parameter in self._optimizers:
                result["state"][number] = self._optimizers[parameter].state_dict()["state"].get(0, {})
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` returned, or the optimizer's own over dense weights.

        Raises:
            ValueError: The state of this package's Adafactor.
        """
        for number, state in state_dict["state"].items():
            if not {"rows", "columns", "squares"}.isdisjoint(state):
                raise ValueError(
                    f"Float8Optimizer: load_state_dict: parameter {number}: expected what {self._optimizer_class} "
                    f"keeps, got {', '.join(sorted(state))}; the checkpoint is Adafactor's"
                )
        super().load_state_dict({**state_dict, "state": {}})
        # Saved by number or, by torch.distributed.checkpoint, by name.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = dict(zip(keys, self._parameters(), strict=True))
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for key, state in state_dict["state"].items():
            parameter = parameters[key]
            optimizer = self._optimizer_of(parameter, groups[id(parameter)])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
            self._show_state(parameter)
            _forget(optimizer.param_groups[0]["params"][0])

    def _parameters(self) -> list[Any]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _dense(tensor: Any) -> torch.Tensor:
    """A float32 copy."""
    if isinstance(tensor, Float8Tensor):
        return tensor.dequantize(torch.float32)
    return tensor.to(torch.float32, copy=True)


def _forget(dense: torch.nn.Parameter) -> None:
    """Frees the copies, the parameter staying the key of the optimizer's state."""
    dense.grad = None
    dense.data = dense.data.new_empty(0)
