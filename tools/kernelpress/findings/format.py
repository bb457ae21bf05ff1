"""Findings as text for people, as JSON for programs, and as annotations for GitHub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Literal

from rich.markup import escape

from kernelpress.findings.model import Finding

Form = Literal["text", "json", "github"]


def render(findings: Sequence[Finding], form: Form) -> str:
    """All findings in one form; text carries rich's markup."""
    if form == "json":
        return json.dumps([asdict(finding) | {"path": str(finding.path)} for finding in findings], indent=2)
    if form == "github":
        return "\n".join(map(_annotation, findings))
    ordered = sorted(findings, key=lambda finding: (str(finding.path), finding.line or 0, finding.code))
    return "\n".join(
        "\n".join((f"[bold]{escape(path)}[/]", *map(_line, group)))
        for path, group in groupby(ordered, key=lambda finding: str(finding.path))
    )


def summary(findings: Iterable[Finding]) -> str:
    """The numbers of errors, warnings and notes, in words."""
    severities = [finding.severity for finding in findings]
    parts = [
        f"{count} {kind}{'s' * (count > 1)}"
        for kind in ("error", "warning", "note")
        if (count := severities.count(kind))
    ]
    return ", ".join(parts)


def _line(finding: Finding) -> str:
    colour = {"error": "red", "warning": "yellow", "note": "blue"}[finding.severity]
    # The place stands on each line as well, so that terminals and editors make a link of it.
    return f"  [{colour}]{finding.severity}[/] {escape(str(finding))}"


def _annotation(finding: Finding) -> str:
    # GitHub's own escapes: https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts
    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def property_value(text: str) -> str:
        return escaped(text).replace(":", "%3A").replace(",", "%2C")

    line = "" if finding.line is None else f",line={finding.line}"
    properties = f"file={property_value(str(finding.path))}{line},title={property_value(finding.code)}"
    level = "notice" if finding.severity == "note" else finding.severity
    return f"::{level} {properties}::{escaped(f'{finding.message}; {finding.fix}')}"
