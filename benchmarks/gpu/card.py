"""Turns at the one card: processes prepare beside each other, and each is timed alone."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
# By how much a dense product beside a row may differ from that of the idle card.
TOLERANCE = 0.1
# How often a row is timed, at most, until its dense rate is the card's.
TRIES = 3


def is_disturbed(rate: float, idle_rate: float) -> bool:
    """Tell whether a dense rate is not that of the card when it is idle."""
    # So that NaN is, too.
    return not abs(rate / idle_rate - 1) <= TOLERANCE


def time_undisturbed(
    timed: Callable[[], T], dense: Callable[[], float], idle_rate: float, tries: int = TRIES
) -> tuple[T, float, bool]:
    """Time something, and the card's dense rate right after it; once more while that is not the idle card's.

    Returns:
        The last result, its dense rate, and whether it is disturbed still.
    """
    for _ in range(tries):
        result, rate = timed(), dense()
        if not is_disturbed(rate, idle_rate):
            return result, rate, False
    return result, rate, True


class Turns:
    """One process's turns, by a lock that all share: any number may prepare, or one is alone.

    A process prepares from the moment that this is made. It is alone only once nobody prepares any more, and until it
    is done nobody else begins to. Each turn is a line of ``turns.jsonl``: who, whether alone, begin and end by
    ``time.monotonic()``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self._log = name, folder / "turns.jsonl"
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._prepares_since: float | None = time.monotonic()

    def end_preparing(self) -> None:
        """Give way to those who want to be alone."""
        if self._prepares_since is not None:
            self._record(False, self._prepares_since)
            self._prepares_since = None
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The time in which nothing else of this run uses the card or the processors."""
        self.end_preparing()
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        begin = time.monotonic()
        try:
            yield
        finally:
            self._record(True, begin)
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _record(self, alone: bool, begin: float) -> None:
        turn = {"name": self.name, "alone": alone, "begin": begin, "end": time.monotonic()}
        append_line(self._log, turn)


def append_line(path: Path, value: Any) -> None:
    """Append a value to a file of JSON lines, at once: lines of several processes do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, (json.dumps(value) + "\n").encode())
    finally:
        os.close(file)


def read_lines(path: Path) -> list[Any]:
    """The values of such a file; none where it is missing. A line that a kill has cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
