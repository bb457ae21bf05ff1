"""Last step: fetch what was published as a stranger would, and use it; ``stranger`` is the other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from kernelpress.child import child_environment
from kernelpress.hubs import token_of

_TIMEOUT = 600.0


@dataclass(frozen=True)
class Seen:
    """What the stranger found.

    ``faults`` is empty if all is well. ``loaded`` are the variants that this machine could load, ``skipped``
    those for other hardware. ``called`` names an operator that ran on made-up tensors, and says so if they were fake
    ones; it is ``None`` where no arguments that were tried fitted any, which says nothing about the operators.
    """

    faults: tuple[str, ...]
    loaded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    called: str | None = None
    signed: tuple[str, ...] = ()
    seconds: float = 0.0


def verify(api: HfApi, repo_id: str, commits: Sequence[str], version: int) -> Seen:
    """Download revisions into an empty cache, check every digest, load what can be loaded, call an operator.

    Two processes do it: one that has the token, and downloads; and one without, which runs the kernel's code. The
    second reaches the Hub as any stranger does, or, where a stranger may not see the kernel, finds it in the cache.

    Args:
        api: The Hub.
        repo_id: The kernel.
        commits: Revisions whose files are checked; the variants of the first are loaded.
        version: The version that is asked of the loader.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kernelpress-verify-") as scratch:
        environment = child_environment(os.environ, network=True)
        environment |= {
            "HF_ENDPOINT": api.endpoint,
            "HF_HOME": scratch,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        token = token_of(api)
        having = {} if token is None else {"HF_TOKEN": token}
        fetched = _stranger("fetch", environment | having, scratch, repo_id, version, commits)
        if isinstance(fetched, str) or fetched["faults"]:
            return Seen((fetched,) if isinstance(fetched, str) else tuple(fetched["faults"]))
        offline = {} if fetched["public"] else {"HF_HUB_OFFLINE": "1"}
        loaded = _stranger("load", environment | offline, scratch, repo_id, version, fetched["folders"])
    if isinstance(loaded, str):
        return Seen((loaded,))
    return Seen(
        faults=tuple(loaded["faults"]),
        loaded=tuple(loaded["loaded"]),
        skipped=tuple(loaded["skipped"]),
        called=loaded["called"],
        signed=tuple(loaded["signed"]),
        seconds=round(time.monotonic() - start, 2),
    )


def _stranger(
    part: str,
    environment: dict[str, str],
    scratch: str,
    repo_id: str,
    version: int,
    arguments: Sequence[str],
) -> dict[str, Any] | str:
    """What a part of the stranger's work found, or why it found nothing."""
    report = Path(scratch, f"{part}.json")
    script = str(Path(__file__).with_name("stranger.py"))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", script, part, str(report), repo_id, str(version), *arguments],
            cwd=scratch, env=environment, capture_output=True, timeout=_TIMEOUT, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"fetching or loading took longer than {_TIMEOUT:.0f} s"
    if not report.is_file():
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return f"the consumer's process ended with status {done.returncode}: {(said or ['?'])[-1]}"
    answer: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return answer
