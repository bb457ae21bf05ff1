"""The processes that fetch and use what was published, run as a script by ``verify``.

They have an empty cache, the Hub's client, the loader, torch, and of the publisher's settings the Hub's address and
what ``child`` lets through. The one that fetches has the token too; the one that runs the kernel's code has not.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _fetch(repo_id: str, version: int, commits: Sequence[str]) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    folders = [snapshot_download(repo_id, repo_type="kernel", revision=commit) for commit in commits]
    public = True
    try:
        stranger = HfApi(token=False)
        stranger.list_repo_refs(repo_id, repo_type="kernel")
        # What is gated shows its branches to everybody, and its files to few.
        with tempfile.TemporaryDirectory() as elsewhere:
            file = next(path for path in sorted(Path(folders[0]).rglob("metadata.json")))
            stranger.hf_hub_download(
                repo_id,
                file.relative_to(folders[0]).as_posix(),
                repo_type="kernel",
                revision=commits[0],
                local_dir=elsewhere,
            )
    except StopIteration:
        return {"faults": [f"{commits[0][:12]} holds no variant"]}
    except Exception:  # noqa: BLE001 - whatever keeps a stranger out, the kernel is in the cache
        public = False
        # Leaves the name of the version in the cache, where the loader looks for it.
        snapshot_download(repo_id, repo_type="kernel", revision=f"v{version}")
    return {"faults": [], "folders": folders, "public": public}


def _look(repo_id: str, version: int, folders: Sequence[str]) -> dict[str, Any]:
    faults: list[str] = []
    found: dict[str, Any] = {"faults": faults, "loaded": [], "skipped": [], "called": None, "signed": []}
    for folder in map(Path, folders):
        # The cache names a folder by its commit.
        commit = folder.name[:12]
        variants = sorted(path for path in (folder / "build").glob("*") if path.is_dir())
        if not variants:
            faults.append(f"{commit} holds no variant")
        for variant in variants:
            faults += [f"{variant.name} at {commit}: {fault}" for fault in _digest_faults(variant)]
    if not faults:
        _load_all(repo_id, version, Path(folders[0]), found)
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


def _main(part: str, report: str, repo_id: str, version: str, *arguments: str) -> None:
    work = _fetch if part == "fetch" else _look
    Path(report).write_text(json.dumps(work(repo_id, int(version), arguments)), "utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
