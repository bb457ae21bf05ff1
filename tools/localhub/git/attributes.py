"""Lines of ``.gitattributes`` that name large files: without them git-lfs leaves pointers in a checkout."""

from __future__ import annotations

import re

FILE = ".gitattributes"
MAX_BYTES = 1 << 20
_ATTRIBUTES = " filter=lfs diff=lfs merge=lfs -text"
# What a pattern of gitattributes(5) gives a meaning to.
_SPECIAL = re.compile(r"[*?\[\\]")
_LINE = re.compile(rf'(?:(/\S*)|"(/(?:[^"\\]|\\.)*)"){re.escape(_ATTRIBUTES)}')


def pattern(path: str) -> str:
    """The pattern that matches one path only."""
    return "/" + _SPECIAL.sub(r"\\\g<0>", path)


def patterns(text: str) -> set[str]:
    """The patterns of all lines that name one large file each."""
    return {name for line in text.splitlines() if (name := _pattern_of(line)) is not None}


def with_patterns(text: str, before: set[str], now: set[str]) -> str:
    """``text`` with a line for each of ``now``, and without those for ``before`` that are not among these."""
    lines = [line for line in text.splitlines() if _pattern_of(line) not in before - now]
    return "".join(f"{line}\n" for line in [*lines, *map(_line, sorted(now - patterns(text)))])


def _line(name: str) -> str:
    quoted = name.replace("\\", r"\\").replace('"', r"\"")
    return (f'"{quoted}"' if " " in name else name) + _ATTRIBUTES


def _pattern_of(line: str) -> str | None:
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    return match[1] or re.sub(r"\\(.)", r"\1", match[2])
