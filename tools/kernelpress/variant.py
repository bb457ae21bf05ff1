"""Fourth step: one tree for each backend and one for all of them, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from kernelpress.errors import BuildError
from kernelpress.imports import Import
from kernelpress.memory import Memory
from kernelpress.provenance import GitState
from kernelpress.rewrite import Rewritten, rewrite
from kernelpress.source import OPS_MODULE, Source, read_source
from kernelpress.spec import BackendSpec, KernelDependency, Spec

UNIVERSAL = "universal"
METADATA = "metadata.json"
VARIANT_PREFIX = "torch-"

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
        _replace(made.directory, made.variants)
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
    memory = Memory.of(spec.package_dir)
    source = read_source(spec, memory)
    rewritten = rewrite(source.files, source.layout, source.package_dir, memory)
    memory.save()
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


def _replace(directory: Path, variants: Sequence[Variant]) -> None:
    """Write aside, then swap two names, so that no moment shows half a build."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists() and not directory.is_dir():
        raise BuildError("this is in the way of the build directory; move it", path=directory)
    with _locked(directory.parent):
        _recover(directory)
        if _stands(directory, variants):
            return
        fresh = Path(tempfile.mkdtemp(prefix=f"{directory.name}.tmp-", dir=directory.parent))
        try:
            fresh.chmod(0o755)
            for variant in variants:
                _write(fresh / variant.name, variant.files)
            _keep_foreign(directory, fresh)
            _swap(directory, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _stands(directory: Path, variants: Sequence[Variant]) -> bool:
    """Whether a directory holds just these variants, byte for byte and with the modes that they are written with."""
    expected = {f"{each.name}/{file.path}": file.data for each in variants for file in each.files}
    folders = {str(parent) for name in expected for parent in PurePosixPath(name).parents} - {"."}
    pending = [each.name for each in variants]
    if not directory.is_dir() or {
        path.name for path in directory.iterdir() if path.name.startswith(VARIANT_PREFIX)
    } != set(pending):
        return False
    while pending:
        folder = pending.pop()
        with os.scandir(directory / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}"
                mode = entry.stat(follow_symlinks=False).st_mode
                if mode == stat.S_IFDIR | 0o755 and name in folders:
                    pending.append(name)
                    folders.discard(name)
                elif mode != stat.S_IFREG | 0o644 or Path(entry.path).read_bytes() != expected.pop(
                    name, None
                ):
                    return False
    return not expected


def _write(root: Path, files: Iterable[VariantFile]) -> None:
    # Modes are set and not left to the umask: they are part of what must come out the same everywhere.
    made = set()
    for file in files:
        path = root / file.path
        for folder in [*reversed(path.parent.relative_to(root).parents), path.parent.relative_to(root)]:
            if folder not in made:
                made.add(folder)
                (root / folder).mkdir(exist_ok=True)
                (root / folder).chmod(0o755)
        path.write_bytes(file.data)
        path.chmod(0o644)


def _keep_foreign(directory: Path, fresh: Path) -> None:
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name.startswith(VARIANT_PREFIX) and path.is_dir() and not path.is_symlink():
            continue
        if (fresh / path.name).exists():
            raise BuildError("this is in the way of a variant of that name; move it", path=path)
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def _swap(directory: Path, fresh: Path) -> None:
    old = _old(directory)
    if directory.exists():
        directory.rename(old)
    try:
        fresh.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _recover(directory: Path) -> None:
    """Finish what a build that was killed left behind; the lock says that none is running."""
    old = _old(directory)
    if old.exists():
        if directory.exists():
            shutil.rmtree(old)
        else:
            old.rename(directory)
    for left in directory.parent.glob(f"{directory.name}.tmp-*"):
        shutil.rmtree(left)


def _old(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.old")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one build at a time write into a folder; a lock on the folder itself leaves no file behind."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where builds in one place must take turns by themselves
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
