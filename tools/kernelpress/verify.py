"""Last step: fetch what was published as a stranger would, and use it.

Run as a script this is the stranger's process: an empty cache, the Hub's client, the loader, torch, and nothing
of this one's settings but the Hub's address and the token.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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

    Args:
        api: The Hub.
        repo_id: The kernel.
        commits: Revisions whose files are checked; the variants of the first are loaded.
        version: The version that is asked of the loader.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "HF_", "HUGGING", "LOCAL_KERNELS", "KERNELS_"))
    }
    token = api.token
    if token is None:
        from huggingface_hub import get_token

        token = get_token()
    if isinstance(token, str):
        environment["HF_TOKEN"] = token
    with tempfile.TemporaryDirectory(prefix="kernelpress-verify-") as scratch:
        report = Path(scratch, "report.json")
        environment |= {
            "HF_ENDPOINT": api.endpoint,
            "HF_HOME": scratch,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-B", __file__, str(report), repo_id, str(version), *commits],
                cwd=scratch, env=environment, capture_output=True, timeout=_TIMEOUT, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Seen((f"fetching and loading took longer than {_TIMEOUT:.0f} s",))
        if not report.is_file():
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            return Seen(
                (f"the consumer's process ended with status {done.returncode}: {(said or ['?'])[-1]}",)
            )
        answer: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return Seen(
        faults=tuple(answer["faults"]),
        loaded=tuple(answer["loaded"]),
        skipped=tuple(answer["skipped"]),
        called=answer["called"],
        signed=tuple(answer["signed"]),
        seconds=answer["seconds"],
    )


# From here on: the stranger's process.


def _look(repo_id: str, version: int, commits: Sequence[str]) -> dict[str, Any]:
    from huggingface_hub import snapshot_download

    faults: list[str] = []
    found: dict[str, Any] = {"faults": faults, "loaded": [], "skipped": [], "called": None, "signed": []}
    first: Path | None = None
    for commit in commits:
        folder = Path(snapshot_download(repo_id, repo_type="kernel", revision=commit))
        variants = sorted(path for path in (folder / "build").glob("*") if path.is_dir())
        if not variants:
            faults.append(f"{commit[:12]} holds no variant")
        for variant in variants:
            faults += [f"{variant.name} at {commit[:12]}: {fault}" for fault in _digest_faults(variant)]
        first = first or folder
    if not faults and first is not None:
        _load_all(repo_id, version, first, found)
    return found


def _digest_faults(variant: Path) -> list[str]:
    from kernels._rust import Digest, DigestValidationError, Metadata  # type: ignore[import-untyped]

    try:
        metadata = Metadata.read_from_file(variant / "metadata.json")
    except (OSError, ValueError) as error:
        return [f"the loader cannot read the metadata: {error}"]
    if metadata.digest is None:
        return ["the metadata has no digest"]
    try:
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
    except DigestValidationError as error:
        return [str(violation) for violation in error.violations]
    return []


def _load_all(repo_id: str, version: int, folder: Path, found: dict[str, Any]) -> None:
    import torch
    from kernels import get_kernel, get_local_kernel  # type: ignore[import-untyped]
    from kernels._rust import Metadata

    usable = {"cpu"}
    if torch.cuda.is_available():
        usable.add("rocm" if torch.version.hip else "cuda")
    if torch.xpu.is_available():
        usable.add("xpu")
    try:
        # The publisher's own code: nobody has to be asked whether to trust it.
        chosen = get_kernel(repo_id, version=version, trust_remote_code=True)
    except Exception as error:  # noqa: BLE001 - whatever the kernel's code raises is the answer
        found["faults"].append(f"get_kernel fails: {type(error).__name__}: {error}")
        return
    modules = {chosen.__name__.partition(".")[0]: chosen}
    for variant in sorted((folder / "build").iterdir()):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        if (variant / "metadata.json.sigstore").is_file():
            found["signed"].append(variant.name)
        backend = json.loads((variant / "metadata.json").read_text("utf-8"))["backend"]["type"]
        if backend not in usable:
            found["skipped"].append(variant.name)
            continue
        try:
            if metadata.id not in modules:
                modules[metadata.id] = get_local_kernel(variant)
        except Exception as error:  # noqa: BLE001 - as above
            found["faults"].append(f"{variant.name} does not load: {type(error).__name__}: {error}")
            continue
        found["loaded"].append(variant.name)
        found["called"] = found["called"] or _call_any(metadata.id, variant)


def _call_any(namespace: str, variant: Path) -> str | None:
    """Name of an operator that took made-up arguments: in earnest, or else as fake tensors."""
    package = ModuleType("_kernelpress_inside")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[package.__name__] = package
    opcalls = importlib.import_module(f"{package.__name__}.opcalls")
    faked = None
    for name, operator in opcalls.operators(namespace).items():
        found = opcalls.examine(operator, f"{variant}{os.sep}", [])
        if found["real"] == "ran":
            return f"{namespace}::{name}"
        if found["fake"] == "ran":
            faked = faked or f"{namespace}::{name} (on fake tensors)"
    return faked


def _main(report: str, repo_id: str, version: str, *commits: str) -> None:
    import time

    start = time.perf_counter()
    found = _look(repo_id, int(version), commits)
    found["seconds"] = round(time.perf_counter() - start, 2)
    Path(report).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
