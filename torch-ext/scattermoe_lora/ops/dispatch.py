"""Which implementation runs for a tensor: native CPU code, or Triton kernels."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch


def use_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels serve ``x``.

    They do on GPUs. On a CPU they do only under Triton's interpreter (``TRITON_INTERPRET=1``), which exists to test
    them without a GPU.

    Raises:
        NotImplementedError: ``x`` is bfloat16 under the interpreter, which multiplies its bits as integers.
    """
    if x.device.type != "cpu":
        return True
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if x.dtype == torch.bfloat16:
        raise NotImplementedError(
            "Triton's interpreter cannot multiply bfloat16; use float16 or float32 under it"
        )
    return True


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """The context in which an operator on ``x`` computes: autocast reaches into it, and would cast half of a sum."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
