"""Side effects of importing a kernel: settings, patches, output, files, the network.

Runs in processes that have torch and the standard library alone, each of which loads one kernel.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
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

    ``places`` has the files and lines of those that are known: of acts, such as writing a file, always; of all others,
    such as a setting that has changed, if ``locate`` asks for it. Then the state is compared after each statement of
    the kernel's modules, which takes some 5 ms.

    Standard error must go to ``stderr`` in the working directory, and standard output is kept in ``stdout`` there.

    Args:
        own: What the paths of the kernel's files begin with. Files written and programs started count where one of
            these caused it, and not where a module did that it imports. Without it, neither is looked at.
        locate: Find the place of everything.
    """

    def __init__(self, own: str | None, *, locate: bool = False) -> None:
        self.observed: list[str] = []
        self.places: dict[str, tuple[str, int]] = {}
        self._own = own
        self._locate = locate
        self._acts: dict[str, None] = {}
        self._on = False
        self._folder = Path.cwd()
        self._caches = _caches()
        # The statement that each of the kernel's modules is at whose import is under way.
        self._statements: list[tuple[str, int] | None] = []

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
        if self._locate:
            sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        if self._locate:
            sys.settrace(None)
        self._on = False
        self.observed = [*self._changes(), *self._acts]
        os.dup2(self._stdout, 1)
        os.close(self._stdout)
        warnings.showwarning = self._showwarning

    def _changes(self) -> Iterable[str]:
        """List what is not as it was before, and what has been printed."""
        _flush()
        if warnings.showwarning is not _ignore:
            yield "replaces warnings.showwarning"
        yield from differences(self._before, global_state())
        yield from _lines((self._folder / "stdout").read_bytes(), "")
        with contextlib.suppress(OSError):
            errors = (self._folder / "stderr").read_bytes()[self._printed :]
            yield from _lines(errors, " to the standard error stream")

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        """Follow the statements of the kernel's modules, and ascribe to each what has changed in it."""
        if frame.f_code.co_name != "<module>" or not frame.f_code.co_filename.startswith(str(self._own)):
            return None
        if event == "call":
            self._statements.append(None)
            return self._trace
        statement = self._statements[-1]
        if statement is not None:
            for change in self._changes():
                self.places.setdefault(change, statement)
        if event == "line":
            self._statements[-1] = (frame.f_code.co_filename, frame.f_lineno)
        elif event == "return":
            self._statements.pop()
        return self._trace

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _NETWORK:
            self._act(f"reaches for the network ({event})", self._own_line())
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._file(arguments[0], "writes")
        elif event in _FILES and arguments:
            self._file(arguments[0], f"does {event} to")
        elif event in _PROGRAMS and (line := self._own_line()):
            self._act(f"starts another process ({event})", line)

    def _file(self, path: Any, action: str) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file that is open already
        # The directory of a cache is itself one that may be made.
        name = os.path.join(os.path.abspath(os.fsdecode(path)), "")
        if not name.startswith(self._caches) and (line := self._own_line()):
            self._act(f"{action} the file {os.fsdecode(path)}", line)

    def _act(self, act: str, line: tuple[str, int] | None) -> None:
        self._acts[act] = None
        if line is not None:
            self.places.setdefault(act, line)

    def _own_line(self) -> tuple[str, int] | None:
        """The file and line of the kernel's own code that is running; ``None`` while a module runs that it imports."""
        frame = sys._getframe(2) if self._own is not None else None
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(str(self._own)):
                return name, frame.f_lineno
            if name.startswith("<frozen importlib"):
                return None
            frame = frame.f_back
        return None


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
    # PyTorch's own, made where torch.compile decorates a function; the user's name is at the end of it.
    inductor = os.path.join(os.path.abspath(tempfile.gettempdir()), "torchinductor_")
    directories = (os.path.join(os.path.abspath(path), "") for path in (*named, *usual) if path)
    return (os.devnull, inductor, *directories)


def _lines(output: bytes, where: str) -> list[str]:
    lines = [line for line in output.decode("utf-8", "replace").strip().splitlines() if line.strip()]
    return [f"prints {line!r}{where}" for line in dict.fromkeys(lines[:_LINES])]
