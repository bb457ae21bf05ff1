"""Launches of many kinds by the package's launcher and by Triton's own, on a made-up GPU; for simulated_gpu.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

PARAMETERS = 4
launches: list[tuple[Any, ...]] = []


def launcher_of(source: Any, metadata: Any) -> Any:
    """A launcher that writes down the code, the grid and the arguments."""

    def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        _, about, enter, _, *values = rest
        if enter is not None:
            enter(about)
        values = values[:PARAMETERS]
        addresses = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        launches.append((metadata.hash, (x, y, z), addresses))

    return launch


DRIVER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    # Where the tensors are: torch's number for a CPU.
    get_current_device=lambda: -1,
    get_current_stream=lambda _: 0,
    launcher_cls=launcher_of,
    utils=SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 1 << 18},
    ),
)


@triton.jit
def fill(x_ptr, y_ptr, n, value, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    if y_ptr is not None:
        value += tl.load(y_ptr).to(tl.float32)
    tl.store(x_ptr + columns, (value + n).to(x_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def copy(x, y, row, column, BLOCK: tl.constexpr):
    y.store([row, column], x.load([row, column]))


def kinds() -> dict[str, tuple[Any, list[Any], dict[str, Any]]]:
    """Kernel, arguments and constants, by what is special about them."""
    x, y, odd = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16), torch.zeros(65)[1:]
    boxes = [TensorDescriptor.from_tensor(torch.zeros(64, 64), [rows, 16]) for rows in (16, 32)]
    block = {"BLOCK": 16}
    return {
        "integer": (fill, [x, None, 17, 2.0], block),
        "another integer": (fill, [x, None, 19, 2.5], block),
        "one": (fill, [x, None, 1, 2.0], block),
        "multiple of 16": (fill, [x, None, -48, 2.0], block),
        "64 bits": (fill, [x, None, (1 << 31) + 1, 2.0], block),
        "64 bits, multiple of 16": (fill, [x, None, -(1 << 31) - 16, 2.0], block),
        "integer for a number": (fill, [x, None, 17, 2], block),
        "dtype": (fill, [y, None, 17, 2.0], block),
        "two tensors": (fill, [torch.nn.Parameter(x), y, 17, 2.0], block),
        "alignment": (fill, [odd, y, 17, 2.0], block),
        "constant": (fill, [x, None, 17, 2.0], {"BLOCK": 32}),
        "option": (fill, [x, None, 17, 2.0], {**block, "num_warps": 2}),
        "box": (copy, [boxes[0], boxes[0], 0, 0], block),
        "larger box": (copy, [boxes[1], boxes[1], 0, 0], block),
    }


def nothing(self: Any, *arguments: Any, **options: Any) -> None:
    """In place of Triton's ``run``, so that only launches without it are made."""


def compare(launch_kernel: Any) -> tuple[list[str], int]:
    """The kinds whose second launch by ``launch_kernel`` was not Triton's, and the number of codes among all."""
    driver.set_active(DRIVER)
    cases, grid = kinds(), (2, 3, 1)
    for case in cases.values():
        launch_kernel(case[0], grid, *case[1:])
    own, JITFunction.run.__code__ = JITFunction.run.__code__, nothing.__code__
    for case in cases.values():
        launch_kernel(case[0], grid, *case[1:])
    JITFunction.run.__code__ = own
    hooked: list[Any] = []
    knobs.runtime.launch_enter_hook.add(hooked.append)
    launch_kernel(fill, grid, *cases["integer"][1:])
    knobs.runtime.launch_enter_hook.remove(hooked.append)
    assert [about.get()["name"] for about in hooked] == ["fill"], "a profiler is told of launches"
    launches.pop()
    for kernel, arguments, constants in cases.values():
        kernel[grid](*arguments, **constants)
    count = len(cases)
    second, tritons = launches[count:-count], launches[-count:]
    assert len(second) == count
    different = [name for name, *two in zip(cases, second, tritons, strict=True) if two[0] != two[1]]
    launch = functools.partial(launch_kernel, fill, grid, *cases["integer"][1:])
    assert_seen(launch)
    assert_looked_at(launch)
    return different, len({code for code, *_ in tritons})


def assert_seen(launch: Callable[[], None]) -> None:
    """Launches through a tool in place of Triton's ``run`` that has its name, and through a hook of the kernel."""
    seen, run = [], JITFunction.run

    @functools.wraps(run)
    def watch(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append("tool")
        return run(self, *arguments, **options)

    JITFunction.run = watch
    launch()
    JITFunction.run = run
    fill.add_pre_run_hook(lambda *_, **__: seen.append("hook"))
    launch()
    fill.pre_run_hooks.clear()
    assert seen == ["tool", "hook"]


def assert_looked_at(launch: Callable[[], None]) -> None:
    """Launches twice with tensors of another device than the current one, of which Triton looks at each address."""
    DRIVER.get_current_device = lambda: 0
    launch()
    own, JITFunction.run.__code__ = JITFunction.run.__code__, nothing.__code__
    count = len(launches)
    launch()
    JITFunction.run.__code__ = own
    assert len(launches) == count
