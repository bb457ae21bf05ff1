"""Loads one variant as a user's process would, and reports what came of it.

Run as a script this is the other process, which has nothing but torch, the loader and the standard library.
"""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT = 300.0


@dataclass(frozen=True)
class Probed:
    """What loading a variant showed.

    ``error`` says why it failed, with the ``file`` and ``line`` of the variant where there is one, and
    ``unmet`` the declared dependencies this machine has not. ``public`` is ``__all__``, ``absent`` those of
    its names that cannot be had, ``foreign_ops`` operators that came into being outside ``namespace``.
    """

    namespace: str
    error: str | None = None
    file: str | None = None
    line: int | None = None
    unmet: tuple[str, ...] = ()
    public: tuple[str, ...] | None = None
    absent: tuple[str, ...] = ()
    foreign_ops: tuple[str, ...] = ()


def probe(variant: Path) -> Probed:
    """Load a variant with the ``kernels`` loader in a process that sees nothing of this one's surroundings.

    Args:
        variant: A directory with metadata that the loader can parse.
    """
    from kernels._rust import Metadata  # type: ignore[import-untyped]

    metadata = Metadata.read_from_file(variant / "metadata.json")
    answer = _run(str(variant.resolve()))
    if "crashed" in answer:
        return Probed(metadata.id, error=answer["crashed"])
    foreign = {op for op in answer["ops"] if op.partition("::")[0] != metadata.id}
    if foreign:
        # Parts of torch that the kernel was the first to import bring operators of their own.
        foreign -= set(_run("", *answer["modules"])["ops"])
    return Probed(
        namespace=metadata.id,
        error=answer["error"],
        file=answer["file"],
        line=answer["line"],
        unmet=_unmet(metadata.python_depends),
        public=None if answer["public"] is None else tuple(answer["public"]),
        absent=tuple(answer["absent"]),
        foreign_ops=tuple(sorted(foreign)),
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


def _run(*arguments: str) -> dict[str, Any]:
    # The kernel's code is handed no tokens, and finds no caches or overrides of this user's.
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "HF_", "HUGGING", "LOCAL_KERNELS", "KERNELS_"))
    }
    with tempfile.TemporaryDirectory(prefix="kernelpress-probe-") as scratch:
        report = Path(scratch, "report.json")
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch}
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-B", __file__, str(report), *arguments],
                cwd=scratch, env=environment, capture_output=True, timeout=_TIMEOUT, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"crashed": f"not done after {_TIMEOUT:.0f} s"}
        if not report.is_file():
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            last = said[-1] if said else "no message"
            return {"crashed": f"the process ended with status {done.returncode}: {last}"}
        answer: dict[str, Any] = json.loads(report.read_text("utf-8"))
        return answer


def _load(variant: Path) -> dict[str, Any]:
    from kernels import get_local_kernel  # type: ignore[import-untyped]

    try:
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
        return {
            "error": f"{type(error).__name__}: {error}",
            "file": at[0],
            "line": at[1],
            "public": None,
            "absent": [],
        }
    public = getattr(module, "__all__", None)
    absent = [name for name in public or () if not hasattr(module, name)]
    return {"error": None, "file": None, "line": None, "public": public and list(public), "absent": absent}


def _main(report: str, variant: str, *modules: str) -> None:
    import torch

    before, ops = set(sys.modules), set(torch._C._dispatch_get_all_op_names())
    answer = _load(Path(variant)) if variant else {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - not every module can be imported by itself
            continue
    answer["ops"] = sorted(set(torch._C._dispatch_get_all_op_names()) - ops)
    answer["modules"] = sorted(
        name
        for name in set(sys.modules) - before
        if getattr(sys.modules[name], "__spec__", None) and not name.startswith("_")
    )
    Path(report).write_text(json.dumps(answer), "utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
