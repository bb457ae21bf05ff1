"""Calls operators whose arguments nobody told: made-up ones, on fake tensors first, then in earnest on the CPU.

Runs in processes that have torch and the standard library alone.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from .made_up import Search, bound, shown, value, words

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


class Ran(NamedTuple):
    """What one call did: its results' shapes and dtypes or its error, and the files of ``roots`` whose code ran."""

    results: list[tuple[list[Any], str]] | None
    error: BaseException | None
    files: tuple[str, ...]


def operators(namespace: str) -> dict[str, Any]:
    """The overloads of a namespace by their names without it."""
    import torch

    found = {}
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        space, _, name = full.partition("::")
        if space == namespace:
            packet, _, overload = name.partition(".")
            found[name] = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
    return found


def call_all(namespace: str, own: str) -> dict[str, Any]:
    """Examine every operator of a namespace; see ``examine``."""
    end = time.process_time() + _ALL
    texts = words(namespace)
    return {
        name: examine(overload, own, texts)
        if time.process_time() < end
        else _NOTHING | {"fake_why": "no time was left"}
        for name, overload in operators(namespace).items()
    }


def mixed(first: tuple[str, str], second: tuple[str, str], calls: dict[str, Any]) -> str | None:
    """What goes wrong when two builds' operators of the same names are called in one process.

    Args:
        first: Namespace and directory of one build.
        second: Those of the other.
        calls: What ``call_all`` found for the first.

    Returns:
        The first operator that runs code of the other build or fares otherwise than the other build's, or ``None``.
    """
    roots = (first[1], second[1])
    pairs = operators(first[0]), operators(second[0])
    for (namespace, own), other in ((first, second[1]), (second, first[1])):
        for name in calls:
            strange = next(
                (file for file in _functions(f"{namespace}::{name}") if file.startswith(other)), None
            )
            if strange is not None:
                return f"operator {name!r} of {own} is a function of {strange}"
    for name, found in calls.items():
        if found["arguments"] is None or any(name not in each for each in pairs):
            continue
        ran = [call(each[name], found["arguments"], roots, fake=found["real"] != "ran") for each in pairs]
        for one, own, other in zip(ran, roots, reversed(roots), strict=True):
            strange = next((file for file in one.files if file.startswith(other)), None)
            if strange is not None:
                return f"calling operator {name!r} of {own} runs {strange}"
        fared = [each.results if each.error is None else type(each.error).__name__ for each in ran]
        if fared[0] != fared[1]:
            return f"operator {name!r} gives {fared[0]} in one and {fared[1]} in the other"
    return None


def _functions(op: str) -> list[str]:
    """Files of the Python functions of an operator, as far as PyTorch keeps them: of ``custom_op`` and kin."""
    from torch._library import custom_ops

    definition = custom_ops.OPDEFS.get(op.partition(".")[0])
    if definition is None:
        return []
    functions = (definition._init_fn, definition._abstract_fn, *definition._backend_fns.values())
    codes = [getattr(inspect.unwrap(each), "__code__", None) for each in functions if each is not None]
    return [code.co_filename for code in codes if code is not None]


def examine(overload: Any, own: str, texts: list[str]) -> dict[str, Any]:
    """Look for arguments that an operator takes, and run its fake implementation and itself on them.

    Args:
        overload: The operator.
        own: The directory that its code stands in.
        texts: Strings to try where it takes one.

    Returns:
        ``fake`` and ``real`` say ``"ran"``, ``"failed"`` (the operator is at fault) or ``"not run"`` (nothing that was
        tried fitted, which proves nothing); ``fake_why`` and ``real_why`` why, with ``file`` and ``line`` where they
        are known; ``arguments`` the list that fitted; ``differs`` what the fake implementation promised against what
        the operator gave, if they agreed on no list that both took.
    """
    answer = dict(_NOTHING)
    search = Search(overload, own, texts)
    for arguments in search.lists(None):
        faked = call(overload, arguments, (own,), fake=True)
        if faked.error is None:
            answer |= {"fake": "ran", "fake_why": "", "arguments": arguments}
            break
        answer["fake_why"] = _said(faked.error)
        if certain(faked, own):
            return answer | {"fake": "failed"} | _place(faked.error, own)
        search.learn(arguments, faked.error)
    else:
        return answer
    for arguments in search.lists(answer["arguments"]):
        ran = call(overload, arguments, (own,), fake=False)
        if ran.error is not None:
            answer["real_why"] = _said(ran.error)
            search.learn(arguments, ran.error)
            continue
        faked = call(overload, arguments, (own,), fake=True)
        if faked.results is None or ran.results is None:
            continue
        answer |= {"real": "ran", "real_why": "", "arguments": arguments}
        if _agree(faked.results, ran.results):
            return answer | {"differs": ""}
        # Arguments that make no sense may be taken all the same, and then the two need not agree; so others are
        # tried for as long as there is time.
        answer["differs"] = f"{_shown(faked.results)} against {_shown(ran.results)} for {shown(arguments)}"
    return answer


