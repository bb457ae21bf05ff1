"""The jobs of the worker's processes: load a variant beside a twin, observe side effects, call the operators."""

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

from . import op_calls
from .side_effects import SideEffects


def run_job(job: dict[str, Any]) -> None:
    """Do one job in this process, and write its report.

    A job of the kind ``"load"`` loads the variant and its twin, ``"load without triton"`` loads it where Triton cannot
    be imported, ``"locate effects"`` finds the lines of its side effects, ``"import modules"`` imports modules without
    the kernel, to learn what operators they bring and what else they do, and ``"call operators"`` loads both again and
    calls their operators.
    """
    report = folder_of(job) / "report.json"
    ops = _all_ops()
    if job["kind"] == "import modules":
        with SideEffects(None) as effects:
            for name in job["modules"]:
                try:
                    importlib.import_module(name)
                except Exception:  # noqa: BLE001 - not every module can be imported by itself
                    continue
        write(report, {"ops": sorted(_all_ops() - ops), "effects": _effects(effects, "")})
    elif job["kind"] == "load without triton":
        sys.meta_path.insert(0, _NoTriton())
        write(report, _load(Path(job["variant"])))
    elif job["kind"] == "locate effects":
        write(report, _load(Path(job["variant"]), locate=True))
    elif job["kind"] == "call operators":
        write(report, _call_operators(job))
    else:
        write(report, _load_beside_twin(job, ops))


def _load_beside_twin(job: dict[str, Any], ops: set[str]) -> dict[str, Any]:
    variant = Path(job["variant"])
    before = set(sys.modules)
    answer = _load(variant)
    answer["ops"] = sorted(_all_ops() - ops)
    answer["untraceable"] = _untraceable(answer["ops"])
    answer["triton"] = "triton" in sys.modules
    answer["modules"] = sorted(
        name
        for name in set(sys.modules) - before
        if getattr(sys.modules[name], "__spec__", None) and not name.startswith("_")
    )
    answer["twin_error"] = _load(Path(job["twin"]))["error"] if answer["error"] is None else None
    answer["all_ops"] = sorted(_all_ops())
    return answer | {"calls": {}, "conflict": None}


def _call_operators(job: dict[str, Any]) -> dict[str, Any]:
    own, other = ((job[id], f"{job[path]}{os.sep}") for id, path in (("id", "variant"), ("twin_id", "twin")))
    for path in ("variant", "twin") if job["twin_loads"] else ("variant",):
        error = _load(Path(job[path]))["error"]
        if error is not None:
            raise ImportError(error)
    calls = op_calls.call_all(*own)
    conflict = op_calls.conflict(own, other, calls) if job["twin_loads"] else None
    for call in calls.values():
        del call["arguments"]
    return {"calls": calls, "conflict": conflict}


def _all_ops() -> set[str]:
    import torch

    return set(torch._C._dispatch_get_all_op_names())


def _effects(effects: SideEffects, own: str) -> list[tuple[str, str | None, int | None]]:
    """Side effects with their files and lines where these are known; paths of the kernel's own files are relative."""
    return [
        (effect.replace(own, "") if own else effect, *effects.places.get(effect, (None, None)))
        for effect in effects.observed
    ]


def _load(variant: Path, *, locate: bool = False) -> dict[str, Any]:
    from kernels import get_local_kernel  # type: ignore[import-untyped]

    answer: dict[str, Any] = {
        "error": None, "file": None, "line": None, "public": None, "absent": [], "undocumented": [], "effects": [],
        "malformed": None,
    }  # fmt: skip
    try:
        with SideEffects(f"{variant}{os.sep}", locate=locate) as effects:
            module = get_local_kernel(variant)
    except BaseException as error:  # noqa: BLE001 - whatever the kernel's code raises is the answer
        frames = traceback.extract_tb(error.__traceback__)
        places = [
            (frame.filename, frame.lineno) for frame in frames if frame.filename.startswith(str(variant))
        ]
        if isinstance(error, SyntaxError):
            places = [(str(error.filename), error.lineno)]
        file, line = places[-1] if places else (None, None)
        return answer | {"error": f"{type(error).__name__}: {error}", "file": file, "line": line}
    answer["effects"] = _effects(effects, f"{variant}{os.sep}")
    public = getattr(module, "__all__", None)
    answer["malformed"] = None if public is None else _malformed(public)
    if public is None or answer["malformed"] is not None:
        return answer
    answer["public"] = list(public)
    for name in public:
        member = getattr(module, name, None)
        if not hasattr(module, name):
            answer["absent"].append(name)
        elif (inspect.isfunction(member) and not member.__doc__) or (
            # A class does not count as documented by its base.
            inspect.isclass(member) and not member.__dict__.get("__doc__")
        ):
            answer["undocumented"].append((name, *_location(member, variant)))
    return answer


def _malformed(public: Any) -> str | None:
    """The type of an ``__all__`` that is no list of names."""
    if not isinstance(public, list | tuple):
        return f"a {type(public).__name__}"
    kinds = sorted({type(name).__name__ for name in public if not isinstance(name, str)})
    return f"a {type(public).__name__} with a {kinds[0]} in it" if kinds else None


def _location(member: Any, variant: Path) -> tuple[str | None, int | None]:
    """The file of the variant and the line where a function or a class is defined."""
    try:
        # Of a function that is wrapped by a decorator, the one that its author wrote.
        member = inspect.unwrap(member)
        file, line = inspect.getsourcefile(member), max(1, inspect.getsourcelines(member)[1])
    except (OSError, TypeError, ValueError):
        return None, None
    return (file, line) if file is not None and Path(file).is_relative_to(variant) else (None, None)


def _untraceable(ops: list[str]) -> list[str]:
    """Operators that fake tensors cannot pass through."""
    import torch
    from torch._library import custom_ops, simple_registry, utils

    def has_fake(op: str) -> bool:
        definition = custom_ops.OPDEFS.get(op.partition(".")[0])
        if definition is not None:
            # One is always registered for these, but only to say that there is none.
            return definition._abstract_fn is not None or utils.can_generate_trivial_fake_impl(
                definition._opoverload
            )
        return simple_registry.singleton.find(op).fake_impl.kernel is not None or any(
            torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
            for key in ("Meta", "CompositeImplicitAutograd")
        )

    return [op for op in ops if not has_fake(op)]


class _NoTriton(importlib.abc.MetaPathFinder):
    """Makes a process one in which Triton is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def folder_of(job: dict[str, Any]) -> Path:
    """The directory that a job's process works in."""
    return Path(job["folder"], job["kind"])


def write(report: Path, answer: Any) -> None:
    """Write a file whole or not at all."""
    report.with_suffix(".part").write_text(json.dumps(answer), "utf-8")
    report.with_suffix(".part").replace(report)
