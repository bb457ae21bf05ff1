"""Last step: fetch what was published as a consumer would, and use it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from kernelpress.hub.client import token_of
from kernelpress.probe.environment import child_environment, run_isolated
from kernelpress.publish import consumer

_TIMEOUT = 600.0


@dataclass(frozen=True)
class Verification:
    """The consumer's report.

    ``faults`` is empty if all is well. ``loaded`` are the variants that this machine could load, ``skipped``
    those for other hardware. ``called`` names an operator that ran on sample inputs, and says so if they were fake
    tensors; it is ``None`` where no arguments that were tried fitted any, which says nothing about the operators.
    """

    faults: tuple[str, ...]
    loaded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    called: str | None = None
    signed: tuple[str, ...] = ()
    seconds: float = 0.0


def verify(api: HfApi, repo_id: str, commits: Sequence[str], version: int) -> Verification:
    """Download revisions into an empty cache, check every digest, load what can be loaded, call an operator.

    Two processes do it: one that has the token, and downloads; and one without, which runs the kernel's code. The
    second reaches the Hub as anybody does, or, where not everybody may see the kernel, finds it in the cache.

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

        def consume(part: str, arguments: Sequence[str], **settings: str) -> dict[str, Any]:
            report = Path(scratch, f"{part}.json")
            result = run_isolated(
                consumer, [part, str(report), repo_id, str(version), *arguments],
                report=report, environment=environment | settings, timeout=_TIMEOUT,
            )  # fmt: skip
            return {"faults": [f"the consumer's process {result}"]} if isinstance(result, str) else result

        token = token_of(api)
        result = consume("fetch", commits, **({} if token is None else {"HF_TOKEN": token}))
        if not result["faults"]:
            offline = {} if result["public"] else {"HF_HUB_OFFLINE": "1"}
            result = consume("load", result["folders"], **offline)
    lists = {name: tuple(result.get(name, ())) for name in ("faults", "loaded", "skipped", "signed")}
    return Verification(**lists, called=result.get("called"), seconds=round(time.monotonic() - start, 2))
