"""What changed between two forms of one function that a caller would feel."""

from __future__ import annotations

from collections.abc import Iterator

import griffe

# What Griffe notes of a function or a property that its callers would feel.
_LABELS = {
    "async": ("is now awaited", "need no longer be awaited"),
    "staticmethod": ("is now a static method", "is no longer a static method"),
    "classmethod": ("is now a class method", "is no longer a class method"),
    "writable": ("", "can no longer be set"),
    "deletable": ("", "can no longer be deleted"),
}
# Constants that are named by one another.
_CONSTANTS = 20
_POSITIONAL = (griffe.ParameterKind.positional_only, griffe.ParameterKind.positional_or_keyword)


def labels(old: griffe.Object, new: griffe.Object) -> Iterator[str]:
    """Another way to call or to use it: awaited, without an instance, no longer set."""
    for label, (gained, lost) in _LABELS.items():
        if label in new.labels - old.labels and gained:
            yield gained
        if label in old.labels - new.labels:
            yield lost


def overloads(old: griffe.Function, new: griffe.Function) -> Iterator[str]:
    """Ways to call a function that a type checker was told of and is told of no longer."""
    for before in old.overloads or ():
        if not any(
            next(signature(before, after), None) is None and _types(before).items() <= _types(after).items()
            for after in new.overloads or ()
        ):
            told = ", ".join(f"{each.name}: {each.annotation}" for each in before.parameters)
            yield f"overload ({told}) removed"


def _types(function: griffe.Function) -> dict[str, str]:
    return {each.name: str(each.annotation) for each in function.parameters}


def signature(old: griffe.Function, new: griffe.Function) -> Iterator[str]:
    """Breaks of a signature; Griffe's own comparison lets a changed annotation pass, upstream's rule does not."""
    variadic = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)
    kinds = {each.kind for each in new.parameters}
    order = [each.name for each in new.parameters if each.kind in _POSITIONAL]
    position = 0
    for parameter in old.parameters:
        name = parameter.name
        after = next((each for each in new.parameters if each.name == name), None)
        positional = parameter.kind in _POSITIONAL
        if after is None:
            if parameter.kind in variadic:
                if parameter.kind not in kinds:
                    yield f"no longer takes {_stars(parameter)}{name}"
            elif not (
                (parameter.kind is griffe.ParameterKind.keyword_only and variadic[1] in kinds)
                or (parameter.kind is griffe.ParameterKind.positional_only and variadic[0] in kinds)
            ):
                yield f"parameter {name!r} removed"
            position += positional
            continue
        if positional and after.kind in _POSITIONAL and (position >= len(order) or order[position] != name):
            yield f"parameter {name!r} moved"
        position += positional
        if not _accepts(parameter, after):
            yield f"parameter {name!r} was {_kind(parameter)} and is now {_kind(after)}"
        elif after.required and not parameter.required:
            yield f"parameter {name!r} is now required"
        elif not parameter.required and (was := _default(old, parameter)) != (now := _default(new, after)):
            yield f"default of {name!r} changed from {was} to {now}"
    known = {parameter.name for parameter in old.parameters}
    for parameter in new.parameters:
        if parameter.name not in known and parameter.required and parameter.kind not in variadic:
            yield f"required parameter {parameter.name!r} added"
    if old.returns is not None and str(old.returns) != str(new.returns):
        yield f"return annotation changed from {old.returns} to {new.returns or 'none'}"


def _default(function: griffe.Function, parameter: griffe.Parameter) -> str:
    """A default as it is written; a constant of the package is followed to its value."""
    value = parameter.default
    for _ in range(_CONSTANTS):
        if not isinstance(value, griffe.ExprName | griffe.ExprAttribute):
            break
        try:
            constant = function.modules_collection[value.canonical_path]
            if constant.is_alias:
                constant = constant.final_target
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            break
        if not constant.is_attribute or constant.value is None:
            break
        value = constant.value
    return str(value)


def _accepts(old: griffe.Parameter, new: griffe.Parameter) -> bool:
    """Whether every way to pass the parameter still works."""
    return old.kind is new.kind or (
        new.kind is griffe.ParameterKind.positional_or_keyword
        and old.kind in (griffe.ParameterKind.positional_only, griffe.ParameterKind.keyword_only)
    )


def _kind(parameter: griffe.Parameter) -> str:
    return parameter.kind.value if parameter.kind is not None else "of no kind"


def _stars(parameter: griffe.Parameter) -> str:
    return "*" if parameter.kind is griffe.ParameterKind.var_positional else "**"
