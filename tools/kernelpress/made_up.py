"""Arguments made up for an operator of which nothing is known but its schema."""

from __future__ import annotations

import random
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Tries for one operator, and seconds of the processor for them, as a made-up number may make it slow.
_TRIES = 1000
_SECONDS = 5.0
# Most sizes are the same, so that arguments fit each other as soon as their numbers of dimensions are right.
_SIZES = (4, 4, 4, 4, 8)
_INDEX = re.compile(r"ind(ex|ices)|idx|offset|order|perm|ids?$|len|seq|slot|position")


class Made(NamedTuple):
    """A tensor to make when a call is about to happen: zeros, which index whatever they may have to."""

    shape: tuple[int, ...]
    floating: bool

    def __str__(self) -> str:
        return f"{'float32' if self.floating else 'int64'}{list(self.shape)}"


class Search:
    """Argument lists in an order that leads to some that fit: changes to the one whose call came furthest."""

    def __init__(self, overload: Any, own: str, words: list[str]) -> None:
        self.arguments = required(overload)
        self.own = own
        self.words = words
        # The same lists each time, so that a finding does not come and go.
        self.random = random.Random(overload._schema.name.partition("::")[2])
        self.best: tuple[int, list[Any]] | None = None

    def lists(self, start: list[Any] | None) -> Iterator[list[Any]]:
        """From ``start``, or from lists whose tensors all have the same number of dimensions."""
        self.best = None if start is None else (0, start)
        end = time.process_time() + _SECONDS
        if start is not None:
            yield start
        else:
            for rank in (2, 1, 3, 4, 0):
                yield [_made_up(each, rank, None, self.words) for each in self.arguments]
        for _ in range(_TRIES if self.arguments else 0):
            if time.process_time() > end:
                return
            changes = self.random.choice((0.1, 0.3, 1.0))
            fresh = [_made_up(each, None, self.random, self.words) for each in self.arguments]
            yield [
                new if self.best is None or self.random.random() < changes else old
                for new, old in zip(fresh, self.best[1] if self.best else fresh, strict=True)
            ]

    def learn(self, arguments: list[Any], error: BaseException) -> None:
        """Keep what came as far as the best: to that line of the operator's own outermost function."""
        frames = traceback.extract_tb(error.__traceback__)
        reached = next((frame.lineno or 0 for frame in frames if frame.filename.startswith(self.own)), 0)
        if self.best is None or reached >= self.best[0]:
            self.best = reached, arguments


def required(overload: Any) -> list[Any]:
    """An operator's arguments that have no default; the others are left to theirs."""
    return [each for each in overload._schema.arguments if not each.has_default_value()]


def bound(overload: Any, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Values for the required arguments, as positional ones and by name."""
    pairs = list(zip(required(overload), values, strict=True))
    return [value for each, value in pairs if not each.kwarg_only], {
        each.name: value for each, value in pairs if each.kwarg_only
    }


def _made_up(argument: Any, rank: int | None, source: random.Random | None, words: list[str]) -> Any:
    """A value for an argument: the plainest one of a rank, or any one."""

    def one(choices: Sequence[Any]) -> Any:
        return choices[0] if source is None else source.choice(choices)

    def of(kind: str) -> Any:
        if kind.startswith("Optional["):
            return None if one((True, False)) else of(kind[9:-1])
        if kind.startswith("List["):
            return [of(kind[5:-1]) for _ in range(one(range(1, 13)))]
        if kind == "Tensor":
            indexes = _INDEX.search(argument.name) is not None
            ranks = (1, 1, 2) if indexes else (1, 2, 2, 3, 3, 4)
            shape = tuple(one(_SIZES) for _ in range(one(ranks) if rank is None else rank))
            return Made(shape, one((not indexes,) * 4 + (indexes,)))
        choices: dict[str, Sequence[Any]] = {
            "int": (1, 2, *_SIZES[-2:]), "float": (1.0,), "number": (1.0,), "bool": (False, True),
            "str": (*words, ""), "Device": ("cpu",),
        }  # fmt: skip
        return one(choices.get(kind, (None,)))

    return of(str(argument.type))


def value(each: Any) -> Any:
    """What is passed on for an entry of an argument list."""
    import torch

    if isinstance(each, Made):
        return torch.zeros(each.shape, dtype=torch.float32 if each.floating else torch.int64)
    return [value(item) for item in each] if isinstance(each, list) else each


def shown(arguments: list[Any]) -> str:
    """An argument list for people."""
    return f"({', '.join(str(each) if isinstance(each, Made) else repr(each) for each in arguments)})"


def words(namespace: str) -> list[str]:
    """Strings that an operator may ask for by name: keys and items of the package's tables."""
    found: dict[str, None] = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] != namespace:
            continue
        for key, table in sorted(vars(module).items()):
            if isinstance(table, dict | list | tuple | set | frozenset) and not key.startswith("__"):
                found |= dict.fromkeys(
                    sorted(each for each in table if isinstance(each, str) and each.isidentifier())
                )
    return list(found)[:30]
