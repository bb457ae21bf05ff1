"""What was found in sources before, kept by their content, so that a build looks at what is new alone.

The time or size of a file never counts: every file is read and hashed each time. What is kept stands under
``$XDG_CACHE_HOME/kernelpress`` (``~/.cache`` by default), one file for each package; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

# Whoever changes one of these may find something else in the same source.
_CODE = (
    "analysis",
    "bindings",
    "by_name",
    "expressions",
    "files",
    "handed_on",
    "imports",
    "layout",
    "leftovers",
    "memory",
    "names",
    "occurrences",
    "registering",
    "shared",
    "sites",
    "text",
    "when",
)


class Memory:
    """Answers by keys, of which those asked for or given in this run are kept for the next."""

    def __init__(self, path: Path | None = None) -> None:
        """Without a path, nothing is kept."""
        self._path = path
        self._before: dict[str, Any] = _read(path) if path is not None else {}
        self._now: dict[str, Any] = {}

    @classmethod
    def of(cls, package: Path) -> Memory:
        """What is known of the package in a directory."""
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        name = hashlib.sha256(str(package.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return cls(Path(home, "kernelpress", f"{name}.json"))

    def get(self, key: str) -> Any:
        """The answer given before, or ``None``."""
        if key not in self._now and key in self._before:
            self._now[key] = self._before[key]
        return self._now.get(key)

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer that JSON can hold and that is not ``None``."""
        self._now[key] = answer

    def save(self) -> None:
        """Write what is kept, if it has changed; to fail is to be slower the next time, and nothing else."""
        if self._path is None or self._now == self._before:
            return
        data = json.dumps(self._now, separators=(",", ":")).encode("ascii")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=self._path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_seal(data) + data)
                os.replace(aside, self._path)
            except BaseException:
                os.unlink(aside)
                raise


def key(kind: str, *parts: bytes) -> str:
    """A key that stands for a kind of answer and all that it depends on, together with the code that gives it."""
    digest = hashlib.sha256(_code())
    for part in (kind.encode("ascii"), *parts):
        # With its length before each part, no two lists of parts read the same.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


@cache
def _code() -> bytes:
    digest = hashlib.sha256(sys.version.encode("utf-8"))
    for name in _CODE:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.digest()


def _seal(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode("ascii") + b"\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        seal, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return {}
    # A file that was cut off or damaged is worth nothing.
    if seal + b"\n" != _seal(data):
        return {}
    found: dict[str, Any] = json.loads(data)
    return found
