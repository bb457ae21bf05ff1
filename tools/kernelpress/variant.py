"""Fourth step: one tree for each backend and one for all of them, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kernelpress.errors import BuildError
from kernelpress.imports import Import
from kernelpress.place import VARIANT_PREFIX, replace
from kernelpress.provenance import GitState
from kernelpress.rewrite import Rewritten, rewrite
from kernelpress.source import OPS_MODULE, Source, read_source
from kernelpress.spec import BackendSpec, KernelDependency, Spec

UNIVERSAL = "universal"
METADATA = "metadata.json"

_OPS_SOURCE = '''"""The operators of this build, under a namespace that no other build has."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of one of this build's operators."""
    return f"{namespace}::{{op_name}}"
'''


@dataclass(frozen=True)
class VariantFile:
    """One file of a variant: its path there (with forward slashes) and its content."""

    path: str
    data: bytes


@dataclass(frozen=True)
class Variant:
    """A directory of ``build/``. ``id`` is both the module's name and the namespace of its operators."""

    name: str
    id: str
    files: tuple[VariantFile, ...]


@dataclass(frozen=True)
class Build:
    """A finished build.

    ``content_hash`` tells builds apart that may be loaded in one process: it covers what ships, but not the
    commit. ``tree_hash`` covers every byte of every variant, except provenance. ``outside`` are the imports of
    other packages, with the files that hold them.
    """

    spec: Spec
    source: Source
    directory: Path
    variants: tuple[Variant, ...]
    content_hash: str
    tree_hash: str
    outside: tuple[tuple[Path, Import], ...] = ()


def build(spec: Spec, out: Path | None = None) -> Build:
    """Build all variants of a kernel and put them in place of the previous build.

    Args:
        spec: What to build.
        out: Directory to write; ``build`` beside ``build.toml`` by default. Whatever else stands there stays.

    Raises:
        SourceError: The sources cannot ship as they are.
        BuildError: The directory cannot be written. The previous build is still whole then.
    """
    made = prepare(spec, out)
    try:
        replace(made.directory, made.variants)
    except OSError as error:
        raise BuildError(
            f"the build cannot be written: {error.strerror}", path=error.filename or made.directory
        ) from error
    return made


def prepare(spec: Spec, out: Path | None = None) -> Build:
    """Make all of a build but write nothing.

    Raises:
        SourceError: The sources cannot ship as they are.
    """
    directory = (spec.root / "build" if out is None else out).resolve()
    source = read_source(spec)
    rewritten = rewrite(source.files, source.layout, source.package_dir)
    content_hash = _content_hash(spec, rewritten)
    variants = tuple(_variants(spec, source, rewritten, content_hash))
    return Build(spec, source, directory, variants, content_hash, _tree_hash(variants), rewritten.outside)


def without_provenance(metadata: bytes) -> bytes:
    """The metadata of a variant less what depends on the commit alone, for comparison.

    Raises:
        ValueError: This is no JSON object.
    """
    fields = json.loads(metadata)
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return _json({key: value for key, value in fields.items() if key != "provenance"})


def _variants(spec: Spec, source: Source, rewritten: Rewritten, content_hash: str) -> Iterator[Variant]:
    for backend in spec.backends:
        # The loader looks for CANN kernels under the name of the device.
        name = VARIANT_PREFIX + ("npu" if backend.name == "cann" else backend.name)
        namespace = f"_{spec.python_name}_{backend.name}_{content_hash}"
        files = _package(rewritten, namespace)
        yield _variant(name, namespace, files, spec, backend, backend.python_depends, source.git)
    # The loader's parser knows no backend of this name, though it loads such a variant everywhere.
    stand_in = next((each for each in spec.backends if each.name == "cpu"), spec.backends[0])
    stand_in = BackendSpec(stand_in.name, (), stand_in.kernel_depends, None)
    namespace = f"_{spec.python_name}_{UNIVERSAL}_{content_hash}"
    # Nested, because that is the only form that older loaders find, and they read this variant alone.
    files = {f"{spec.python_name}/{path}": data for path, data in _package(rewritten, namespace).items()}
    yield _variant(VARIANT_PREFIX + UNIVERSAL, namespace, files, spec, stand_in, (), source.git)


def _package(rewritten: Rewritten, namespace: str) -> dict[str, bytes]:
    files = {file.path: file.render(namespace) for file in rewritten.files}
    files[OPS_MODULE] = _OPS_SOURCE.format(namespace=namespace).encode("ascii")
    return files


def _variant(
    name: str,
    namespace: str,
    files: dict[str, bytes],
    spec: Spec,
    backend: BackendSpec,
    extra_depends: tuple[str, ...],
    git: GitState | None,
) -> Variant:
    metadata = _metadata(namespace, files, spec, backend, extra_depends, git)
    everything = files | {METADATA: _json(metadata)}
    return Variant(name, namespace, tuple(VariantFile(path, everything[path]) for path in sorted(everything)))


def _metadata(
    namespace: str,
    files: Mapping[str, bytes],
    spec: Spec,
    backend: BackendSpec,
    extra_depends: tuple[str, ...],
    git: GitState | None,
) -> dict[str, Any]:
    digests = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in files.items()}
    fields: dict[str, Any] = {
        "name": spec.name,
        "id": namespace,
        "version": spec.version,
        "license": spec.license,
        "python-depends": sorted({*spec.python_depends, *extra_depends}),
        "backend": {"type": backend.name} | ({"archs": list(backend.archs)} if backend.archs else {}),
        "digest": {"algorithm": "sha256", "files": digests},
        "provenance": {"kernel-builder": {"version": f"kernelpress-{own_version()}"}},
    }
    if git is not None:
        fields["provenance"]["kernel"] = {"commit": git.commit, "dirty": git.dirty}
    if backend.kernel_depends:
        fields["kernel-depends"] = [_kernel_dependency(each) for each in backend.kernel_depends]
    for key, value in (("upstream", spec.upstream), ("source", spec.source)):
        if value is not None:
            fields[key] = value
    return fields


def _kernel_dependency(depends: KernelDependency) -> dict[str, str | int]:
    if depends.version is not None:
        return {"repo-id": depends.repo_id, "version": depends.version}
    return {"repo-id": depends.repo_id, "revision": depends.revision or ""}


def own_version() -> str:
    """The version of kernelpress."""
    try:
        return version("kernelpress")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode("ascii") + b"\n"


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # With its length before each part, no two lists of parts read the same.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _content_hash(spec: Spec, rewritten: Rewritten) -> str:
    shipped = {
        "name": spec.name,
        "version": spec.version,
        "license": spec.license,
        "python-depends": spec.python_depends,
        "backends": [
            [
                each.name,
                each.python_depends,
                [_kernel_dependency(on) for on in each.kernel_depends],
                each.archs,
            ]
            for each in spec.backends
        ],
        "upstream": spec.upstream,
        "source": spec.source,
        "ops-module": _OPS_SOURCE,
    }
    parts = [_json(shipped)]
    for file in rewritten.files:
        parts += [file.path.encode(), str(len(file.chunks)).encode(), *file.chunks]
    return _hash(parts)[:10]


def _tree_hash(variants: Iterable[Variant]) -> str:
    parts = []
    for variant in sorted(variants, key=lambda variant: variant.name):
        for file in variant.files:
            data = without_provenance(file.data) if file.path == METADATA else file.data
            parts += [variant.name.encode(), file.path.encode(), data]
    return _hash(parts)
