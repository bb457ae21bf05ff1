"""Older editions of build.toml, as text in today's."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import ParseError, TOMLKitError

from kernelpress.errors import SpecError
from kernelpress.spec.model import BACKENDS, EDITION

# The meaning of `universal = true` to the Hub's kernel-builder, less the backends that need other sources.
_UNIVERSAL = ["cpu", "cuda", "rocm", "xpu"]


def upgrade(before: str, path: Path, license: str | None = None) -> str | None:
    """The text of a build.toml in today's edition; ``None`` if it is in that already.

    Comments and order are kept. What today's edition forbids is not looked for.

    Args:
        before: The file's text.
        path: The file, for messages.
        license: An SPDX identifier, for forms from when there was no key for it.

    Raises:
        SpecError: The file is no build.toml, describes compiled sources, or lacks something that only its author knows.
    """
    try:
        document = tomlkit.parse(before)
    except TOMLKitError as error:
        # A key that is there twice is none of the parser's errors, and has no line.
        line = error.line if isinstance(error, ParseError) else None
        raise SpecError(f"malformed TOML: {error}", path=path, line=line) from None
    if "general" not in document:
        raise SpecError("there is no [general] table, so this is no build.toml", path=path)
    for name in ("general", "torch", "torch-noarch"):
        if not isinstance(document.get(name, {}), Mapping):
            raise SpecError(f"`{name}` must be a table; write it as [{name}]", path=path)
    general: Any = document["general"]
    if general.get("edition") == EDITION:
        return None
    if isinstance(general.get("edition"), int) and general["edition"] > EDITION:
        raise SpecError(
            f"edition {general['edition']} is newer than kernelpress; update kernelpress", path=path
        )
    _framework(document, path)
    _general(general, license, path)
    return tomlkit.dumps(document)


def _framework(document: tomlkit.TOMLDocument, path: Path) -> None:
    for compiled in ("kernel", "tvm-ffi"):
        # A bare [kernel] lists no sources; upstream's own noarch kernels have it.
        if compiled in document and (compiled != "kernel" or document[compiled] != {}):
            raise SpecError(
                f"[{compiled}] describes compiled sources; migrate it with kernel-builder", path=path
            )
    torch: Mapping[str, Any] = document.get("torch", {})
    if torch.get("src"):
        raise SpecError("[torch] has compiled sources in `src`; migrate it with kernel-builder", path=path)
    if "torch-noarch" not in document:
        table = tomlkit.table()
        if "pyext" in torch:
            table["pyext"] = torch["pyext"]
        document["torch-noarch"] = table
    if "torch" in document:
        del document["torch"]


def _general(general: Any, license: str | None, path: Path) -> None:
    universal = general.pop("universal", None)
    name = str(general.get("name", ""))
    general["name"] = re.sub(r"[_.]+", "-", name).lower()
    if "version" not in general:
        general["version"] = 1
    if "license" not in general:
        if license is None:
            raise SpecError("no licence is named, as was the custom then; give --license", path=path)
        general["license"] = license
    if "backends" not in general:
        if not universal:
            raise SpecError(
                f"no backends are named; add `backends` to [general], of {', '.join(BACKENDS)}", path=path
            )
        general["backends"] = _UNIVERSAL
    hub = general.get("hub")
    if isinstance(hub, MutableMapping) and "branch" in hub:
        del hub["branch"]
    general["edition"] = EDITION
