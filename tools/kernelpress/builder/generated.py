"""The files of a variant that the build writes itself: the module of its operators, and its metadata."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kernelpress.source.git import GitState
from kernelpress.spec.model import BackendSpec, KernelDependency, Spec

OPS_TEMPLATE = '''"""The operators of this build, under a namespace that no other build has."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of one of this build's operators."""
    return f"{namespace}::{{op_name}}"
'''


def ops_module(namespace: str) -> bytes:
    """The source of a variant's ``_ops.py``."""
    return OPS_TEMPLATE.format(namespace=namespace).encode("ascii")


def metadata(
    namespace: str,
    files: Mapping[str, bytes],
    spec: Spec,
    backend: BackendSpec,
    python_depends: tuple[str, ...],
    git: GitState | None,
) -> bytes:
    """A variant's ``metadata.json``, in the form that the ``kernels`` loader reads.

    Args:
        namespace: The variant's id, which is also its operators' namespace.
        files: All other files of the variant by path; the digest is over these.
        spec: The kernel.
        backend: The backend that the variant is for.
        python_depends: Packages that this variant needs, beyond those of every variant.
        git: The state of the sources' repository, for provenance.
    """
    digests = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in files.items()}
    fields: dict[str, Any] = {
        "name": spec.name,
        "id": namespace,
        "version": spec.version,
        "license": spec.license,
        "python-depends": sorted({*spec.python_depends, *python_depends}),
        "backend": {"type": backend.name} | ({"archs": list(backend.archs)} if backend.archs else {}),
        "digest": {"algorithm": "sha256", "files": digests},
        "provenance": {"kernel-builder": {"version": f"kernelpress-{own_version()}"}},
    }
    if git is not None:
        fields["provenance"]["kernel"] = {"commit": git.commit, "dirty": git.dirty}
    if backend.kernel_depends:
        fields["kernel-depends"] = [kernel_dependency(dependency) for dependency in backend.kernel_depends]
    for key, value in (("upstream", spec.upstream), ("source", spec.source)):
        if value is not None:
            fields[key] = value
    return to_json(fields)


def without_provenance(metadata: bytes) -> bytes:
    """The metadata of a variant less the fields that depend on the commit alone, for comparison.

    Raises:
        ValueError: This is no JSON object.
    """
    fields = json.loads(metadata)
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return to_json({key: value for key, value in fields.items() if key != "provenance"})


def kernel_dependency(dependency: KernelDependency) -> dict[str, str | int]:
    """A dependency on another kernel as ``metadata.json`` has it."""
    if dependency.version is not None:
        return {"repo-id": dependency.repo_id, "version": dependency.version}
    return {"repo-id": dependency.repo_id, "revision": dependency.revision or ""}


def to_json(fields: dict[str, Any]) -> bytes:
    """JSON that is the same bytes for the same fields."""
    return json.dumps(fields, indent=2, sort_keys=True).encode("ascii") + b"\n"


def own_version() -> str:
    """The version of kernelpress."""
    try:
        return version("kernelpress")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
