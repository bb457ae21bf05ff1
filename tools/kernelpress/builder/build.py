"""Builds a kernel: a tree for each backend, and one for all where the sources run anywhere; whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kernelpress.builder.digest import content_hash, tree_hash
from kernelpress.builder.generated import metadata, ops_module
from kernelpress.builder.model import Build, Variant, VariantFile
from kernelpress.builder.write import replace
from kernelpress.conventions import METADATA, OPS_MODULE, UNIVERSAL, VARIANT_PREFIX
from kernelpress.errors import BuildError
from kernelpress.lint.sources import lint
from kernelpress.rewrite.rewrite import Rewritten, rewrite
from kernelpress.source.git import GitState
from kernelpress.source.read import Source, read_source
from kernelpress.spec.model import BackendSpec, Spec
from kernelpress.syntax.source_file import garbage_collection_paused


def build(spec: Spec, out: Path | None = None) -> Build:
    """Build all variants of a kernel and put them in place of the previous build.

    Args:
        spec: The kernel.
        out: Directory to write; ``build`` beside ``build.toml`` by default. Whatever else stands there stays.

    Raises:
        SourceError: The sources cannot ship as they are.
        BuildError: The directory cannot be written. The previous build is still whole then.
    """
    kernel = prepare(spec, out)
    try:
        replace(kernel.directory, kernel.variants)
    except OSError as error:
        raise BuildError(
            f"the build cannot be written: {error.strerror}", path=error.filename or kernel.directory
        ) from error
    return kernel


# Trees of all sources are held until the end: a collection would walk through them, again and again.
@garbage_collection_paused()
def prepare(spec: Spec, out: Path | None = None) -> Build:
    """Build all variants of a kernel in memory; nothing is written.

    The sources are read once: what the rules on sources find in ``findings``, they find in the bytes that the
    variants are made of.

    Raises:
        SourceError: The sources cannot be read.
        FindingsError: They cannot be rewritten; it holds all findings in them.
    """
    directory = (spec.root / "build" if out is None else out).resolve()
    source = read_source(spec)
    rewritten = rewrite(source.files, source.module_map, source.package_dir)
    findings = sorted(
        (*rewritten.findings, *lint(source, rewritten, spec)),
        key=lambda finding: (str(finding.path), finding.line or 0, finding.code),
    )
    rewritten.raise_errors(findings)
    digest = content_hash(spec, rewritten)
    variants = tuple(_variants(spec, source, rewritten, digest))
    return Build(
        spec=spec,
        source=source,
        directory=directory,
        variants=variants,
        content_hash=digest,
        tree_hash=tree_hash(variants),
        findings=tuple(findings),
        outside=rewritten.outside,
    )


def _variants(spec: Spec, source: Source, rewritten: Rewritten, digest: str) -> Iterator[Variant]:
    for backend in spec.backends:
        # The loader looks for CANN kernels under the name of the device.
        name = VARIANT_PREFIX + ("npu" if backend.name == "cann" else backend.name)
        namespace = f"_{spec.python_name}_{backend.name}_{digest}"
        files = _package(rewritten, namespace)
        yield _variant(name, namespace, files, spec, backend, backend.python_depends, source.git)
    if not spec.has_universal:
        return
    # The loader's parser knows no backend of this name, though it loads such a variant everywhere.
    stand_in = next((backend for backend in spec.backends if backend.name == "cpu"), spec.backends[0])
    # Packages and kernels that one backend of several needs must not keep the others from loading it.
    python_depends = stand_in.python_depends if len(spec.backends) == 1 else ()
    kernel_depends = tuple(
        dependency
        for dependency in stand_in.kernel_depends
        if all(dependency in backend.kernel_depends for backend in spec.backends)
    )
    stand_in = BackendSpec(stand_in.name, (), kernel_depends, None)
    namespace = f"_{spec.python_name}_{UNIVERSAL}_{digest}"
    # Nested, because that is the only form that older loaders find, and they read this variant alone.
    files = {f"{spec.python_name}/{path}": data for path, data in _package(rewritten, namespace).items()}
    yield _variant(VARIANT_PREFIX + UNIVERSAL, namespace, files, spec, stand_in, python_depends, source.git)


def _package(rewritten: Rewritten, namespace: str) -> dict[str, bytes]:
    files = {file.path: file.render(namespace) for file in rewritten.files}
    return files | {OPS_MODULE: ops_module(namespace)}


def _variant(
    name: str,
    namespace: str,
    files: dict[str, bytes],
    spec: Spec,
    backend: BackendSpec,
    python_depends: tuple[str, ...],
    git: GitState | None,
) -> Variant:
    files = files | {METADATA: metadata(namespace, files, spec, backend, python_depends, git)}
    return Variant(name, namespace, tuple(VariantFile(path, files[path]) for path in sorted(files)))
