"""The parts that an MLP's children play, found by trying."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...ops.activation import ACTIVATIONS, act
from .. import trying


class Layout(NamedTuple):
    """``down(act(gate(x)) * up(x))``, by the names of a module's children.

    Attributes:
        gate, up: The projections; with one projection for both, the same name.
        down: The projection behind them.
        act: The module of the activation; None where the forward calls a function.
        activation: One of :data:`~scattermoe_lora.ops.activation.ACTIVATIONS`.
        gate_first: Of one projection for both, gate is the first half.
    """

    gate: str
    up: str
    down: str
    act: str | None
    activation: str
    gate_first: bool

    def split(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up of what the projections return."""
        if self.gate != self.up:
            return gate, up
        first, second = gate.chunk(2, dim=-1)
        return (first, second) if self.gate_first else (second, first)


def find_layout(module: torch.nn.Module) -> Layout | str | None:
    """The layout that computes what ``module`` computes, to the bit in float32 and in bfloat16.

    Its class is not asked what it is called: its forward runs with other children, which keep what they are called
    with and return numbers of every size.

    Returns:
        None where the module is no MLP: two or three projections, of which the last one's result is returned. Where it
        is one of another formula, a reason.
    """
    children = _children(module)
    if children is None:
        return None
    candidates: list[Layout] | None = None

    def trial() -> bool:
        nonlocal candidates
        for dtype in (torch.float32, torch.bfloat16):
            agreeing = _agreeing(module, *children, dtype)
            if agreeing is None:
                return False
            candidates = [layout for layout in agreeing if candidates is None or layout in candidates]
        return True

    if not trying.succeeds(trial) or candidates is None:
        return None
    return (
        candidates[0]
        if candidates
        else f"it computes none of down(act(gate(x)) * up(x)) for {', '.join(ACTIVATIONS)}"
    )


def _children(module: torch.nn.Module) -> tuple[list[str], str | None] | None:
    """The children with parameters, and the one without, of what may be an MLP; None for any other module."""
    if module._parameters or module._buffers or not 2 <= len(module._modules) <= 4:
        return None
    projections: list[str] = []
    others: list[str] = []
    for name, child in module.named_children():
        tensor = next(child.parameters(), next(child.buffers(), None))
        (others if tensor is None else projections).append(name)
    if len(projections) not in (2, 3) or len(others) > 1:
        return None
    return projections, others[0] if others else None


class _Projection(torch.nn.Module):
    """Stands in for a projection: keeps what it is called with, and returns ``result``."""

    def __init__(self, result: torch.Tensor) -> None:
        super().__init__()
        self.result = result
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        return self.result


class _Activation(torch.nn.Module):
    """Calls an activation, and keeps what it is called with."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        return self.inner.forward(x)


def _agreeing(
    module: Any, projections: list[str], act_name: str | None, dtype: torch.dtype
) -> list[Layout] | None:
    """The layouts that compute what one run of the module computes; None where it is no MLP."""
    children: dict[str, Any] = {
        name: _Projection(trying.probe(dtype, 5.0 * shift)) for shift, name in enumerate(projections)
    }
    if act_name is not None:
        children[act_name] = _Activation(module._modules[act_name])
    x = trying.probe(dtype)
    result = type(module).forward(trying.twin(module, children, {}), x)
    if any(len(child.inputs) != 1 for child in children.values()):
        return None
    (down,) = (name for name in projections if children[name].inputs[0] is not x)
    if result is not children[down].result:
        return None
    first, *rest = (name for name in projections if name != down)
    layouts = []
    for activation in ACTIVATIONS:
        for swapped in (False, True):
            gate, up = (first, rest[0]) if rest else (first, first)
            if rest and swapped:
                gate, up = up, gate
            layout = Layout(gate, up, down, act_name, activation, not swapped or bool(rest))
            g, u = layout.split(children[gate].result, children[up].result)
            agrees = torch.equal(children[down].inputs[0], act(activation, g) * u)
            if agrees and (act_name is None or torch.equal(children[act_name].inputs[0], g)):
                layouts.append(layout)
    return layouts
