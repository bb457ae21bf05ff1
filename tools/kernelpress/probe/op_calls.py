"""Calls of operators with sample inputs: on fake tensors first, then in earnest on the CPU.

Runs in processes that have torch and the standard library alone.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from .sample_inputs import SampleSearch, bind, words_of

# Seconds of the processor for one call and for all of a package's, as a loop over made-up numbers may never end. One
# that sleeps ends with the process.
_ONE_CALL = 5.0
_ALL = 30.0
_BINDING = re.compile(r"\(\) (takes|missing|got) ")
_NOTHING: dict[str, Any] = {
    "fake": "not run", "fake_why": "", "real": "not run", "real_why": "", "file": None, "line": None,
    "arguments": None, "differs": "",
}  # fmt: skip


class _TooLongError(BaseException):
    """Not an ``Exception``, so that an operator's own handlers let it pass."""


class _ResultError(Exception):
    """A fake implementation's result is not what the schema says."""


class _Result(NamedTuple):
    """Sizes, of which one that only data tells is ``None``, and dtype of a tensor; or the type of anything else."""

    sizes: list[int | None]
    kind: str

    def __str__(self) -> str:
        return f"{self.kind.removeprefix('torch.')}{self.sizes}"


class _Call(NamedTuple):
    """Results or error of one call, and the files of the builds looked at whose code ran."""

    results: list[_Result]
    error: BaseException | None
    files: tuple[str, ...]


def operators(namespace: str) -> dict[str, Any]:
    """The overloads of a namespace by their names without it."""
    import torch

    overloads = {}
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        space, _, name = full.partition("::")
        if space == namespace:
            packet, _, overload = name.partition(".")
            overloads[name] = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
    return overloads


def prepare() -> None:
    """Import what torch needs for a call on fake tensors, all of its tracing, before it is asked for the first."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        torch.zeros(1)


def call_all(namespace: str, own: str) -> dict[str, Any]:
    """Examine every operator of a namespace; see ``examine``."""
    # It writes a traceback of every call that fails, and most are meant to.
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True
    end = time.process_time() + _ALL
    words = words_of(namespace)
    return {
        name: examine(overload, own, words)
        if time.process_time() < end
        else _NOTHING | {"fake_why": "no time was left"}
        for name, overload in operators(namespace).items()
    }


def conflict(first: tuple[str, str], second: tuple[str, str], calls: dict[str, Any]) -> str | None:
    """Say what goes wrong when two builds' operators of the same names are called in one process.

    Args:
        first: Namespace and directory of one build.
        second: Those of the other.
        calls: The results of ``call_all`` for the first.

    Returns:
        The first operator that runs code of the other build or fares otherwise than the other build's, or ``None``.
    """
    roots = (first[1], second[1])
    for (namespace, own), other in ((first, second[1]), (second, first[1])):
        for name in calls:
            for file in _function_files(f"{namespace}::{name}"):
                if file.startswith(other):
                    return f"operator {name!r} of {own} is a function of {file}"
    pairs = operators(first[0]), operators(second[0])
    for name, call in calls.items():
        if call["arguments"] is None or any(name not in overloads for overloads in pairs):
            continue
        fakes = None if call["real"] == "ran" else _Fakes()
        results = [_call(overloads[name], call["arguments"], roots, fakes) for overloads in pairs]
        for result, own, other in zip(results, roots, reversed(roots), strict=True):
            for file in result.files:
                if file.startswith(other):
                    return f"calling operator {name!r} of {own} runs {file}"
        one, another = (
            [(sizes, kind) for sizes, kind in result.results]
            if result.error is None
            else type(result.error).__name__
            for result in results
        )
        if one != another:
            return f"operator {name!r} gives {one} in one and {another} in the other"
    return None


def _function_files(op: str) -> list[str]:
    """Files of the Python functions of an operator, as far as PyTorch keeps them: of ``custom_op`` and kin."""
    from torch._library import custom_ops

    definition = custom_ops.OPDEFS.get(op.partition(".")[0])
    if definition is None:
        return []
    functions = (definition._init_fn, definition._abstract_fn, *definition._backend_fns.values())
    codes = [
        getattr(inspect.unwrap(function), "__code__", None) for function in functions if function is not None
    ]
    return [code.co_filename for code in codes if code is not None]


def examine(overload: Any, own: str, words: list[str]) -> dict[str, Any]:
    """Look for arguments that an operator takes, and run its fake implementation and itself on them.

    Args:
        overload: The operator.
        own: The directory that its code stands in.
        words: Strings to try where it takes one.

    Returns:
        ``fake`` and ``real`` say ``"ran"``, ``"failed"`` (the operator is at fault) or ``"not run"`` (nothing that was
        tried fitted, which proves nothing); ``fake_why`` and ``real_why`` why, with ``file`` and ``line`` where they
        are known; ``arguments`` the list that fitted; ``differs`` what the fake implementation promised against what
        the operator gave, if they agreed on no list that both took.
    """
    answer = dict(_NOTHING)
    search = SampleSearch(overload, own, words)
    fakes = _Fakes()
    for arguments in search.lists(None):
        fake = _call(overload, arguments, (own,), fakes)
        if fake.error is None:
            answer |= {"fake": "ran", "fake_why": "", "arguments": arguments}
            break
        answer["fake_why"] = _reason(fake.error)
        if _is_at_fault(fake, own):
            return answer | {"fake": "failed"} | _location(fake.error, own)
        search.learn(arguments, fake.error)
    else:
        return answer
    for arguments in search.lists(answer["arguments"]):
        real = _call(overload, arguments, (own,), None)
        if real.error is not None:
            answer["real_why"] = _reason(real.error)
            search.learn(arguments, real.error)
            continue
        fake = _call(overload, arguments, (own,), fakes)
        if fake.error is not None:
            continue
        answer |= {"real": "ran", "real_why": "", "arguments": arguments}
        if _agree(fake.results, real.results):
            return answer | {"differs": ""}
        # Arguments that make no sense may be taken all the same, and then the two need not agree; so others are
        # tried for as long as there is time. The first are the plainest.
        promised, actual = (", ".join(map(str, call.results)) or "nothing" for call in (fake, real))
        answer["differs"] = (
            answer["differs"] or f"{promised} against {actual} for ({', '.join(map(repr, arguments))})"
        )
    return answer


class _Fakes:
    """The mode of an operator's calls on fake tensors, and those tensors, which serve one call after the other."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._mode, self.pool = FakeTensorMode(), dict[Any, Any]()

    def mode(self) -> Any:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # Results of sizes that only data tells are a fake implementation's right; to read the data is not. They are
        # other sizes in every call: in another epoch tensors forget those of calls before.
        self._mode.shape_env, self._mode.static_shapes = ShapeEnv(allow_scalar_outputs=False), False
        self._mode.epoch += 1
        return self._mode


