"""Operators whose arguments are declared once, as the fields of named tuples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch

T = TypeVar("T")


def flattened(function: Callable[..., T]) -> Callable[..., T]:
    """The function with each parameter that is a named tuple replaced by the tuple's fields.

    An operator takes tensors and numbers, no structures. The result's signature, from which
    ``torch.library.custom_op`` infers the schema, has the fields with their own names and types.

    Args:
        function: Takes positional arguments without defaults; every one and the result are annotated.
    """
    parameters: list[inspect.Parameter] = []
    pieces: list[tuple[Any, Any]] = []
    new = tuple.__new__
    hints = get_type_hints(function)
    result = hints.pop("return")
    for name, hint in hints.items():
        is_tuple = hasattr(hint, "_fields")
        fields = get_type_hints(hint) if is_tuple else {name: hint}
        start = len(parameters)
        for field, kind in fields.items():
            parameters.append(
                inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            )
        pieces.append((hint, slice(start, len(parameters))) if is_tuple else (None, start))

    @functools.wraps(function)
    def flat(*arguments: Any) -> T:
        # Not by the tuples' own constructors, whose Python code each call would run.
        return function(*[arguments[at] if kind is None else new(kind, arguments[at]) for kind, at in pieces])

    # A compiled or decorated caller sees this one, not the wrapped function's.
    flat.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return flat


def names_needed(operands: NamedTuple, needs: Iterable[bool]) -> list[str]:
    """The fields to compute a gradient of: those that are not None and flagged in ``needs``.

    ``needs`` has a flag for each of the first fields; the rest are not differentiable.
    """
    flagged = zip(operands._fields, operands, needs, strict=False)
    return [name for name, value, need in flagged if need and value is not None]


def by_argument(
    ctx: Any, gradients: Iterable[torch.Tensor], needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that ``needs`` flags, as autograd takes them: one entry for each argument of the forward."""
    remaining = iter(gradients)
    flagged = [next(remaining) if need else None for need in needs]
    return (*flagged, *(None,) * (len(ctx.needs_input_grad) - len(flagged)))
