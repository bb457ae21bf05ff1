"""Variants in a directory beside a build of today's sources: those that differ, and their faults' places in sources."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernelpress.builder.model import Build
from kernelpress.conventions import METADATA, VARIANT_PREFIX
from kernelpress.findings.model import Finding

_OURS = "kernelpress-"


def differing_variants(kernel: Build, directory: Path) -> list[Finding]:
    """Variants in a directory that are not those of a build (KP108).

    Builds of other tools, and variants whose metadata cannot be read, are left to other rules.
    """
    ids = {
        path.name: metadata["id"]
        for path in sorted(directory.glob(f"{VARIANT_PREFIX}*"))
        if (metadata := _metadata(path)) is not None
    }
    if not ids:
        return []
    expected = {variant.name: variant.id for variant in kernel.variants}
    other = sorted(name for name, id in ids.items() if expected.get(name) != id)
    missing = sorted(name for name in expected if not (directory / name).is_dir())
    reasons = [f"{', '.join(other)} of other sources than these, or by another kernelpress"] * bool(other)
    reasons += [f"{', '.join(missing)} not at all"] * bool(missing)
    fix = "run `kernelpress build` again, then check"
    return [Finding("KP108", "error", directory, None, f"built {' and '.join(reasons)}", fix)] * bool(reasons)


def place_in_sources(findings: Iterable[Finding], kernel: Build, directory: Path) -> list[Finding]:
    """Findings in variants, each at the file that its author edits, and those that variants share once; no line moves.

    A finding about a whole variant, or in a file that the build makes itself, stays there.
    """
    origins = {file.path: file.origin for file in kernel.source.files}
    placed = []
    for finding in findings:
        path = finding.path.absolute()
        for top in (directory.absolute(), directory.resolve()):
            if path.is_relative_to(top):
                inside = Path(*path.relative_to(top).parts[1:]).as_posix()
                origin = origins.get(inside) or origins.get(
                    inside.removeprefix(f"{kernel.spec.python_name}/")
                )
                finding = finding if origin is None else replace(finding, path=origin)
                break
        placed.append(finding)
    return list(dict.fromkeys(placed))


def _metadata(variant: Path) -> dict[str, Any] | None:
    """The metadata of a variant that kernelpress built; ``None`` for any other."""
    try:
        fields = json.loads((variant / METADATA).read_text("utf-8"))
        builder = fields["provenance"]["kernel-builder"]["version"]
        ours = isinstance(fields["id"], str) and str(builder).startswith(_OURS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fields if ours else None
