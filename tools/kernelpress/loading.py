"""What is done in each process of `inside`: load a variant beside a twin, watch what happens, call the operators."""

from __future__ import annotations

import importlib
import importlib.abc
import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from . import opcalls
from .watch import Watch


def do(report: Path, job: dict[str, Any]) -> None:
    """Do one job and write its report.

    ``"load"`` loads the variant and its twin and calls the operators if it shall, ``"load without triton"`` loads it
    where Triton cannot be imported, and ``"modules"`` imports modules without the kernel, to see what operators they
    bring and what else they do.
    """
    import torch

    if job["do"] == "load without triton":
        sys.meta_path.insert(0, _NoTriton())
    before, ops = set(sys.modules), set(torch._C._dispatch_get_all_op_names())
    if job["do"] == "modules":
        with Watch(None) as watch:
            for name in job["modules"]:
                try:
                    importlib.import_module(name)
                except Exception:  # noqa: BLE001 - not every module can be imported by itself
                    continue
        brought = sorted(set(torch._C._dispatch_get_all_op_names()) - ops)
        write(report, {"ops": brought, "effects": watch.effects})
        return
    variant, twin = Path(job["variant"]), Path(job["twin"])
    answer = _load(variant)
    if job["do"] == "load without triton":
        write(report, answer)
        return
    answer["ops"] = sorted(set(torch._C._dispatch_get_all_op_names()) - ops)
    answer["untraceable"] = _untraceable(answer["ops"])
    answer["triton"] = "triton" in sys.modules
    answer["modules"] = sorted(
        name
        for name in set(sys.modules) - before
        if getattr(sys.modules[name], "__spec__", None) and not name.startswith("_")
    )
    answer["twin_error"] = _load(twin)["error"] if answer["error"] is None else None
    answer["all_ops"] = sorted(torch._C._dispatch_get_all_op_names())
    answer |= {"calls": None, "mixed": None}
    write(report, answer)
    if answer["error"] is None and not job["call"]:
        answer["calls"] = {}
        write(report, answer)
    elif answer["error"] is None:
        _call(answer, (job["id"], f"{variant}{os.sep}"), (job["twin_id"], f"{twin}{os.sep}"))
        write(report, answer)


def _call(answer: dict[str, Any], own: tuple[str, str], twin: tuple[str, str]) -> None:
    calls = opcalls.call_all(*own)
    if answer["twin_error"] is None:
        answer["mixed"] = opcalls.mixed(own, twin, calls)
    answer["calls"] = {
        name: found | {"arguments": found["arguments"] and opcalls.shown(found["arguments"])}
        for name, found in calls.items()
    }


def _load(variant: Path) -> dict[str, Any]:
    from kernels import get_local_kernel  # type: ignore[import-untyped]

    nothing: dict[str, Any] = {"error": None, "file": None, "line": None, "public": None, "absent": []}
    nothing |= {"undocumented": [], "effects": [], "malformed": None}
    try:
        with Watch(f"{variant}{os.sep}") as watch:
            module = get_local_kernel(variant)
    except BaseException as error:  # noqa: BLE001 - whatever the kernel's code raises is the answer
        inside = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename.startswith(str(variant))
        ]
        at: tuple[str | None, int | None] = (None, None)
        if inside:
            at = (inside[-1].filename, inside[-1].lineno)
        if isinstance(error, SyntaxError):
            at = (error.filename, error.lineno)
        return nothing | {"error": f"{type(error).__name__}: {error}", "file": at[0], "line": at[1]}
    public = getattr(module, "__all__", None)
    malformed = None if public is None else _malformed(public)
    if malformed is not None:
        return nothing | {"malformed": malformed, "effects": watch.effects}
    absent = [name for name in public or () if not hasattr(module, name)]
    undocumented = [
        (name, *_defined_at(found, variant))
        for name in public or ()
        if (inspect.isfunction(found := getattr(module, name, None)) or inspect.isclass(found))
        and not (found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__)
    ]
    return nothing | {
        "public": public and list(public), "absent": absent, "undocumented": undocumented,
        "effects": watch.effects,
    }  # fmt: skip


def _malformed(public: Any) -> str | None:
    """What ``__all__`` is, where it is no list of names."""
    if not isinstance(public, list | tuple):
        return f"a {type(public).__name__}"
    kinds = sorted({type(name).__name__ for name in public if not isinstance(name, str)})
    return f"a {type(public).__name__} with a {kinds[0]} in it" if kinds else None


def _defined_at(found: Any, variant: Path) -> tuple[str | None, int | None]:
    """The file of the variant and the line where a function or a class is defined."""
    try:
        # Of a function that is wrapped by a decorator, the one that its author wrote.
        found = inspect.unwrap(found)
        file, line = inspect.getsourcefile(found), max(1, inspect.getsourcelines(found)[1])
    except (OSError, TypeError, ValueError):
        return None, None
    return (file, line) if file is not None and Path(file).is_relative_to(variant) else (None, None)


def _untraceable(ops: list[str]) -> list[str]:
    """Operators that fake tensors cannot pass through."""
    import torch
    from torch._library import custom_ops, simple_registry, utils

    found = []
    for op in ops:
        definition = custom_ops.OPDEFS.get(op.partition(".")[0])
        if definition is not None:
            # One is always registered for these, but only to say that there is none.
            fake = definition._abstract_fn is not None or utils.can_generate_trivial_fake_impl(
                definition._opoverload
            )
        else:
            fake = simple_registry.singleton.find(op).fake_impl.kernel is not None or any(
                torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
                for key in ("Meta", "CompositeImplicitAutograd")
            )
        if not fake:
            found.append(op)
    return found


class _NoTriton(importlib.abc.MetaPathFinder):
    """Makes a process one in which Triton is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def write(report: Path, answer: Any) -> None:
    """Write a file whole or not at all."""
    report.with_suffix(".part").write_text(json.dumps(answer), "utf-8")
    report.with_suffix(".part").replace(report)
