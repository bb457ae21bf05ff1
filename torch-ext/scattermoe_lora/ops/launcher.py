"""Launches of Triton kernels, of which each kind but the first takes little of the host's time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_MOST_COMPILED = 4096
_TRITON = JITFunction.__module__
_INT32 = 1 << 31
# By the kernel's identity, which is no other's: a kernel is as old as its module. Its own hash is that of its source.
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def launch_kernel(
    kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any], constants: Mapping[str, Any]
) -> None:
    """``kernel[grid](*arguments, **constants)``, in a fraction of the host's time from the second launch of a kind on.

    Triton looks at every argument, reads its settings from the environment and writes all of a launch into a string to
    find the code that it compiled. Here a tuple finds it, of what Triton compiles anew for on an NVIDIA GPU. On others,
    whose rules differ, in the interpreter, and where a tool has hooks or its own ``JITFunction.run``, each launch is
    Triton's own. Triton's settings are looked at where a kind is launched for the first time.

    Args:
        kernel: A ``@triton.jit`` function of a module, whose ``tl.constexpr`` parameters are its last ones.
        grid: Programs along three dimensions.
        arguments: Values of the other parameters, all of them, in order.
        constants: Values of the ``tl.constexpr`` parameters, and Triton's options, by name.
    """
    key: list[Any] = [id(kernel), *constants.items()]
    values: list[Any] = []
    add, keep = key.append, values.append
    for value in arguments:
        kind = type(value)
        if kind is int:
            # 1 becomes a constant of the code.
            if -_INT32 <= value < _INT32:
                add(1 if value == 1 else -1 if value & 15 else -2)
            else:
                add(-3 if value & 15 else -4)
            keep(value)
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            # Triton refuses a CPU's tensor, but not its address: another device is another kind.
            add(value.dtype)
            add(value.get_device())
            value = value.data_ptr()
            add(value & 15)
            keep(value)
        elif value is None or kind is float:
            add(kind)
            keep(value)
        elif kind is TensorDescriptor:
            add((value.base.dtype, *value.block_shape))
            keep(value)
        else:
            kernel[grid](*arguments, **constants)
            return
    active = driver.active
    device = active.get_current_device()
    add(device)
    found = _compiled.get(tuple(key))
    is_own = JITFunction.run.__module__ == _TRITON and not _is_hooked()
    if found is not None and is_own:
        _, run, function, metadata, unread = found
        stream = active.get_current_stream(device)
        # As Triton's own ``run`` ends, but for hooks and what they are told. The constants are in the code.
        run(*grid, stream, function, metadata, None, None, None, *values, *unread)
        return
    compiled = kernel[grid](*arguments, **constants)
    devices = {value.get_device() for value in arguments if isinstance(value, torch.Tensor)}
    is_known = isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda"
    # Memory of a CPU that a GPU can read may be the next time memory that it cannot.
    if is_known and is_own and len(devices) < 2:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        unread = (None,) * (len(kernel.arg_names) - len(arguments))
        # With the compiled kernel itself, since what it has loaded goes with it.
        _compiled[tuple(key)] = compiled, compiled.run, compiled.function, compiled.packed_metadata, unread


def _is_hooked() -> bool:
    """True if a profiler wants to know of launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Triton's are chains of calls; a tool may have put a function or None in their place.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
