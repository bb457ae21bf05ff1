"""Operators whose arguments are declared once, and which calls that nothing looks at run without torch's dispatcher.

An operator that is written in Python takes tenths of a millisecond to call, forward and backward. That is more than the
kernels of most calls take, and than a ``torch.autograd.Function``, which serves as well where a call is neither
compiled, traced nor transformed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch.utils._device import DeviceContext

from .dispatch import is_undisturbed, undisturbed

T = TypeVar("T")


def flattened(function: Callable[..., T]) -> Callable[..., T]:
    """The function with each parameter that is a named tuple replaced by the tuple's fields.

    An operator takes tensors and numbers, no structures. The result's signature, from which
    ``torch.library.custom_op`` infers the schema, has the fields with their own names and types; of
    ``Annotated[T, S]`` the type is ``S``.

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
        fields = get_type_hints(hint, include_extras=True) if is_tuple else {name: hint}
        start = len(parameters)
        for field, kind in fields.items():
            (kind,) = getattr(kind, "__metadata__", (kind,))
            parameters.append(
                inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            )
        pieces.append((hint, slice(start, len(parameters))) if is_tuple else (None, start))
    if not any(hasattr(hint, "_fields") for hint in hints.values()):
        return function

    @functools.wraps(function)
    def flat(*arguments: Any) -> T:
        # Not by the tuples' own constructors, whose Python code each call would run.
        return function(*[arguments[at] if kind is None else new(kind, arguments[at]) for kind, at in pieces])

    # A compiled or decorated caller sees this one, not the wrapped function's.
    flat.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return flat


def computation(function: Callable[..., T]) -> Callable[..., T]:
    """What an operator computes: the function :func:`flattened`, in the context of :func:`.dispatch.undisturbed`."""
    flat = flattened(function)

    @functools.wraps(flat)
    def compute(*arguments: Any) -> T:
        x = arguments[0]
        if type(x) is not torch.Tensor:
            x = _first_tensor(arguments)
        if is_undisturbed(x):
            return flat(*arguments)
        with undisturbed(x):
            return flat(*arguments)

    return compute


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, torch.dtype, type(None)})
_are_plain = _PLAIN.issuperset
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_is_transformed, _is_tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_is_profiled = torch._C._autograd._profiler_enabled


def _first_tensor(arguments: Iterable[Any]) -> torch.Tensor:
    """The first of the arguments, some of which may be lists, that is a tensor."""
    for value in arguments:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return value[0]
    raise TypeError("an operator has a tensor among its arguments")


def is_plain(arguments: Sequence[Any]) -> bool:
    """True if nothing but autograd looks at a call with these arguments, one of which is or begins with a tensor.

    So not where they are compiled, traced or transformed, where a mode or a subclass of tensors wants to see the
    operator, or where they have no data.
    """
    if not _are_plain(map(type, arguments)) and not all(
        type(value) in _PLAIN or (type(value) is list and _are_plain(map(type, value))) for value in arguments
    ):
        return False
    return not (
        _dispatch_modes()
        or (_function_modes() and _is_function_mode_active())
        or _is_transformed()
        or _is_tracing()
        or _first_tensor(arguments).is_meta
    )


def _is_function_mode_active() -> bool:
    """True if a mode wants to see calls of torch's functions; a default device, which is one, does not of these."""
    return any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext
        for i in range(torch._C._len_torch_function_stack())
    )


def _recorded(name: str, compute: Callable[..., T], arguments: Sequence[Any]) -> T:
    """An operator's own computation, as a profiler sees it."""
    # An operator's event, as the dispatcher makes one, and not an annotation, which has no time of its own.
    with torch._C._profiler._RecordFunctionFast(name):
        return compute(*arguments)


def eager(operator: torch.library.CustomOpDef) -> Callable[..., Any]:
    """The operator as a function that computes plain calls without the dispatcher, where no gradient is recorded."""
    compute, name = operator._init_fn, operator._qualname

    @functools.wraps(compute)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_plain(arguments):
            return operator(*arguments)
        return _recorded(name, compute, arguments) if _is_profiled() else compute(*arguments)

    return call


