"""Findings as text for people, as JSON for programs, and as annotations for GitHub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Literal

from rich.markup import escape

from kernelpress.findings import Finding

Form = Literal["text", "json", "github"]


def render(found: Sequence[Finding], form: Form) -> str:
    """All findings in one form; text carries rich's markup."""
    if form == "json":
        return json.dumps([asdict(each) | {"path": str(each.path)} for each in found], indent=2)
    if form == "github":
        return "\n".join(map(_annotation, found))
    ordered = sorted(found, key=lambda each: (str(each.path), each.line or 0, each.code))
    return "\n".join(
        "\n".join((f"[bold]{escape(path)}[/]", *map(_line, group)))
        for path, group in groupby(ordered, key=lambda each: str(each.path))
    )


def summary(found: Iterable[Finding]) -> str:
    """How many errors and warnings there are, in words."""
    severities = [each.severity for each in found]
    parts = [
        f"{count} {kind}{'s' * (count > 1)}"
        for kind in ("error", "warning", "note")
        if (count := severities.count(kind))
    ]
    return ", ".join(parts)


def _line(each: Finding) -> str:
    colour = {"error": "red", "warning": "yellow", "note": "blue"}[each.severity]
    # The place stands on each line as well, so that terminals and editors make a link of it.
    return f"  [{colour}]{each.severity}[/] {escape(f'{each.where}: {each.code} {each.message}; {each.fix}')}"


def _annotation(each: Finding) -> str:
    # GitHub's own escapes: https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts
    def data(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def place(text: str) -> str:
        return data(text).replace(":", "%3A").replace(",", "%2C")

    line = "" if each.line is None else f",line={each.line}"
    properties = f"file={place(str(each.path))}{line},title={place(each.code)}"
    level = "notice" if each.severity == "note" else each.severity
    return f"::{level} {properties}::{data(f'{each.message}; {each.fix}')}"
