"""Loading of variants as a user's process does it, in a worker process, and what that showed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kernelpress.errors import CheckError
from kernelpress.probe import worker
from kernelpress.probe.environment import child_environment, lacks_torch, run_isolated
from kernelpress.spec.validate import python_dependencies


class EnvironmentFault(CheckError):
    """Kernels cannot be loaded in this environment: the ``reason``, and the ``fix``."""

    def __init__(self, reason: str, fix: str) -> None:
        self.reason, self.fix = reason, fix
        super().__init__(f"{reason}; {fix}")


@dataclass(frozen=True)
class OperatorCall:
    """The outcome of calling an operator with sample inputs, as ``op_calls.examine`` returns it."""

    op: str
    fake: Literal["ran", "failed", "not run"]
    fake_why: str
    real: Literal["ran", "not run"]
    real_why: str
    differs: str = ""
    file: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class Probed:
    """The facts that loading a variant showed.

    ``error`` says why it failed, with the ``file`` and ``line`` of the variant where there is one, and
    ``unmet`` the dependencies, declared by it or by another variant, for want of which it fails. ``public`` is
    ``__all__``, or ``malformed`` what that is instead of a list of names, ``absent`` those of its names that cannot be
    had, ``undocumented`` those without a docstring (name, file and line), ``foreign_ops`` operators that came into
    being outside ``namespace``, ``untraceable`` those in it without an implementation for fake tensors, ``calls`` the
    outcome of calling each of the others (in the first of the variants that hold the same code), ``effects`` the side
    effects of importing it (with file and line), ``without_triton`` why it fails where there is none, and
    ``twin_error`` what goes wrong beside another build of it in one process.
    """

    namespace: str
    error: str | None = None
    file: str | None = None
    line: int | None = None
    unmet: tuple[str, ...] = ()
    public: tuple[str, ...] | None = None
    malformed: str | None = None
    absent: tuple[str, ...] = ()
    foreign_ops: tuple[str, ...] = ()
    undocumented: tuple[tuple[str, str | None, int | None], ...] = ()
    untraceable: tuple[str, ...] = ()
    calls: tuple[OperatorCall, ...] = ()
    effects: tuple[tuple[str, str | None, int | None], ...] = ()
    without_triton: str | None = None
    twin_error: str | None = None


def probe(variants: Sequence[Path], say: Callable[[str], None] = lambda text: None) -> list[Probed]:
    """Load variants with the ``kernels`` loader, each in a process that sees nothing of this one's state.

    Args:
        variants: Directories with metadata that the loader can parse.
        say: Called with a line before they are loaded, which takes a while.

    Raises:
        EnvironmentFault: No variant can be loaded here, whatever it holds.
    """
    if lacks_torch():
        reason = "this environment lacks torch, so no variant was loaded"
        raise EnvironmentFault(reason, "install it with `pip install torch`, then check again")
    names = ", ".join(variant.name for variant in variants)
    say(f"loading {names}, each in a clean process, and calling the operators")
    from kernels._rust import Metadata  # type: ignore[import-untyped]

    metadata = [Metadata.read_from_file(variant / "metadata.json") for variant in variants]
    with tempfile.TemporaryDirectory(prefix="kernelpress-probe-") as scratch:
        jobs = []
        called: set[bytes] = set()
        for number, (variant, fields) in enumerate(zip(variants, metadata, strict=True)):
            folder, code = Path(scratch, str(number)), _code(variant, fields.id)
            jobs.append(
                {
                    "kind": "load",
                    "folder": str(folder),
                    "variant": str(variant.resolve()),
                    "twin": str(_twin(variant, fields.id, folder)),
                    "id": fields.id,
                    "twin_id": _twin_id(fields.id),
                    # Where variants differ in their ids alone, to call the same code again shows nothing new.
                    "call": code not in called,
                    "cpu": str(fields.backend.backend_type).lower() == "cpu",
                }
            )
            called.add(code)
        answers = _run(Path(scratch), jobs)
    declared = sorted({name for fields in metadata for name in fields.python_depends})
    return [
        _probed(fields.id, fields.python_depends, declared, answer)
        for fields, answer in zip(metadata, answers, strict=True)
    ]


def _run(scratch: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The kernel's code is handed no tokens, and finds no caches or overrides of this user's.
    environment = child_environment(os.environ, network=False)
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch)}
    listed, report = scratch / "jobs.json", scratch / "answers.json"
    listed.write_text(json.dumps(jobs), "utf-8")
    answers = run_isolated(worker, [str(listed), str(report)], report=report, environment=environment)
    if isinstance(answers, str):
        raise EnvironmentFault(
            f"the process that loads kernels {answers}",
            "mend this environment, in which torch and kernels must load",
        )
    return list(answers)


def _probed(id: str, depends: list[str], declared: list[str], answer: dict[str, Any]) -> Probed:
    if "crashed" in answer:
        return Probed(id, error=answer["crashed"])
    own = [op for op in answer["ops"] if op.partition("::")[0] == id]
    return Probed(
        namespace=id,
        error=answer["error"],
        file=answer["file"],
        line=answer["line"],
        unmet=_unmet(depends) or _named(declared, answer["error"]),
        public=None if answer["public"] is None else tuple(answer["public"]),
        malformed=answer["malformed"],
        absent=tuple(answer["absent"]),
        foreign_ops=tuple(sorted(set(answer["ops"]) - set(own))),
        undocumented=tuple((name, file, line) for name, file, line in answer["undocumented"]),
        untraceable=tuple(op for op in answer["untraceable"] if op in own),
        calls=_calls(answer, own),
        effects=tuple((effect, file, line) for effect, file, line in answer["effects"]),
        without_triton=answer["without_triton"],
        twin_error=_twin_error(answer, id) if answer["error"] is None else None,
    )


def _calls(answer: dict[str, Any], own: list[str]) -> tuple[OperatorCall, ...]:
    if answer["error"] is not None:
        return ()
    if answer["calls"] is None:
        why = f"calling the operators, {answer['died']}"
        return tuple(OperatorCall(op.partition("::")[2], "not run", why, "not run", why) for op in own)
    untraceable = {op.partition("::")[2] for op in answer["untraceable"]}
    return tuple(OperatorCall(op, **call) for op, call in answer["calls"].items() if op not in untraceable)


def _twin(variant: Path, id: str, folder: Path) -> Path:
    """A copy of a variant under another id, with a line more in each module, so that it is another build."""

    def copy(source: str, target: str) -> None:
        data = Path(source).read_bytes().replace(id.encode(), _twin_id(id).encode())
        Path(target).write_bytes(data + b"\n# another build\n" if target.endswith(".py") else data)

    def ignored(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if name == "__pycache__" or Path(directory, name).is_symlink()}

    return Path(shutil.copytree(variant, folder / variant.name, ignore=ignored, copy_function=copy))


def _twin_id(id: str) -> str:
    return f"{id}_again"


def _twin_error(answer: dict[str, Any], id: str) -> str | None:
    """The fault of a variant and its twin that were loaded and called in one process, if any."""
    first, second = (
        {op.partition("::")[2] for op in answer["all_ops"] if op.startswith(f"{name}::")}
        for name in (id, _twin_id(id))
    )
    if answer["twin_error"] is None and first != second:
        return f"operators of one alone: {', '.join(sorted(first ^ second))}"
    return answer["twin_error"] or answer["conflict"]


def _code(variant: Path, id: str) -> bytes:
    """A key to what a variant's modules hold, whatever its id is and wherever in it they stand."""
    digests = [
        hashlib.sha256(path.read_bytes().replace(id.encode(), b"@")).digest()
        for path in variant.rglob("*.py")
        if path.is_file()
    ]
    return b"".join(sorted(digests))


def _unmet(depends: list[str]) -> tuple[str, ...]:
    """Dependencies for want of which the loader refuses a variant here, rightly."""
    general = python_dependencies()["general"]
    return tuple(
        name
        for name in depends
        if name not in general
        or any(importlib.util.find_spec(module) is None for module in _modules(general[name]))
    )


def _named(declared: list[str], error: str | None) -> tuple[str, ...]:
    """Dependencies of any variant whose absence an error of loading one is about."""
    listed = python_dependencies()
    packages = dict(listed["general"])
    for backend in listed["backends"].values():
        packages |= backend
    missing = re.search(r"No module named '(\w+)", error or "")
    return tuple(name for name in declared if missing and missing[1] in _modules(packages.get(name, {})))


def _modules(dependency: dict[str, Any]) -> list[str]:
    return [package["import"] for package in dependency.get("python", ()) if "import" in package]
