"""The processes that fetch and use what was published as a consumer would, started by ``verify``.

They have an empty cache, the Hub's client, the loader, torch, and of the publisher's settings the Hub's address and
what ``child_environment`` lets through. The one that fetches has the token too; the one that runs the
kernel's code has not.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..probe import op_calls
from ..probe.collector import imports_kept


def main(part: str, report: str, repo_id: str, version: str, *arguments: str) -> None:
    """Fetch commits (``arguments``), or load the kernel from the folders (``arguments``) that hold them."""
    work = _fetch if part == "fetch" else _load
    Path(report).write_text(json.dumps(work(repo_id, int(version), arguments)), "utf-8")


def _fetch(repo_id: str, version: int, commits: Sequence[str]) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    folders = [snapshot_download(repo_id, repo_type="kernel", revision=commit) for commit in commits]
    metadata = next(Path(folders[0]).rglob("metadata.json"), None)
    if metadata is None:
        return {"faults": [f"{commits[0][:12]} holds no variant"]}
    public = True
    try:
        anybody = HfApi(token=False)
        anybody.list_repo_refs(repo_id, repo_type="kernel")
        # What is gated shows its branches to everybody, and its files to few.
        path = metadata.relative_to(folders[0]).as_posix()
        with tempfile.TemporaryDirectory() as scratch:
            anybody.hf_hub_download(repo_id, path, repo_type="kernel", revision=commits[0], local_dir=scratch)
    except Exception:  # noqa: BLE001 - whatever keeps others out, the kernel is in the cache
        public = False
        # Leaves the name of the version in the cache, where the loader looks for it.
        snapshot_download(repo_id, repo_type="kernel", revision=f"v{version}")
    return {"faults": [], "folders": folders, "public": public}


def _load(repo_id: str, version: int, folders: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"faults": [], "loaded": [], "skipped": [], "called": None, "signed": []}
    for folder in map(Path, folders):
        # The cache names a folder by its commit.
        commit = folder.name[:12]
        variants = sorted(path for path in (folder / "build").glob("*") if path.is_dir())
        if not variants:
            result["faults"].append(f"{commit} holds no variant")
        for variant in variants:
            faults = _digest_faults(variant)
            result["faults"] += [f"{variant.name} at {commit}: {fault}" for fault in faults]
    if not result["faults"]:
        _load_all(repo_id, version, Path(folders[0]), result)
    return result


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


def _load_all(repo_id: str, version: int, folder: Path, result: dict[str, Any]) -> None:
    with imports_kept():
        import torch
        from kernels import get_kernel, get_local_kernel  # type: ignore[import-untyped]

    usable = {"cpu"}
    if torch.cuda.is_available():
        usable.add("rocm" if torch.version.hip else "cuda")
    if torch.xpu.is_available():
        usable.add("xpu")
    variants = {
        path: json.loads((path / "metadata.json").read_text("utf-8"))
        for path in sorted((folder / "build").iterdir())
    }
    result["signed"] = [path.name for path in variants if (path / "metadata.json.sigstore").is_file()]
    backends = {metadata["backend"]["type"] for metadata in variants.values()}
    if not backends & usable and not (folder / "build" / "torch-universal").is_dir():
        # The loader refuses this machine, rightly.
        result["skipped"] = [path.name for path in variants]
        return
    try:
        # The publisher's own code: nobody has to be asked whether to trust it.
        chosen = get_kernel(repo_id, version=version, trust_remote_code=True)
    except Exception as error:  # noqa: BLE001 - whatever the kernel's code raises is the answer
        result["faults"].append(f"get_kernel fails: {type(error).__name__}: {error}")
        return
    loaded = {chosen.__name__.partition(".")[0]}
    for variant, metadata in variants.items():
        if metadata["backend"]["type"] not in usable:
            result["skipped"].append(variant.name)
            continue
        try:
            if metadata["id"] not in loaded:
                get_local_kernel(variant)
        except Exception as error:  # noqa: BLE001 - as above
            result["faults"].append(f"{variant.name} does not load: {type(error).__name__}: {error}")
            continue
        loaded.add(metadata["id"])
        result["loaded"].append(variant.name)
        result["called"] = result["called"] or _call_any(metadata["id"], variant)


def _call_any(namespace: str, variant: Path) -> str | None:
    """Name of an operator that took sample inputs: in earnest, or else as fake tensors."""
    fake, operators = None, op_calls.operators(namespace)
    if operators:
        with imports_kept():
            op_calls.prepare()
    for name, operator in operators.items():
        call = op_calls.examine(operator, f"{variant}{os.sep}", [])
        if call["real"] == "ran":
            return f"{namespace}::{name}"
        if call["fake"] == "ran":
            fake = fake or f"{namespace}::{name} (on fake tensors)"
    return fake
