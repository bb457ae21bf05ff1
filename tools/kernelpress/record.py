"""What this machine knows of a release: whether it has been verified, and what it was about to change.

A publisher that is killed between its commits and the proof leaves a release that nobody has used. The Hub
does not show that, so it is noted here: before a branch changes, what it held; after the proof, the commits that
passed it. To lose this (it is under ``$XDG_CACHE_HOME/kernelpress``, ``~/.cache`` by default) costs a second
proof, and that a release which fails it then is not taken back by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

_Before = dict[str, str | None]
# Seconds after which a release that was cut off is no longer this machine's to take back: others rely on it by then.
_FORGET = 24 * 3600


class Record:
    """The notes about one build in one repository; each change is on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before, self._verified = _read(path)

    @classmethod
    def of(cls, endpoint: str, repo_id: str, build: str) -> Record:
        """The notes about a build, named by its content hash."""
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        name = hashlib.sha256("\0".join((endpoint, repo_id, build)).encode()).hexdigest()[:32]
        return cls(Path(home, "kernelpress", "releases", f"{name}.json"))

    @property
    def before(self) -> _Before:
        """What each branch was at that was about to be changed and not verified since; ``None`` for a new one."""
        return dict(self._before)

    def changing(self, branch: str, before: str | None) -> None:
        """Note that a branch is about to be changed."""
        self._before[branch] = before
        self._write()

    def has_verified(self, commits: Iterable[str]) -> bool:
        """Whether these very commits have passed."""
        return bool(self._verified) and set(commits) <= self._verified

    def verified(self, commits: Iterable[str]) -> None:
        """Note that these commits have passed, and that nothing is under way."""
        self._before, self._verified = {}, set(commits)
        self._write()

    def settled(self) -> None:
        """Note that nothing is under way: it was taken back."""
        self._before = {}
        self._write()

    def _write(self) -> None:
        data = json.dumps({"before": self._before, "verified": sorted(self._verified)})
        # A machine without a cache that can be written publishes, too.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=self._path.parent)
            with os.fdopen(descriptor, "w") as file:
                file.write(data)
            os.replace(aside, self._path)


def _read(path: Path) -> tuple[_Before, set[str]]:
    try:
        held = json.loads(path.read_text("utf-8"))
        before = {str(key): None if value is None else str(value) for key, value in held["before"].items()}
        if time.time() - path.stat().st_mtime > _FORGET:
            before = {}
        return before, {str(each) for each in held["verified"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, set()
