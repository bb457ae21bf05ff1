"""Side effects of importing a kernel: settings, patches, output, files, the network.

Runs in processes that have torch and the standard library alone, each of which loads one kernel.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from .global_state import differences, global_state

_NETWORK = ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
_FILES = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime",
)  # fmt: skip
_PROGRAMS = (
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
# Lines of output that are shown.
_LINES = 20


class SideEffects:
    """Collects in ``observed`` what happens within its block, each as the end of a sentence about who did it.

    Standard error must go to ``stderr`` in the working directory, and standard output is kept in ``stdout`` there.

    Args:
        own: What the paths of the kernel's files begin with. Files written and programs started count where one of
            these caused it, and not where a module did that it imports. Without it, neither is looked at.
    """

    def __init__(self, own: str | None) -> None:
        self.observed: list[str] = []
        self._own = own
        self._acts: dict[str, None] = {}
        self._on = False
        self._folder = Path.cwd()
        self._caches = _caches()

    def __enter__(self) -> SideEffects:
        self._before = global_state()
        # Whom a warning bothers can turn it off; it is not output.
        self._showwarning = warnings.showwarning
        warnings.showwarning = _ignore
        _flush()
        self._printed = os.fstat(2).st_size
        self._stdout = os.dup(1)
        with (self._folder / "stdout").open("wb") as stdout:
            os.dup2(stdout.fileno(), 1)
        sys.addaudithook(self._audit)
        self._on = True
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        _flush()
        os.dup2(self._stdout, 1)
        os.close(self._stdout)
        if warnings.showwarning is not _ignore:
            self.observed.append("replaces warnings.showwarning")
        warnings.showwarning = self._showwarning
        self.observed += differences(self._before, global_state())
        self.observed += _lines((self._folder / "stdout").read_bytes(), "")
        with contextlib.suppress(OSError):
            errors = (self._folder / "stderr").read_bytes()[self._printed :]
            self.observed += _lines(errors, " to the standard error stream")
        self.observed += self._acts

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _NETWORK:
            self._acts[f"reaches for the network ({event})"] = None
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._file(arguments[0], "writes")
        elif event in _FILES and arguments:
            self._file(arguments[0], f"does {event} to")
        elif event in _PROGRAMS and self._is_own():
            self._acts[f"starts another process ({event})"] = None

    def _file(self, path: Any, what: str) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file that is open already
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self._caches) and self._is_own():
            self._acts[f"{what} the file {os.fsdecode(path)}"] = None

    def _is_own(self) -> bool:
        """Return whether the kernel's own code is what runs, and not that of a module which it imports."""
        frame = sys._getframe(2) if self._own is not None else None
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(str(self._own)):
                return True
            if name.startswith("<frozen importlib"):
                return False
            frame = frame.f_back
        return False


def _ignore(*_: object, **__: object) -> None:
    """Show no warning."""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _caches() -> tuple[str, ...]:
    """Directories where writing changes nothing that anybody would miss."""
    home = os.path.expanduser("~")
    named = [os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME")]
    usual = [os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"), os.path.join(home, ".triton")]
    return (os.devnull, *(os.path.join(os.path.abspath(path), "") for path in (*named, *usual) if path))


def _lines(output: bytes, where: str) -> list[str]:
    lines = [line for line in output.decode("utf-8", "replace").strip().splitlines() if line.strip()]
    return [f"prints {line!r}{where}" for line in dict.fromkeys(lines[:_LINES])]
