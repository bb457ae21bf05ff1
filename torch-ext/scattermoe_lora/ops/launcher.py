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
_TRITON = JITFunction.__init__.__globals__
_INT32 = 1 << 31
# By the kernel's identity, which is no other's: a kernel that is here is kept. Its own hash is that of its source.
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
    # Not by its name: a tool's function that wraps it has the same.
    is_tritons = getattr(JITFunction.run, "__globals__", None) is _TRITON
    if not (is_tritons and isinstance(kernel, JITFunction)) or kernel.pre_run_hooks or _is_hooked():
        # There may be no GPU's driver to ask.
        kernel[grid](*arguments, **constants)
        return
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
    if found is not None:
        run, function, metadata, unread, *_ = found
        stream = active.get_current_stream(device)
        # As Triton's own ``run`` ends, but for hooks and what they are told. The constants are in the code.
        run(*grid, stream, function, metadata, None, None, None, *values, *unread)
        return
    compiled = kernel[grid](*arguments, **constants)
    # Of a CPU, or of another GPU, this one may be able to read some memory and not other.
    is_here = all(value.get_device() == device for value in arguments if isinstance(value, torch.Tensor))
    if is_here and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        unread = (None,) * (len(kernel.arg_names) - len(arguments))
        launch = compiled.run, compiled.function, compiled.packed_metadata, unread
        # With the compiled kernel itself, since what it has loaded goes with it.
        _compiled[tuple(key)] = *launch, compiled, kernel


def _is_hooked() -> bool:
    """True if a profiler wants to know of launches, or a tool chooses how the next one is compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Triton's are chains of calls; a tool may have put a function or None in their place.
    is_profiled = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return bool(is_profiled or runtime.add_stages_inspection_hook)
