"""The Kernel Hub's own parser of build.toml, which has the last word on a description."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kernels._rust import Backend, Build, KernelVersion  # type: ignore[import-untyped]

from kernelpress.errors import SpecError
from kernelpress.spec.model import KernelDependency, Spec


def with_kernel_dependencies(spec: Spec, path: Path, folder: Path | None = None) -> Spec:
    """The spec, with the other kernels that it depends on, which the Kernel Hub's parser alone understands.

    Args:
        spec: The description as kernelpress reads it.
        path: The file to name in messages.
        folder: The directory of the build.toml that the parser reads; the spec's root by default.

    Raises:
        SpecError: The parser refuses it.
    """
    try:
        build = Build.open(folder or spec.root)
    except ValueError as error:
        reason = str(error).strip().rpartition("build.toml: ")[2]
        raise SpecError(f"the Kernel Hub's parser refuses this file: {reason}", path=path) from None

    def kernel_depends(backend: str) -> tuple[KernelDependency, ...]:
        return tuple(
            KernelDependency(dependency.repo_id, dependency.version.version, None)
            if isinstance(dependency.version, KernelVersion.Version)
            else KernelDependency(dependency.repo_id, None, dependency.version.revision)
            for dependency in build.all_kernel_depends(Backend.from_str(backend))
        )

    backends = (replace(backend, kernel_depends=kernel_depends(backend.name)) for backend in spec.backends)
    return replace(spec, backends=tuple(backends))
