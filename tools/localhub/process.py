"""A Hub in a process of its own, for as long as a ``with`` block lasts."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import HubError

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_READY = re.compile(rb"^kernelpress Hub at (http://\S+)  \(", re.MULTILINE)


@dataclass(frozen=True)
class RunningHub:
    """A Hub that answers.

    Args:
        endpoint: Its address, for ``HF_ENDPOINT`` or ``HfApi(endpoint=...)``.
        root: Its directory.
        log: The file with all that it printed.
        pid: Its process.
    """

    endpoint: str
    root: Path
    log: Path
    pid: int


@contextmanager
def running_hub(root: Path, *, trust: Sequence[str] = (), port: int = 0) -> Iterator[RunningHub]:
    """Start a Hub on 127.0.0.1 in a separate process and stop it at the end of the block.

    It takes writes without a token as long as none was created.

    Args:
        root: The Hub's directory, created when missing.
        trust: Organizations that are trusted kernel publishers.
        port: Port to listen on; 0 takes a free one.

    Raises:
        HubError: The Hub did not start; the message ends with its output.
    """
    package = __name__.rpartition(".")[0]
    command = [sys.executable, "-m", package, "--open", f"--root={root}", f"--port={port}"]
    command += [f"--trust={organization}" for organization in trust]
    log = root / "hub.log"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Appending keeps the log of a Hub that is already running here; this one will refuse to start.
        with open(log, "ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
    except OSError as error:
        raise HubError(f"cannot use it as the Hub's root: {error.strerror}", path=root) from error
    try:
        yield RunningHub(_wait_until_ready(process, log, start), root, log, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, start: int) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        ended = process.poll() is not None
        with open(log, "rb") as file:
            file.seek(start)
            printed = file.read()
        match = _READY.search(printed)
        if match is not None and not ended:
            return match.group(1).decode("ascii")
        if ended or time.monotonic() > deadline:
            tail = printed.decode("utf-8", "replace")[-2000:].strip() or "(it printed nothing)"
            reason = f"ended with exit code {process.returncode}" if ended else "did not answer in time"
            raise HubError(f"the embedded Hub {reason}. It printed:\n{tail}")
        time.sleep(0.02)