def register_autograd(
    operator: torch.library.CustomOpDef,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> Callable[..., Any]:
    """Registers an operator's autograd; the operator as a function whose plain calls go without the dispatcher.

    Args:
        operator: Takes tensors, numbers and lists of these; with lists, it returns a tuple of tensors and lists.
        backward, setup_context: As ``register_autograd`` of ``torch.library`` takes them.
    """
    operator.register_autograd(backward, setup_context=setup_context)
    compute, name = operator._init_fn, operator._qualname

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = _recorded(name, compute, arguments) if _is_profiled() else compute(*arguments)
        setup_context(ctx, arguments, results)
        return results

    def forward_of_lists(ctx: Any, structures: list[Lengths], *leaves: Any) -> tuple[torch.Tensor, ...]:
        results = forward(ctx, *_nested(leaves, structures[0]))
        flat, lengths = _leaves(results)
        structures.append(lengths)
        ctx.structures = structures
        return tuple(flat)

    def backward_of_lists(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        of_arguments, of_results = ctx.structures
        needs = ctx.needs_input_grad
        try:
            ctx.needs_input_grad = _nested(needs[1:], of_arguments)
            gradients = backward(ctx, *_nested(grads, of_results))
        finally:
            # Autograd sets it once, for all backwards through a graph that is retained.
            ctx.needs_input_grad = needs
        flat: list[Any] = [None]
        for gradient, length in zip(gradients, of_arguments, strict=True):
            flat += [gradient] if length is None else gradient or [None] * length
        return tuple(flat)

    def applied(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: Any = type(compute.__name__, (torch.autograd.Function,), methods)
        # Not Function's own apply, which first looks for transforms, and there are none around a plain call.
        apply: Callable[..., Any] = super(torch.autograd.Function, function).apply
        return apply

    apply_to_tensors, apply_to_lists = (
        applied(forward, backward),
        applied(forward_of_lists, backward_of_lists),
    )

    @functools.wraps(compute)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not is_plain(arguments):
            return operator(*arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return _recorded(name, compute, arguments) if _is_profiled() else compute(*arguments)
        if list not in map(type, arguments):
            return apply_to_tensors(*arguments)
        leaves, lengths = _leaves(arguments)
        structures = [lengths]
        results = apply_to_lists(structures, *leaves)
        return tuple(_nested(results, structures[1]))

    return call


Lengths = list[int | None]
"""Of each of some values the length, if it is a list."""


def _leaves(values: Iterable[Any]) -> tuple[list[Any], Lengths]:
    """The values, with the items of a list in its place, and what :func:`_nested` needs to put them back."""
    leaves: list[Any] = []
    lengths: Lengths = []
    for value in values:
        if isinstance(value, list):
            leaves += value
            lengths.append(len(value))
        else:
            leaves.append(value)
            lengths.append(None)
    return leaves, lengths


def _nested(leaves: Iterable[Any], lengths: Lengths) -> list[Any]:
    """The values of :func:`_leaves`."""
    rest = iter(leaves)
    return [next(rest) if length is None else list(itertools.islice(rest, length)) for length in lengths]


def names_needed(operands: NamedTuple, needs: Iterable[bool]) -> list[str]:
    """The fields to compute a gradient of: those that are not None and flagged in ``needs``.

    ``needs`` has a flag for each of the first fields; the rest are not differentiable.
    """
    flagged = zip(operands._fields, operands, needs, strict=False)
    return [name for name, value, need in flagged if need and value is not None]


def register_gradients(
    forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef, operands: type[Any], dropped: int
) -> Callable[..., Any]:
    """Lets autograd compute the gradients of an operator's first result by another operator.

    Returns what :func:`register_autograd` does.

    Args:
        forward: Takes the fields of ``operands``, the last two of which have no gradient, and other arguments; its
            results but the first are not differentiable.
        backward: Takes the first result's gradient, the operands, the other results, the other arguments but for the
            last, and a flag for each operand that tells whether its gradient is needed; returns those that are.
        operands: A named tuple.
        dropped: The number of last arguments that the backward does not take.
    """
    tensors = len(operands._fields)
    compute_gradients = eager(backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        kept = (*inputs[:tensors], *output[1:], *inputs[tensors : len(inputs) - dropped])
        # Only tensors can be saved, and lists of them have to be taken apart.
        leaves, ctx.kept_lengths = _leaves(kept)
        ctx.others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf if isinstance(leaf, torch.Tensor) else None for leaf in leaves))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def run_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return by_argument(ctx, (), ())
        needs = [bool(need) for need in ctx.needs_input_grad[: tensors - 2]]
        leaves = [
            other if saved is None else saved
            for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        gradients = compute_gradients(grad.contiguous(), *_nested(leaves, ctx.kept_lengths), needs)
        return by_argument(ctx, gradients, needs)

    return register_autograd(forward, run_backward, setup_context)


def by_argument(ctx: Any, gradients: Iterable[torch.Tensor], needs: Sequence[bool]) -> tuple[Any, ...]:
    """The gradients that ``needs`` flags, as autograd takes them: one entry for each argument of the forward, and of a
    list of tensors one for each of these."""
    remaining = iter(gradients)
    flagged = [next(remaining) if need else None for need in needs]
    rest = ctx.needs_input_grad[len(flagged) :]
    return (*flagged, *([None] * len(need) if isinstance(need, list) else None for need in rest))