def _call(overload: Any, arguments: list[Any], roots: tuple[str, ...], fakes: _Fakes | None) -> _Call:
    """Call an operator, in earnest or on fake tensors, and note which files below ``roots`` ran for it."""
    import torch

    # What an operator writes to is no tensor for another call.
    pool = fakes.pool if fakes and not overload._schema.is_mutable else None
    files: dict[str, None] = {}

    # Not a profile, which is told of each return and of each call of a function in C as well.
    def trace(frame: Any, event: str, _: Any) -> None:
        if frame.f_code.co_filename.startswith(roots):
            files.setdefault(frame.f_code.co_filename)

    results: list[_Result] = []
    error: BaseException | None = None
    try:
        with fakes.mode() if fakes else contextlib.nullcontext(), torch.no_grad(), _limited():
            positional, named = bind(overload, arguments, pool)
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                returned = overload(*positional, **named)
            finally:
                sys.settrace(before)
        if fakes:
            _check_results(overload, returned)
        results = _results(returned)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as raised:  # noqa: BLE001 - whatever the operator's code raises is the answer
        error = raised
    return _Call(results, error, tuple(files))


def _is_at_fault(call: _Call, own: str) -> bool:
    """Return whether a fake implementation fails whatever its arguments are."""
    import torch._subclasses.fake_tensor as fakes

    error = call.error
    if isinstance(
        error, NameError | ImportError | SyntaxError | fakes.DataDependentOutputException | _ResultError
    ):
        return True
    if isinstance(error, AttributeError):
        # An optional argument that was left out is no fault of the operator's.
        return bool(call.files) and error.obj is not None
    if not call.files:
        return isinstance(error, TypeError) and _BINDING.search(str(error)) is not None
    if not _location(error, own):
        # It has returned, and PyTorch does not take what it gave.
        return isinstance(error, Exception)
    return "data pointer" in str(error)


def _check_results(overload: Any, returned: Any) -> None:
    import torch

    promised = [str(result.type) for result in overload._schema.returns]
    results = [returned] if len(promised) == 1 else list(returned or ())
    if len(results) != len(promised) or any(
        kind == "Tensor" and not isinstance(value, torch.Tensor)
        for kind, value in zip(promised, results, strict=True)
    ):
        kinds = ", ".join(type(value).__name__ for value in results) or "nothing"
        raise _ResultError(f"returns {kinds}, and the schema says {', '.join(promised) or 'nothing'}")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise in the block when it has run for too long."""
    if not hasattr(signal, "setitimer"):  # not on Windows, where the whole process has a limit alone
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLongError(f"not done after {_ONE_CALL:.0f} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _ONE_CALL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _results(returned: Any) -> list[_Result]:
    import torch

    if isinstance(returned, tuple | list):
        return [result for item in returned for result in _results(item)]
    if not isinstance(returned, torch.Tensor):
        return [_Result([], type(returned).__name__)]
    return [
        _Result([size if isinstance(size, int) else None for size in returned.shape], str(returned.dtype))
    ]


def _agree(promised: list[_Result], returned: list[_Result]) -> bool:
    return len(promised) == len(returned) and all(
        one.kind == other.kind
        and len(one.sizes) == len(other.sizes)
        and all(size in (None, actual) for size, actual in zip(one.sizes, other.sizes, strict=True))
        for one, other in zip(promised, returned, strict=True)
    )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, _ResultError):
        return f"it {lines[0]}"
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def _location(error: BaseException | None, own: str) -> dict[str, Any]:
    frames = traceback.walk_tb(error.__traceback__ if error else None)
    places = [(frame.f_code.co_filename, line) for frame, line in frames]
    places = [place for place in places if place[0].startswith(own)]
    return dict(zip(("file", "line"), places[-1], strict=True)) if places else {}
