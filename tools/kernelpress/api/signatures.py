"""Changes between two forms of one function that a caller would feel."""

from __future__ import annotations

from collections.abc import Iterator

import griffe

from kernelpress.api.public_api import final

# Labels that Griffe gives to a function or a property: what a caller feels when one is gained, and when it is lost.
_LABELS = {
    "async": ("is now awaited", "need no longer be awaited"),
    "staticmethod": ("is now a static method", "is no longer a static method"),
    "classmethod": ("is now a class method", "is no longer a class method"),
    "writable": ("", "can no longer be set"),
    "deletable": ("", "can no longer be deleted"),
}
_POSITIONAL = (griffe.ParameterKind.positional_only, griffe.ParameterKind.positional_or_keyword)


def labels(old: griffe.Object, new: griffe.Object) -> Iterator[str]:
    """Changes of the way to call or to use it: awaited, without an instance, no longer set."""
    for label, (gained, lost) in _LABELS.items():
        if label in new.labels - old.labels and gained:
            yield gained
        if label in old.labels - new.labels:
            yield lost


def overloads(old: griffe.Function, new: griffe.Function) -> Iterator[str]:
    """Overloads, ways to call a function that a type checker knows of, that are there no longer."""
    for before in old.overloads or ():
        if not any(
            next(signature(before, after), None) is None and _types(before).items() <= _types(after).items()
            for after in new.overloads or ()
        ):
            types = ", ".join(f"{name}: {annotation}" for name, annotation in _types(before).items())
            yield f"overload ({types}) removed"


def _types(function: griffe.Function) -> dict[str, str]:
    return {parameter.name: str(parameter.annotation) for parameter in function.parameters}


def signature(old: griffe.Function, new: griffe.Function) -> Iterator[str]:
    """Breaks of a signature; Griffe's own comparison lets a changed annotation pass, upstream's rule does not."""
    variadic = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)
    by_name = {parameter.name: parameter for parameter in new.parameters}
    kinds = {parameter.kind for parameter in new.parameters}
    order = [parameter.name for parameter in new.parameters if parameter.kind in _POSITIONAL]
    position = 0
    for parameter in old.parameters:
        name = parameter.name
        after = by_name.get(name)
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
    names = {parameter.name for parameter in old.parameters}
    for parameter in new.parameters:
        if parameter.name not in names and parameter.required and parameter.kind not in variadic:
            yield f"required parameter {parameter.name!r} added"
    if old.returns is not None and str(old.returns) != str(new.returns):
        yield f"return annotation changed from {old.returns} to {new.returns or 'none'}"


def _default(function: griffe.Function, parameter: griffe.Parameter) -> str:
    """A default as it is written; a constant of the package is followed to its value."""
    value = parameter.default
    if isinstance(value, griffe.ExprName | griffe.ExprAttribute):
        try:
            constant = final(function.modules_collection[value.canonical_path])
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            constant = None
        if isinstance(constant, griffe.Attribute) and constant.value is not None:
            value = constant.value
    return str(value)


def _accepts(old: griffe.Parameter, new: griffe.Parameter) -> bool:
    """Return whether every way to pass the parameter still works."""
    return old.kind is new.kind or (
        new.kind is griffe.ParameterKind.positional_or_keyword
        and old.kind in (griffe.ParameterKind.positional_only, griffe.ParameterKind.keyword_only)
    )


def _kind(parameter: griffe.Parameter) -> str:
    return parameter.kind.value if parameter.kind is not None else "of no kind"


def _stars(parameter: griffe.Parameter) -> str:
    return "*" if parameter.kind is griffe.ParameterKind.var_positional else "**"
