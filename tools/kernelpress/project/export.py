"""Export of a kernel as a project in upstream's layout, for huggingface/kernels' kernel-builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import tomlkit

from kernelpress.errors import BuildError
from kernelpress.new_directory import new_directory
from kernelpress.project.ops_style import to_ops_style
from kernelpress.rewrite.rewrite import RewrittenFile, rewrite
from kernelpress.source.read import read_source
from kernelpress.spec.model import EDITION, Spec

_PLACEHOLDER = "kernelpress_own_namespace"


def export(spec: Spec, out: Path) -> Path:
    """Write build.toml, flake.nix, CARD.md and ``torch-ext/<package>`` for kernel-builder.

    Operators are named as upstream's convention wants: by a namespace that ``_ops`` gives.

    Args:
        spec: The kernel.
        out: A directory that is not there yet, or empty.

    Raises:
        SourceError: The sources cannot ship as they are.
        BuildError: ``out`` holds something, or cannot be written; nothing is left half-written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError("this is not empty; name a directory that is not there yet", path=out)
    source = read_source(spec)
    rewritten = rewrite(source.files, source.module_map, source.package_dir)
    rewritten.raise_errors()
    with new_directory(out) as fresh:
        package = fresh / "torch-ext" / spec.python_name
        for file in rewritten.files:
            target = package / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_in_ops_style(file))
        (fresh / "build.toml").write_text(_build_toml(spec), "utf-8")
        (fresh / "flake.nix").write_text(_template("flake.nix").render(name=spec.name), "utf-8")
        (fresh / "CARD.md").write_text(_template("upstream-card.md").render(), "utf-8")
    return out


def _in_ops_style(file: RewrittenFile) -> bytes:
    """A file with its own namespace taken from ``_ops`` at every place that the build would fill in."""
    if len(file.chunks) == 1:
        return file.chunks[0]
    return to_ops_style(file.render(_PLACEHOLDER), _PLACEHOLDER, file.path.count("/"))


def _build_toml(spec: Spec) -> str:
    general: dict[str, Any] = {
        "name": spec.name,
        "version": spec.version,
        "edition": EDITION,
        "license": spec.license,
        "backends": [backend.name for backend in spec.backends],
    }
    if spec.python_depends:
        general["python-depends"] = list(spec.python_depends)
    for key, value in (("upstream", spec.upstream), ("source", spec.source)):
        if value is not None:
            general[key] = value
    if spec.repo_id is not None:
        general["hub"] = {"repo-id": spec.repo_id}
    for backend in spec.backends:
        if backend.python_depends:
            general[backend.name] = {"python-depends": list(backend.python_depends)}
    return tomlkit.dumps({"general": general, "torch-noarch": {"pyext": list(spec.pyext)}})


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kernelpress"), keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template(f"export/{name}")
