"""Ctrl-C while work is spread over processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def left_to_this_process() -> Iterator[None]:
    """Keep an interrupt, which a terminal sends to all processes, from those that are started here.

    A worker that it ends while it starts leaves its pool waiting for it for ever. This process gets one that comes
    meanwhile when it is done here.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    # Where none runs yet, starting one would lift the mask again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
