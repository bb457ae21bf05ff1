"""Patterns of a ``.gitignore``, matched in time that grows with their length and never beyond.

The patterns come from strangers. A regular expression made of one can take years over a short path, so each is an
automaton instead: its states are the bits of a number, and one step for each character moves all of them
at once (the Shift-And method of Baeza-Yates and Gonnet, 1992).
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass, field

from .problems import bad_request

MAX_BYTES = 64 << 10
MAX_PATTERN = 1024
# Steps of automata for one request; the largest upload that the client asks about at once takes a tenth.
MAX_STEPS = 3_000_000

_NAMED = {
    "alnum": string.ascii_letters + string.digits,
    "alpha": string.ascii_letters,
    "digit": string.digits,
    "lower": string.ascii_lowercase,
    "punct": string.punctuation,
    "space": string.whitespace,
    "upper": string.ascii_uppercase,
    "xdigit": string.hexdigits,
}


class Ignore:
    """Which paths the patterns leave out, by git's rules (https://git-scm.com/docs/gitignore).

    Args:
        text: The content of a ``.gitignore``.

    Raises:
        Problem: 400 when there is more of it than anyone writes.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_BYTES:
            raise bad_request(f"the .gitignore is longer than {MAX_BYTES >> 10} KiB")
        # The last pattern that matches decides, so they are asked from the end.
        self._patterns = [each for line in reversed(text.split("\n")) if (each := _pattern(line)) is not None]
        self._folders: dict[str, bool] = {"": False}
        self._left = MAX_STEPS

    def ignores(self, path: str) -> bool:
        """Whether a file is left out, by its own name or that of a folder around it.

        Raises:
            Problem: 400 when all that was asked took too many steps.
        """
        return self._inside(path.rpartition("/")[0]) or self._decided(path, is_folder=False)

    def _inside(self, folder: str) -> bool:
        # A file in an ignored folder is ignored, whatever later patterns say about it.
        if folder not in self._folders:
            above = self._inside(folder.rpartition("/")[0])
            self._folders[folder] = above or self._decided(folder, is_folder=True)
        return self._folders[folder]

    def _decided(self, path: str, *, is_folder: bool) -> bool:
        name = path.rpartition("/")[2]
        for pattern in self._patterns:
            if pattern.folders_only and not is_folder:
                continue
            subject = f"/{path}" if pattern.anchored else name
            self._left -= 1
            # Most patterns are told apart by their last characters alone.
            if not subject.endswith(pattern.tail):
                continue
            self._left -= len(subject)
            if self._left < 0:
                raise bad_request("the .gitignore takes too long for so many files; simplify it")
            if pattern.matches(subject):
                return not pattern.negated
        return False


@dataclass(frozen=True)
class _Token:
    """One state: what it takes (``chars``, or everything but them where ``others``), and how often.

    ``loop`` stays on what it takes and may be passed over at once; ``folders`` may be passed over only where a folder's
    name has just ended.
    """

    chars: frozenset[str]
    others: bool = False
    loop: bool = False
    folders: bool = False


@dataclass
class _Pattern:
    tokens: list[_Token]
    negated: bool
    folders_only: bool
    anchored: bool
    tail: str
    _taking: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._loops = _bits(each.loop for each in self.tokens)
        self._stars = _bits(each.loop and not each.folders for each in self.tokens)
        self._folds = _bits(each.folders for each in self.tokens)

    def matches(self, text: str) -> bool:
        states = self._passed(1, "/")
        for char in text:
            taking = self._taking.get(char)
            if taking is None:
                taking = _bits((char in each.chars) != each.others for each in self.tokens)
                self._taking[char] = taking
            moved = states & taking
            states = self._passed((moved & ~self._loops) << 1 | (moved & self._loops), char)
            if not states:
                return False
        return bool(states >> len(self.tokens) & 1)

    def _passed(self, states: int, last: str) -> int:
        # No loop follows another of its kind, so each kind is passed over once.
        if last == "/":
            states |= (states & self._folds) << 1
        return states | (states & self._stars) << 1


def _bits(flags: Iterable[bool]) -> int:
    number = 0
    for at, flag in enumerate(flags):
        number |= flag << at
    return number


_ANY = frozenset[str]()
_SLASH = frozenset("/")
_ONE = _Token(_SLASH, others=True)
_STAR = _Token(_SLASH, others=True, loop=True)
_REST = _Token(_ANY, others=True, loop=True)
_FOLDERS = _Token(_ANY, others=True, loop=True, folders=True)


def _pattern(line: str) -> _Pattern | None:
    line = line.removesuffix("\r")
    while line.endswith(" ") and not line.endswith("\\ "):
        line = line[:-1]
    negated = line.startswith("!")
    text = line[negated:]
    folders_only = text.endswith("/")
    text = text.removesuffix("/")
    if not text or line.startswith("#") or len(text) > MAX_PATTERN:
        return None
    anchored = "/" in text
    # A path is matched with a slash before it, so that its first folder begins as any other does.
    tokens = _tokens(f"/{text.removeprefix('/')}" if anchored else text)
    if tokens is None:
        return None
    tail = ""
    for token in reversed(tokens):
        if token.loop or token.others or len(token.chars) != 1:
            break
        tail = next(iter(token.chars)) + tail
    return _Pattern(tokens, negated, folders_only, anchored, tail)


def _tokens(text: str) -> list[_Token] | None:
    """What a pattern is made of; ``None`` for one that git takes for malformed, and that matches nothing."""
    tokens: list[_Token] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char == "*":
            end = at
            while text[end : end + 1] == "*":
                end += 1
            alone = end - at == 2 and text[:at].endswith("/")
            token = _STAR
            if alone and end == len(text):
                # Everything inside: at least one character more.
                tokens.append(_Token(_ANY, others=True))
                token = _REST
            elif alone and text[end] == "/":
                token, end = _FOLDERS, end + 1
            if not tokens or tokens[-1] is not token:
                tokens.append(token)
            at = end
            continue
        if char == "[":
            found = _class(text, at + 1)
            if found is None:
                return None
            token, at = found
            tokens.append(token)
            continue
        if char == "\\":
            at += 1
            if at == len(text):
                return None
        tokens.append(_ONE if char == "?" else _Token(frozenset(text[at])))
        at += 1
    return tokens


def _class(text: str, at: int) -> tuple[_Token, int] | None:
    """The token of ``[...]`` whose content begins at ``at``, and where it ends."""
    others = text[at : at + 1] in ("!", "^")
    at += others
    chars: set[str] = set()
    first = True
    while first or text[at : at + 1] != "]":
        if at >= len(text):
            return None
        if text.startswith("[:", at) and (end := text.find(":]", at)) > 0:
            if text[at + 2 : end] not in _NAMED:
                return None
            chars.update(_NAMED[text[at + 2 : end]])
            at, first = end + 2, False
            continue
        low, at = _member(text, at)
        high = low
        if text[at : at + 1] == "-" and text[at + 1 : at + 2] not in ("", "]"):
            high, at = _member(text, at + 1)
        # Of a range that nobody can list, what is beyond ASCII and Latin is left out.
        chars.update(map(chr, range(ord(low or "\0"), min(ord(high or "\0"), 0x2FF) + 1)))
        chars.add(low)
        first = False
    # No class takes the slash between folders.
    return _Token(frozenset(chars | {"/"}) if others else frozenset(chars - {"/"}), others), at + 1


def _member(text: str, at: int) -> tuple[str, int]:
    at += text[at] == "\\"
    return text[at : at + 1], at + 1
