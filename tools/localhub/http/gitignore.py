"""Patterns of a ``.gitignore``, matched in a time that is bounded whatever they are.

The patterns come from strangers, and an ordinary translation to a regular expression can take years over a short path.
Here nothing is tried twice: the first occurrence of the text after a star is as good as any later one, and an atomic
group (a lookahead and a reference to what it found; Python 3.10 has no other) forbids to look for one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .problems import bad_request

MAX_BYTES = 64 << 10
# Characters of paths times characters of patterns for one request; the worst of them take a second.
MAX_STEPS = 300_000_000

_NAMED_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": " \t",
    "cntrl": "\0-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": "\t-\r ",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}
_SPECIAL = re.compile(r"[*?\\[]")
# The two tokens that stand for any length of text: within a name, and for any number of folders.
_STAR, _FOLDERS = "[^/]*?", "(?:[^/]*/)*?"


class GitIgnore:
    """The rules of one ``.gitignore`` (https://git-scm.com/docs/gitignore).

    Args:
        text: The content of the file.

    Raises:
        Problem: 400 when there is more of it than anyone writes.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_BYTES:
            raise bad_request(f"the .gitignore is longer than {MAX_BYTES >> 10} KiB")
        # The last pattern that matches decides, so they are asked from the end.
        patterns = (_parse_line(line) for line in reversed(_as_bytes(text).split("\n")))
        self._patterns = [pattern for pattern in patterns if pattern is not None]
        self._folders: dict[str, bool] = {"": False}
        self._steps = MAX_STEPS

    def ignores(self, path: str) -> bool:
        """True if a file is left out, by its own name or that of a folder around it.

        Raises:
            Problem: 400 when all calls together took too many steps.
        """
        path = _as_bytes(path)
        return self._ignores_folder(path.rpartition("/")[0]) or self._matches(path, is_folder=False)

    def _ignores_folder(self, folder: str) -> bool:
        # A file in an ignored folder is ignored, whatever later patterns say about it.
        if folder not in self._folders:
            parent = self._ignores_folder(folder.rpartition("/")[0])
            self._folders[folder] = parent or self._matches(folder, is_folder=True)
        return self._folders[folder]

    def _matches(self, path: str, *, is_folder: bool) -> bool:
        name = path.rpartition("/")[2]
        for pattern in self._patterns:
            if pattern.folders_only and not is_folder:
                continue
            subject = f"/{path}" if pattern.anchored else name
            self._steps -= 1
            # Most patterns are told apart by their last characters alone.
            if not subject.endswith(pattern.tail):
                continue
            self._steps -= len(pattern.glob) * len(subject) * (1 + pattern.anchored * subject.count("/"))
            if self._steps < 0:
                raise bad_request("the .gitignore takes too long for so many files; simplify it")
            if pattern.regex is not None and pattern.regex.match(subject):
                return not pattern.negated
        return False


@dataclass(frozen=True)
class _Pattern:
    """A line of a ``.gitignore``.

    Args:
        glob: Its pattern, with a slash before it if it is ``anchored``.
        negated: It takes files back in.
        folders_only: It is for folders, not files.
        anchored: It is for whole paths, with a slash before them; otherwise for names.
    """

    glob: str
    negated: bool
    folders_only: bool
    anchored: bool

    @cached_property
    def tail(self) -> str:
        """Text that everything it matches ends with."""
        return re.split(r"[]*?\\/]", self.glob)[-1]

    @cached_property
    def regex(self) -> re.Pattern[str] | None:
        """The pattern as a regular expression; None for one that git takes for malformed, and that matches nothing."""
        try:
            tokens = list(_tokens(self.glob))
        except _MalformedError:
            return None
        return re.compile(_joined(tokens), re.DOTALL)


def _as_bytes(text: str) -> str:
    """Text with a character for each byte: git compares bytes, and a ``?`` stands for one."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


def _parse_line(line: str) -> _Pattern | None:
    line = line.removesuffix("\r")
    while line.endswith(" ") and not line.endswith("\\ "):
        line = line[:-1]
    negated = line.startswith("!")
    glob = line[negated:]
    folders_only = glob.endswith("/")
    glob = glob.removesuffix("/")
    if not glob or line.startswith("#"):
        return None
    anchored = "/" in glob
    # A path is matched with a slash before it, so that its first folder begins as any other does.
    return _Pattern(f"/{glob.removeprefix('/')}" if anchored else glob, negated, folders_only, anchored)


class _MalformedError(Exception):
    """Git takes a pattern for malformed."""


def _tokens(glob: str) -> Iterator[str]:
    """The parts of a pattern, each a regular expression.

    Raises:
        _MalformedError: Git would match nothing with it.
    """
    at = 0
    while at < len(glob):
        char = glob[at]
        if char == "*":
            start, at = at, at + len(glob[at:]) - len(glob[at:].lstrip("*"))
            # Git compares the text before the first special character by itself, so what follows begins there.
            alone = at - start > 1 and (glob[start - 1 : start] == "/" or not _SPECIAL.search(glob[:start]))
            if alone and at == len(glob):
                yield ".*"
            elif alone and glob[at] == "/":
                at += 1
                yield _FOLDERS
            else:
                yield _STAR
        elif char == "[":
            token, at = _character_class(glob, at + 1)
            yield token
        else:
            at += char == "\\"
            if at == len(glob):
                raise _MalformedError
            yield "[^/]" if char == "?" else re.escape(glob[at])
            at += 1


def _joined(tokens: list[str]) -> str:
    """A regular expression of the tokens that never looks for a second way to match."""
    regex, closing, groups = "", {_STAR: "", _FOLDERS: ""}, 0
    for token in tokens:
        if token in closing:
            # The text after a star ends at the next one; that after folders holds stars of its own.
            for kind in (_STAR, _FOLDERS) if token == _FOLDERS else (_STAR,):
                regex, closing[kind] = regex + closing[kind], ""
            groups += 1
            regex += f"(?=(?P<g{groups}>"
            closing[token] = f"))(?P=g{groups})"
        regex += token
    return regex + r"\Z" + closing[_STAR] + closing[_FOLDERS]


def _character_class(glob: str, at: int) -> tuple[str, int]:
    """The token of ``[...]`` whose content begins at ``at``, and where it ends."""
    negated = glob[at : at + 1] in ("!", "^")
    at += negated
    members = ""
    while not members or glob[at : at + 1] != "]":
        if glob.startswith("[:", at) and (end := glob.find(":]", at)) > 0:
            if glob[at + 2 : end] not in _NAMED_CLASSES:
                raise _MalformedError
            members += _NAMED_CLASSES[glob[at + 2 : end]]
            at = end + 2
            continue
        low, at = _member(glob, at)
        members += re.escape(low)
        if glob[at : at + 1] == "-" and glob[at + 1 : at + 2] not in ("", "]"):
            high, at = _member(glob, at + 1)
            if low <= high:
                members += f"{re.escape(low)}-{re.escape(high)}"
    # No class takes the slash between folders.
    return f"(?!/)[{'^' * negated}{members}]", at + 1


def _member(glob: str, at: int) -> tuple[str, int]:
    at += glob[at : at + 1] == "\\"
    if at >= len(glob):
        raise _MalformedError
    return glob[at], at + 1
