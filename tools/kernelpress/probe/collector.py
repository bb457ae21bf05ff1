"""Imports that the garbage collector passes over, in processes that do little else than import."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def imports_kept() -> Iterator[None]:
    """Let the collector pass over what is imported meanwhile, then and later, here and in copies of this process.

    Torch makes many objects, and none of them is garbage: to look through them took a third of a check's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # In the end everything is collected, or extension modules report what is left as leaks of theirs.
        atexit.register(gc.unfreeze)
