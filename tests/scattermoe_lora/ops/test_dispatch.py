"""The device, autocast and precision in which an operator computes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Shape, experts_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad


def test_kernels_launch_on_the_tensors_device_and_without_autocast(
    submodule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []

    class Watched:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *_: object) -> None:
            entered.append(-1)

    monkeypatch.setattr(torch.accelerator, "device_index", Watched)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    with FakeTensorMode():
        x, own = (torch.empty(2, device=device) for device in ("cuda:1", "cuda:0"))
    # Without a GPU torch.autocast("cuda") warns and stays off, so the CPU's stands for it below.
    with submodule("ops.dispatch").undisturbed(x):
        assert entered == [1]
    with submodule("ops.dispatch").undisturbed(own):
        assert entered == [1, -1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with submodule("ops.dispatch").undisturbed(torch.empty(2)):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


EXPERTS = experts_module(Shape(tokens=4, experts=2, top_k=1, hidden=16, intermediate=8, rank=1))
CALLS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "grouped_linear": lambda kernel, x: kernel.grouped_linear(
        x[0, 0], torch.randn(2, 3, 16), torch.zeros(4, 1, dtype=torch.int64)
    ),
    "grouped_linear of a dual weight": lambda kernel, x: kernel.grouped_linear(
        torch.randn(5, 16), x[0], torch.zeros(5, 1, dtype=torch.int64)
    ),
    "flash_attn_func": lambda kernel, x: kernel.flash_attn_func(torch.randn_like(x), x, x),
    "gated_activation": lambda kernel, x: kernel.gated_activation(torch.randn_like(x), x),
    "rms_norm": lambda kernel, x: kernel.rms_norm(x),
    "rms_norm_rotary": lambda kernel, x: kernel.rms_norm_rotary(x),
    "linear_cross_entropy": lambda kernel, x: kernel.linear_cross_entropy(
        x[0, 0], torch.randn(3, 16), torch.zeros(4, dtype=torch.int64)
    ),
    "experts_forward": lambda kernel, x: kernel.experts_forward(
        EXPERTS,
        x[0, 0],
        torch.zeros(4, 1, dtype=torch.int64),
        torch.ones(4, 1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused_and_never_dropped(kernel: Any, name: str) -> None:
    x, tangent = torch.randn(2, 1, 3, 4, 16)
    message = f"{name.split()[0]}: forward-mode differentiation"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: CALLS[name](kernel, x), (x,), (tangent,))
    with forward_ad.dual_level():
        # What carries none is computed as ever.
        assert CALLS[name](kernel, x).isfinite().all()
        with pytest.raises(NotImplementedError, match=message):
            CALLS[name](kernel, forward_ad.make_dual(x, tangent))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "hessian": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f, randomness="same")(x[None]).sum())(
        x
    ),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f), randomness="same")(x[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_transforms_of_torch_func_are_refused_by_name(kernel: Any, name: str, transform: str) -> None:
    x = torch.randn(1, 3, 4, 16)
    with pytest.raises(NotImplementedError, match=f"{name.split()[0]}: torch.func.grad"):
        TRANSFORMS[transform](lambda x: CALLS[name](kernel, x).sum(), x)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused_by_name_and_first_ones_with_a_graph_are_not(
    kernel: Any, name: str
) -> None:
    x = torch.randn(1, 3, 4, 16).requires_grad_()

    def gradient(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.autograd.grad(CALLS[name](kernel, x).sin().sum(), x, **options)[0]

    with_graph = gradient(create_graph=True)
    assert torch.equal(with_graph, gradient())
    with pytest.raises(NotImplementedError, match=f"{name.split()[0]}: second derivatives"):
        with_graph.square().sum().backward()


SWITCHES = {
    "pass": "ieee",
    'torch.set_float32_matmul_precision("high")': "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    'torch.backends.cuda.matmul.fp32_precision = "tf32"': "tf32",
    'torch.backends.fp32_precision = "tf32"': "tf32",
}


def test_float32_is_multiplied_in_full_unless_any_of_torchs_switches_allows_tf32(kernel: Any) -> None:
    # Switches of the process: each is set in one of its own, of which one has imported what all need.
    code = f"""
import importlib, os, torch
from kernels import get_kernel
kernel = get_kernel("org/scattermoe-lora", version=1)
gpu = importlib.import_module(kernel.__name__ + ".ops.grouped_linear.gpu")
for switch in {list(SWITCHES)!r}:
    if os.fork() == 0:
        exec(switch)
        print(gpu.float32_precision(torch.zeros(1)), gpu.float32_precision(torch.zeros(1).half()), flush=True)
        os._exit(0)
    os.wait()
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False
    )
    expected = [f"{precision} ieee" for precision in SWITCHES.values()]
    assert finished.stdout.splitlines() == expected, finished.stderr
