"""Hashes that name a build by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from kernelpress.builder.generated import OPS_TEMPLATE, kernel_dependency, to_json, without_provenance
from kernelpress.builder.model import Variant
from kernelpress.conventions import METADATA
from kernelpress.rewrite.rewrite import Rewritten
from kernelpress.spec.model import Spec


def content_hash(spec: Spec, rewritten: Rewritten) -> str:
    """Ten hexadecimal digits over all that ships, in which the op namespace is still open; the commit is no part."""
    described = {
        "name": spec.name,
        "version": spec.version,
        "license": spec.license,
        "python-depends": spec.python_depends,
        "backends": [
            [
                backend.name,
                backend.python_depends,
                [kernel_dependency(dependency) for dependency in backend.kernel_depends],
                backend.archs,
            ]
            for backend in spec.backends
        ],
        "upstream": spec.upstream,
        "source": spec.source,
        "universal": spec.has_universal,
        "ops-module": OPS_TEMPLATE,
    }
    parts = [to_json(described)]
    for file in rewritten.files:
        parts += [file.path.encode(), str(len(file.chunks)).encode(), *file.chunks]
    return _hash(parts)[:10]


def tree_hash(variants: Iterable[Variant]) -> str:
    """The SHA-256 of every byte of every variant, except provenance."""
    parts = []
    for variant in sorted(variants, key=lambda variant: variant.name):
        for file in variant.files:
            data = without_provenance(file.data) if file.path == METADATA else file.data
            parts += [variant.name.encode(), file.path.encode(), data]
    return _hash(parts)


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # With its length before each part, no two lists of parts read the same.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
