"""Sample inputs for an operator of which nothing is known but its schema."""

from __future__ import annotations

import collections
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


class TensorSpec(NamedTuple):
    """Shape and dtype (float32 or int64) of a tensor of zeros, which index whatever they may have to."""

    shape: tuple[int, ...]
    floating: bool

    def __repr__(self) -> str:
        return f"{'float32' if self.floating else 'int64'}{list(self.shape)}"


class _Argument(NamedTuple):
    """The type of an argument by the schema, and whether by its name its numbers are indexes."""

    kind: str
    indexes: bool


class SampleSearch:
    """Argument lists in an order that leads to some that fit: changes to the one whose call came furthest, each once.

    Args:
        overload: The operator.
        own: What the paths of its own files begin with.
        words: Strings to try where it takes one.
    """

    def __init__(self, overload: Any, own: str, words: list[str]) -> None:
        self._arguments = [
            _Argument(str(argument.type), _INDEX.search(argument.name) is not None)
            for argument in _required(overload)
        ]
        self._own = own
        self._words = words
        # The same lists each time, so that a finding does not come and go.
        self._random = random.Random(overload._schema.name.partition("::")[2])
        self._best: tuple[int, list[Any]] | None = None

    def lists(self, start: list[Any] | None) -> Iterator[list[Any]]:
        """From ``start``, or from lists whose tensors all have the same number of dimensions."""
        self._best = None if start is None else (0, start)
        end = time.process_time() + _SECONDS
        # A second call of the same would come as far as the first.
        called = set()
        if start is not None:
            called.add(_hashable(start))
            yield start
        else:
            for rank in (2, 1, 3, 4, 0):
                yield [_sample(argument, rank, None, self._words) for argument in self._arguments]
        for _ in range(_TRIES if self._arguments else 0):
            if time.process_time() > end:
                return
            changes = self._random.choice((0.1, 0.3, 1.0))
            fresh = [_sample(argument, None, self._random, self._words) for argument in self._arguments]
            arguments = [
                new if self._best is None or self._random.random() < changes else old
                for new, old in zip(fresh, self._best[1] if self._best else fresh, strict=True)
            ]
            if (key := _hashable(arguments)) not in called:
                called.add(key)
                yield arguments

    def learn(self, arguments: list[Any], error: BaseException) -> None:
        """Keep the list if its call came as far as the best: to that line of the operator's own outermost function."""
        frames = traceback.walk_tb(error.__traceback__)
        line = next((line for frame, line in frames if frame.f_code.co_filename.startswith(self._own)), 0)
        if self._best is None or line >= self._best[0]:
            self._best = line, arguments


def _required(overload: Any) -> list[Any]:
    """An operator's arguments that have no default; the others are left to theirs."""
    return [argument for argument in overload._schema.arguments if not argument.has_default_value()]


def bind(
    overload: Any, values: list[Any], pool: dict[Any, Any] | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Make tensors of the specifications among values for the required arguments; return positional and named ones.

    Tensors in ``pool`` serve again, where it is given, each for one specification of a list.
    """
    used: collections.Counter[TensorSpec] = collections.Counter()

    def materialize(value: Any) -> Any:
        if isinstance(value, list):
            return [materialize(item) for item in value]
        if not isinstance(value, TensorSpec):
            return value
        used[value] += 1
        key = value, used[value]
        if pool is None or key not in pool:
            tensor = torch.zeros(value.shape, dtype=torch.float32 if value.floating else torch.int64)
            if pool is None:
                return tensor
            pool[key] = tensor
        return pool[key]

    import torch

    pairs = [
        (argument, materialize(value)) for argument, value in zip(_required(overload), values, strict=True)
    ]
    return [value for argument, value in pairs if not argument.kwarg_only], {
        argument.name: value for argument, value in pairs if argument.kwarg_only
    }


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _sample(argument: _Argument, rank: int | None, source: random.Random | None, words: list[str]) -> Any:
    """A value for an argument: the plainest one of a rank, or any one."""

    def choose(choices: Sequence[Any]) -> Any:
        return choices[0] if source is None else source.choice(choices)

    def of(kind: str) -> Any:
        if kind.startswith("Optional["):
            return None if choose((True, False)) else of(kind[9:-1])
        if kind.startswith("List["):
            return [of(kind[5:-1]) for _ in range(choose(range(1, 13)))]
        if kind == "Tensor":
            indexes = argument.indexes
            ranks = (1, 1, 2) if indexes else (1, 2, 2, 3, 3, 4)
            shape = tuple(choose(_SIZES) for _ in range(choose(ranks) if rank is None else rank))
            return TensorSpec(shape, choose((not indexes,) * 4 + (indexes,)))
        choices: dict[str, Sequence[Any]] = {
            "int": (1, 2, *_SIZES[-2:]), "float": (1.0,), "number": (1.0,), "bool": (False, True),
            "str": (*words, ""), "Device": ("cpu",),
        }  # fmt: skip
        return choose(choices.get(kind, (None,)))

    return of(argument.kind)


def words_of(namespace: str) -> list[str]:
    """Strings that an operator may ask for by name: keys and items of the package's tables."""
    words: dict[str, None] = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] != namespace:
            continue
        for key, table in sorted(vars(module).items()):
            if isinstance(table, dict | list | tuple | set | frozenset) and not key.startswith("__"):
                words |= dict.fromkeys(
                    sorted(item for item in table if isinstance(item, str) and item.isidentifier())
                )
    return list(words)[:30]
