"""A journal of releases on this machine: which branches one was about to change, and which commits were verified.

A publisher that is killed between its commits and the proof leaves a release that nobody has used. The Hub
does not show that, so it is written down here: before a branch changes, the commit that it is at; after the proof, the
commits that passed it. The files are under ``$XDG_STATE_HOME/kernelpress`` (``~/.local/state`` by default); to lose
them costs a second proof, and a release that fails it then is not taken back by itself.
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
_EXPIRY = 24 * 3600


class Journal:
    """The entries for one build in one repository; each change is on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before, self._verified = _read(path)

    @classmethod
    def of(cls, endpoint: str, repo_id: str, build: str) -> Journal:
        """The journal of a build, named by its content hash."""
        home = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
        name = hashlib.sha256("\0".join((endpoint, repo_id, build)).encode()).hexdigest()[:32]
        return cls(Path(home, "kernelpress", "releases", f"{name}.json"))

    @property
    def before(self) -> _Before:
        """Branches that were about to change and are not verified since, with their commits then (``None``: new)."""
        return dict(self._before)

    def changing(self, branch: str, before: str | None) -> None:
        """Write down that a branch is about to change."""
        self._before[branch] = before
        self._write()

    def has_verified(self, commits: Iterable[str]) -> bool:
        """True if these very commits have passed."""
        return bool(self._verified) and set(commits) <= self._verified

    def verified(self, commits: Iterable[str]) -> None:
        """Write down that these commits have passed, and that nothing is under way."""
        self._before, self._verified = {}, set(commits)
        self._write()

    def settled(self) -> None:
        """Write down that nothing is under way: it was taken back."""
        self._before = {}
        self._write()

    def _write(self) -> None:
        data = json.dumps({"before": self._before, "verified": sorted(self._verified)})
        # A machine without a directory that can be written publishes, too.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=self._path.parent)
            with os.fdopen(descriptor, "w") as file:
                file.write(data)
            os.replace(aside, self._path)


def _read(path: Path) -> tuple[_Before, set[str]]:
    try:
        entries = json.loads(path.read_text("utf-8"))
        before = {str(key): None if value is None else str(value) for key, value in entries["before"].items()}
        if time.time() - path.stat().st_mtime > _EXPIRY:
            before = {}
        return before, {str(commit) for commit in entries["verified"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, set()
