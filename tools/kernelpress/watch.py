"""Watches what importing a kernel does to its surroundings: settings, patches, output, files, the network.

Runs in processes that have torch and the standard library alone, each of which loads one kernel.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from .surroundings import differences, surroundings

_NETWORK = ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
_FILES = tuple(
    f"os.{name}"
    for name in (
        "chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate", "utime",
    )
)  # fmt: skip
_PROGRAMS = (
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "subprocess.Popen",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
# Lines of output that are told.
_LINES = 20


class Watch:
    """Collects in ``effects`` what happens within its block.

    Standard error must go to ``said`` in the working directory, and standard output is kept in ``printed`` there.

    Args:
        own: What the paths of the kernel's files begin with. Files written and programs started count where one of
            these asked for it, and not where a module did that it imports. Without it, neither is looked at.
    """

    def __init__(self, own: str | None) -> None:
        self.effects: list[str] = []
        self._own = own
        self._acts: dict[str, None] = {}
        self._on = False
        self._folder = Path.cwd()
        self._caches = _caches()

    def __enter__(self) -> Watch:
        self._before = surroundings()
        # Whom a warning bothers can turn it off; it is not output.
        self._showwarning = warnings.showwarning
        warnings.showwarning = _hide
        _flush()
        self._said = os.fstat(2).st_size
        self._stdout = os.dup(1)
        with (self._folder / "printed").open("wb") as printed:
            os.dup2(printed.fileno(), 1)
        sys.addaudithook(self._hear)
        self._on = True
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        _flush()
        os.dup2(self._stdout, 1)
        os.close(self._stdout)
        if warnings.showwarning is not _hide:
            self.effects.append("replaces warnings.showwarning")
        warnings.showwarning = self._showwarning
        self.effects += differences(self._before, surroundings())
        self.effects += _lines((self._folder / "printed").read_bytes(), "")
        with contextlib.suppress(OSError):
            self.effects += _lines(
                (self._folder / "said").read_bytes()[self._said :], " to the standard error stream"
            )
        self.effects += self._acts

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _NETWORK:
            self._acts[f"reaches for the network ({event})"] = None
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._touched(arguments[0], "writes")
        elif event in _FILES and arguments:
            self._touched(arguments[0], f"does {event} to")
        elif event in _PROGRAMS and self._asked():
            self._acts[f"starts another process ({event})"] = None

    def _touched(self, path: Any, what: str) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file that is open already
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self._caches) and self._asked():
            self._acts[f"{what} the file {os.fsdecode(path)}"] = None

    def _asked(self) -> bool:
        """Whether the kernel's own code is what runs: not that of a module which it imports."""
        frame = sys._getframe(2) if self._own is not None else None
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(str(self._own)):
                return True
            if name.startswith("<frozen importlib"):
                return False
            frame = frame.f_back
        return False


def _hide(*_: object, **__: object) -> None:
    """Shows no warning."""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _caches() -> tuple[str, ...]:
    """Where writing changes nothing that anybody would miss."""
    home = os.path.expanduser("~")
    named = [os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME")]
    usual = [os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"), os.path.join(home, ".triton")]
    return (os.devnull, *(os.path.join(os.path.abspath(each), "") for each in (*named, *usual) if each))


def _lines(output: bytes, where: str) -> list[str]:
    lines = [line for line in output.decode("utf-8", "replace").strip().splitlines() if line.strip()]
    return [f"prints {line!r}{where}" for line in dict.fromkeys(lines[:_LINES])]
