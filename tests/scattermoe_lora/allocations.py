"""What tensors take, without asking the allocator."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """The largest number of bytes that results of operators held at a time, storages counted once while they live.

    ``largest`` is that of one storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Any] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in inputs
                and not tensor.is_meta
            ):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.largest = max([self.largest, *(size for _, size in self.live.values())])
        if self.now() > self.peak:
            # A launch in Triton's interpreter leaves its tensors in a cycle, for the collector to find.
            gc.collect(1)
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """The number of bytes that they hold."""
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        return sum(size for _, size in self.live.values())
