"""Calls that go without torch's dispatcher, and those that may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """The names of the operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """The names of the functions that a function mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor whose class wants to see what is done with it."""


@pytest.fixture
def dispatched(submodule: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the forwards and backwards of ``rms_norm`` that went through the dispatcher."""
    names: list[str] = []
    call = torch.library.CustomOpDef.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self._name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", watched)
    return names


def test_a_plain_call_goes_without_the_dispatcher_and_others_do_not(
    kernel: Any, dispatched: list[str]
) -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8))

    def gradients(rows: torch.Tensor = x, create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        y = kernel.rms_norm(rows, weight)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight), create_graph=create_graph)

    both = ["rms_norm_forward", "rms_norm_backward"]
    expected = gradients()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel.rms_norm(x, weight), expected[0])
    assert not dispatched
    # Of a backward that is itself differentiated the operator refuses the derivative by name.
    graph = gradients(create_graph=True)
    assert dispatched == both[1:]
    with pytest.raises(NotImplementedError, match="rms_norm: second derivatives"):
        graph[1].sum().backward()
    for results in (graph, gradients(x.as_subclass(Subclass))):
        for result, value in zip(results, expected, strict=True):
            assert torch.equal(result.as_subclass(torch.Tensor), value)
    assert dispatched == [both[1], *both]


def test_plain_attention_and_losses_go_without_the_dispatcher(kernel: Any, dispatched: list[str]) -> None:
    x, rows, head = (torch.randn(shape, requires_grad=True) for shape in ((1, 4, 2, 16), (3, 8), (5, 8)))
    labels = torch.tensor([0, 4, -100])
    for call in (
        lambda: kernel.flash_attn_func(x, x, x, causal=True, s_aux=torch.zeros(2)),
        lambda: kernel.linear_cross_entropy(rows, head, labels),
        lambda: kernel.linear_cross_entropy(rows, head, labels, reduction="none"),
    ):
        call().sum().backward()
    assert not dispatched
    # Autocast is no reason to dispatch, and does not reach the products inside.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel.linear_cross_entropy(rows, head, labels).dtype == torch.float32
    assert not dispatched


@pytest.mark.parametrize("mode", [Operators, Functions])
def test_a_mode_sees_the_operator(kernel: Any, mode: Any) -> None:
    with mode() as seen:
        kernel.rms_norm(torch.randn(3, 8))
    assert any("rms_norm_forward" in name for name in seen.names)


def test_a_tracer_sees_the_operator_and_a_tensor_without_data_has_a_shape(kernel: Any) -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return kernel.rms_norm(x)

    x = torch.randn(3, 8)
    assert "rms_norm_forward" in make_fx(norm)(x).code
    assert "rms_norm_forward" in str(torch.jit.trace(norm, x).graph)
    assert kernel.rms_norm(x.to("meta")).shape == x.shape
