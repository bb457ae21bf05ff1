"""Whether a build is one of the sources beside it: what is found in any other says nothing of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kernelpress.errors import SourceError
from kernelpress.findings import Finding
from kernelpress.spec import Spec
from kernelpress.variant import METADATA, VARIANT_PREFIX, prepare

_OURS = "kernelpress-"


def check_current(spec: Spec, build_dir: Path) -> list[Finding]:
    """Compare a build with what the sources would give now.

    Builds of other tools, and variants whose metadata cannot be read, are left to other rules.
    """
    held = {
        path.name: metadata["id"]
        for path in sorted(build_dir.glob(f"{VARIANT_PREFIX}*"))
        if (metadata := _metadata(path)) is not None
    }
    if not held:
        return []
    try:
        wanted = {each.name: each.id for each in prepare(spec).variants}
    except SourceError:
        # No build can be of such sources; what is wrong with them is found elsewhere.
        return []
    other = sorted(name for name, id in held.items() if wanted.get(name) != id)
    lost = sorted(name for name in wanted if not (build_dir / name).is_dir())
    said = [f"{', '.join(other)} of other sources than these, or by another kernelpress"] * bool(other)
    said += [f"{', '.join(lost)} not at all"] * bool(lost)
    if not said:
        return []
    return [
        Finding(
            "KP108",
            "error",
            build_dir,
            None,
            f"built {' and '.join(said)}",
            "run `kernelpress build` again, then check",
        )
    ]


def _metadata(variant: Path) -> dict[str, Any] | None:
    """What a build of kernelpress says of itself."""
    try:
        fields = json.loads((variant / METADATA).read_text("utf-8"))
        builder = fields["provenance"]["kernel-builder"]["version"]
        ours = isinstance(fields["id"], str) and str(builder).startswith(_OURS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fields if ours else None