def call(overload: Any, arguments: list[Any], roots: tuple[str, ...], *, fake: bool) -> Ran:
    """Call an operator, and see which files below ``roots`` ran for it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    files: dict[str, None] = {}

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(roots):
            files.setdefault(frame.f_code.co_filename)

    results, failed = None, None
    # Results of sizes that only data tells are a fake implementation's right; to read the data is not.
    mode = (
        FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=False)) if fake else contextlib.nullcontext()
    )
    try:
        with mode, torch.no_grad(), _limited():
            values = [value(each) for each in arguments]
            positional, named = bound(overload, values)
            before = sys.getprofile()
            sys.setprofile(watch)
            try:
                returned = overload(*positional, **named)
            finally:
                sys.setprofile(before)
        if fake:
            _check_results(overload, returned)
        results = [_described(each) for each in _flat(returned)]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - whatever the operator's code raises is the answer
        failed = error
    return Ran(results, failed, tuple(files))


def certain(ran: Ran, own: str) -> bool:
    """Whether a fake implementation is at fault whatever its arguments were."""
    import torch._subclasses.fake_tensor as fakes

    error = ran.error
    if isinstance(
        error, NameError | ImportError | SyntaxError | fakes.DataDependentOutputException | _ResultError
    ):
        return True
    if isinstance(error, AttributeError):
        # An optional argument that was left out is no fault of the operator's.
        return bool(ran.files) and error.obj is not None
    if not ran.files:
        return isinstance(error, TypeError) and _BINDING.search(str(error)) is not None
    if not _place(error, own):
        # It has returned, and PyTorch does not take what it gave.
        return isinstance(error, Exception)
    return "data pointer" in str(error)


def _check_results(overload: Any, returned: Any) -> None:
    import torch

    promised = [str(each.type) for each in overload._schema.returns]
    given = [returned] if len(promised) == 1 else list(returned or ())
    if len(given) != len(promised) or any(
        kind == "Tensor" and not isinstance(each, torch.Tensor)
        for kind, each in zip(promised, given, strict=True)
    ):
        kinds = ", ".join(type(each).__name__ for each in given) or "nothing"
        raise _ResultError(f"returns {kinds}, and the schema says {', '.join(promised) or 'nothing'}")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
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


# Results -------------------------------------------------------------------------------------------------------


def _flat(returned: Any) -> list[Any]:
    if isinstance(returned, tuple | list):
        return [item for each in returned for item in _flat(each)]
    return [returned]


def _described(each: Any) -> tuple[list[Any], str]:
    import torch

    if not isinstance(each, torch.Tensor):
        return [], type(each).__name__
    # A size that only data tells is none to compare.
    return [size if isinstance(size, int) else None for size in each.shape], str(each.dtype)


def _agree(told: list[tuple[list[Any], str]], true: list[tuple[list[Any], str]]) -> bool:
    return len(told) == len(true) and all(
        one[1] == other[1]
        and len(one[0]) == len(other[0])
        and all(size is None or size == given for size, given in zip(one[0], other[0], strict=True))
        for one, other in zip(told, true, strict=True)
    )


def _shown(results: list[tuple[list[Any], str]]) -> str:
    return ", ".join(f"{kind.removeprefix('torch.')}{shape}" for shape, kind in results) or "nothing"


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, _ResultError):
        return f"it {lines[0]}"
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def _place(error: BaseException | None, own: str) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__ if error else None)
    inside = [frame for frame in frames if frame.filename.startswith(own)]
    return {"file": inside[-1].filename, "line": inside[-1].lineno} if inside else {}
