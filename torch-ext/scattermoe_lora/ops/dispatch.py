"""Choice of the implementation that serves a tensor, native CPU code or Triton kernels, and its surroundings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.autograd import forward_ad


def use_triton(x: torch.Tensor) -> bool:
    """Tell whether the Triton kernels serve ``x``.

    They do on GPUs. On a CPU they do only under Triton's interpreter (``TRITON_INTERPRET=1``), which exists to test
    them without a GPU.

    Raises:
        NotImplementedError: ``x`` is bfloat16 under the interpreter, which multiplies its bits as integers.
    """
    if not x.is_cpu:
        return True
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if x.dtype == torch.bfloat16:
        raise NotImplementedError(
            "Triton's interpreter cannot multiply bfloat16; use float16 or float32 under it"
        )
    return True


_UNCHANGED = nullcontext()
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_HAS_CUDA = hasattr(torch._C, "_cuda_getDevice")


def _current_device() -> int:
    # torch.accelerator asks each call which of all kinds of accelerators this machine has.
    return torch._C._cuda_getDevice() if _HAS_CUDA else torch.accelerator.current_device_index()


def is_undisturbed(x: torch.Tensor) -> bool:
    """True if no autocast is on and the device of ``x`` is the current one, as in most calls."""
    return not _is_any_autocast_enabled() and (x.is_cpu or x.get_device() == _current_device())


def undisturbed(x: torch.Tensor) -> AbstractContextManager[None]:
    """The context in which an operator on ``x`` computes: without autocast, which reaches into operators and would cast
    half of a sum; and with the device of ``x`` as the current one, on which alone Triton launches."""
    return _UNCHANGED if is_undisturbed(x) else _switched(x.device)


@contextmanager
def _switched(device: torch.device) -> Iterator[None]:
    kind, is_cast = device.type, torch.is_autocast_enabled(device.type)
    is_elsewhere = kind != "cpu" and device.index != _current_device()
    if is_cast:
        # torch.autocast would also read and set the dtype and the cache, in ten times as long.
        torch.set_autocast_enabled(kind, False)
    try:
        with torch.accelerator.device_index(device.index) if is_elsewhere else _UNCHANGED:
            yield
    finally:
        if is_cast:
            torch.set_autocast_enabled(kind, True)


def refuse_transforms(name: str, *tensors: torch.Tensor | None) -> None:
    """Raises NotImplementedError for derivatives that only ``torch.func`` and dual tensors ask for.

    Where a tensor carries a tangent, as in ``torch.func.jvp``: torch drops them at an operator that has a rule for the
    backward alone, and the derivative would come out as zero. And where one needs a gradient within a transform
    (``torch.func.grad``, or ``vmap`` over it), for which such an operator has no rule.
    """
    if torch.compiler.is_compiling():
        return
    # Without a level of dual numbers no tensor carries a tangent.
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name}: forward-mode differentiation (torch.func.jvp, dual tensors) is not supported; use backward, "
                "or transformers' eager mode in a model"
            )
    if not (torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()):
        return
    if any(tensor is not None and _needs_gradient(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{name}: torch.func.grad, and the other transforms of torch.func over what needs a gradient, are not "
            "supported; use torch.autograd.grad or backward, or transformers' eager mode in a model"
        )


def _needs_gradient(tensor: torch.Tensor) -> bool:
    """True if ``tensor``, or the one inside where transforms have wrapped it, needs a gradient."""
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def refuse_second_derivative(name: str, backward: torch.library.CustomOpDef) -> None:
    """Lets a derivative of the operator ``backward``, which computes the gradients of ``name``, be refused by name.

    Gradients with a graph (``create_graph=True``) can be had; a derivative of them raises NotImplementedError.
    """

    def refuse(*_: object) -> None:
        raise NotImplementedError(
            f"{name}: second derivatives (a gradient's gradient) are not supported; use transformers' eager mode in a "
            "model"
        )

    backward.register_autograd(refuse)
