"""A build examined beside the sources it was made of: whether it is of them, and where in them its faults are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernelpress.check import check
from kernelpress.errors import SourceError
from kernelpress.findings import Finding
from kernelpress.spec import Spec
from kernelpress.variant import METADATA, VARIANT_PREFIX, Build, prepare

_OURS = "kernelpress-"


def check_built(spec: Spec, build_dir: Path) -> list[Finding]:
    """Examine every variant of a build by every rule, and compare it with what the sources would give now.

    Raises:
        CheckError: There is no build here.
    """
    found = check(build_dir)
    try:
        made = prepare(spec)
    except SourceError:
        # No build can be of such sources; what is wrong with them is found elsewhere.
        return found
    stale = other_sources(made, build_dir)
    # Lines of a build of other sources say nothing of these.
    return [*stale, *found] if stale else at_sources(found, made, build_dir)


def other_sources(made: Build, build_dir: Path) -> list[Finding]:
    """What of a build is not what its sources would give now.

    Builds of other tools, and variants whose metadata cannot be read, are left to other rules.
    """
    held = {
        path.name: metadata["id"]
        for path in sorted(build_dir.glob(f"{VARIANT_PREFIX}*"))
        if (metadata := _metadata(path)) is not None
    }
    if not held:
        return []
    wanted = {each.name: each.id for each in made.variants}
    other = sorted(name for name, id in held.items() if wanted.get(name) != id)
    lost = sorted(name for name in wanted if not (build_dir / name).is_dir())
    said = [f"{', '.join(other)} of other sources than these, or by another kernelpress"] * bool(other)
    said += [f"{', '.join(lost)} not at all"] * bool(lost)
    fix = "run `kernelpress build` again, then check"
    return [Finding("KP108", "error", build_dir, None, f"built {' and '.join(said)}", fix)] * bool(said)


def at_sources(found: Iterable[Finding], made: Build, build_dir: Path) -> list[Finding]:
    """Findings in a build, each at the file that its author edits, and what variants share once; no line moves.

    What is found of a whole variant, or in a file that the build makes itself, stays there.
    """
    origins = {file.path: file.origin for file in made.source.files}
    moved = []
    for each in found:
        path = each.path.absolute()
        for top in (build_dir.absolute(), build_dir.resolve()):
            if path.is_relative_to(top):
                inside = Path(*path.relative_to(top).parts[1:]).as_posix()
                origin = origins.get(inside) or origins.get(inside.removeprefix(f"{made.spec.python_name}/"))
                each = each if origin is None else replace(each, path=origin)
                break
        moved.append(each)
    return list(dict.fromkeys(moved))


def _metadata(variant: Path) -> dict[str, Any] | None:
    """What a build of kernelpress says of itself."""
    try:
        fields = json.loads((variant / METADATA).read_text("utf-8"))
        builder = fields["provenance"]["kernel-builder"]["version"]
        ours = isinstance(fields["id"], str) and str(builder).startswith(_OURS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fields if ours else None
