"""Loads variants as a user's process would, and reports what came of it; `inside` is the other process."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kernelpress.child import child_environment


@dataclass(frozen=True)
class Called:
    """What came of calling an operator with made-up arguments; see ``opcalls.examine``."""

    op: str
    fake: Literal["ran", "failed", "not run"]
    fake_why: str
    real: Literal["ran", "not run"]
    real_why: str
    differs: str
    file: str | None
    line: int | None


@dataclass(frozen=True)
class Probed:
    """What loading a variant showed.

    ``error`` says why it failed, with the ``file`` and ``line`` of the variant where there is one, and
    ``unmet`` the declared dependencies this machine has not. ``public`` is ``__all__``, or ``malformed`` what that is
    instead of a list of names, ``absent`` those of its names that cannot be had, ``undocumented`` those without a
    docstring (name, file and line), ``foreign_ops`` operators that came into being outside ``namespace``,
    ``untraceable`` those in it without an implementation for fake tensors, ``calls`` what came of calling each of the
    others (in the first of the variants that hold the same code), ``effects`` what importing did to its surroundings,
    ``without_triton`` why it fails where there is none, and ``twin_error`` what goes wrong beside another build of it
    in one process.
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
    calls: tuple[Called, ...] = ()
    effects: tuple[str, ...] = ()
    without_triton: str | None = None
    twin_error: str | None = None


def probe(variants: Sequence[Path]) -> list[Probed]:
    """Load variants with the ``kernels`` loader, each in a process that sees nothing of this one's surroundings.

    Args:
        variants: Directories with metadata that the loader can parse.
    """
    from kernels._rust import Metadata  # type: ignore[import-untyped]

    metadata = [Metadata.read_from_file(variant / "metadata.json") for variant in variants]
    with tempfile.TemporaryDirectory(prefix="kernelpress-probe-") as scratch:
        jobs = []
        called: set[bytes] = set()
        for number, (variant, each) in enumerate(zip(variants, metadata, strict=True)):
            folder = Path(scratch, str(number))
            jobs.append(
                {
                    "folder": str(folder),
                    "variant": str(variant.resolve()),
                    "twin": str(_twin(variant, each.id, folder)),
                    "id": each.id,
                    "twin_id": _again(each.id),
                    # Where variants differ in their ids alone, to call the same code again shows nothing new.
                    "call": (code := _code(variant, each.id)) not in called,
                    "cpu": str(each.backend.backend_type).lower() == "cpu",
                }
            )
            called.add(code)
        answers = _run(Path(scratch), jobs)
    return [
        _probed(each.id, each.python_depends, answer) for each, answer in zip(metadata, answers, strict=True)
    ]


def _probed(id: str, depends: list[str], answer: dict[str, Any]) -> Probed:
    if "crashed" in answer:
        return Probed(id, error=answer["crashed"])
    foreign = {op for op in answer["ops"] if op.partition("::")[0] != id}
    # Parts of torch that the kernel was the first to import bring operators of their own.
    foreign -= set(answer["brought_along"])
    return Probed(
        namespace=id,
        error=answer["error"],
        file=answer["file"],
        line=answer["line"],
        unmet=_unmet(depends),
        public=None if answer["public"] is None else tuple(answer["public"]),
        malformed=answer["malformed"],
        absent=tuple(answer["absent"]),
        foreign_ops=tuple(sorted(foreign)),
        undocumented=tuple((name, file, line) for name, file, line in answer["undocumented"]),
        untraceable=tuple(op for op in answer["untraceable"] if op.partition("::")[0] == id),
        calls=_calls(answer, id),
        effects=tuple(answer["effects"]),
        without_triton=answer["without_triton"],
        twin_error=_together(answer, id) if answer["error"] is None else None,
    )


def _twin(variant: Path, id: str, folder: Path) -> Path:
    """A copy of a variant under another id, with a line more in each module, so that it is another build."""
    twin = folder / variant.name
    twin.mkdir(parents=True)
    for path in sorted(variant.rglob("*")):
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts:
            target = twin / path.relative_to(variant)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes().replace(id.encode(), _again(id).encode())
            target.write_bytes(data + b"\n# another build\n" if path.suffix == ".py" else data)
    return twin


def _code(variant: Path, id: str) -> bytes:
    """Stands for what a variant's modules hold, whatever its id is and wherever in it they stand."""
    held = [
        hashlib.sha256(path.read_bytes().replace(id.encode(), b"@")).digest()
        for path in variant.rglob("*.py")
        if path.is_file()
    ]
    return b"".join(sorted(held))


def _again(id: str) -> str:
    return f"{id}_again"


def _together(answer: dict[str, Any], id: str) -> str | None:
    """What went wrong when a variant and its twin were loaded and called in one process."""
    if answer["twin_error"] is not None:
        return str(answer["twin_error"])
    first, second = (
        {op.partition("::")[2] for op in answer["all_ops"] if op.startswith(f"{name}::")}
        for name in (id, _again(id))
    )
    if first != second:
        return f"operators of one alone: {', '.join(sorted(first ^ second))}"
    return None if answer["mixed"] is None else str(answer["mixed"])


def _calls(answer: dict[str, Any], id: str) -> tuple[Called, ...]:
    untraceable = {op.partition("::")[2] for op in answer["untraceable"]}
    if answer["error"] is not None:
        return ()
    if answer["calls"] is None:
        ops = [op.partition("::")[2] for op in answer["ops"] if op.startswith(f"{id}::")]
        why = f"calling the operators, {answer['died']}"
        return tuple(
            Called(op, "not run", why, "not run", why, "", None, None) for op in ops if answer["died"]
        )
    return tuple(
        Called(op, **{key: value for key, value in found.items() if key != "arguments"})
        for op, found in answer["calls"].items()
        if op not in untraceable
    )


def _unmet(depends: list[str]) -> tuple[str, ...]:
    """Dependencies for want of which the loader refuses a variant here, rightly."""
    listed = json.loads((importlib.resources.files("kernels") / "python_depends.json").read_text("utf-8"))
    unmet = []
    for name in depends:
        packages = listed["general"].get(name, {}).get("python")
        if packages is None or any(
            "import" in package and importlib.util.find_spec(package["import"]) is None
            for package in packages
        ):
            unmet.append(name)
    return tuple(unmet)


def _run(scratch: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The kernel's code is handed no tokens, and finds no caches or overrides of this user's.
    environment = child_environment(os.environ, network=False)
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch)}
    listed = scratch / "jobs.json"
    listed.write_text(json.dumps(jobs), "utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "-B", str(Path(__file__).with_name("inside.py")), str(listed)],
        cwd=scratch, env=environment, capture_output=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    answers = scratch / "answers.json"
    if answers.is_file():
        read: list[dict[str, Any]] = json.loads(answers.read_text("utf-8"))
        return read
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    last = said[-1] if said else "no message"
    return [{"crashed": f"the process that loads kernels ended with status {done.returncode}: {last}"}] * len(
        jobs
    )
