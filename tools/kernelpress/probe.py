"""Loads one variant as a user's process would, and reports what came of it.

Run as a script this is the other process, which has nothing but torch, the loader and the standard library.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.resources
import importlib.util
import inspect
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT = 300.0
# Parts of torch that a kernel may be the first to import set these for processes of their own.
_TORCHS_OWN = ("environment variable TORCHINDUCTOR_CACHE_DIR", "environment variable TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Probed:
    """What loading a variant showed.

    ``error`` says why it failed, with the ``file`` and ``line`` of the variant where there is one, and
    ``unmet`` the declared dependencies this machine has not. ``public`` is ``__all__``, ``absent`` those of
    its names that cannot be had, ``undocumented`` those without a docstring, ``foreign_ops`` operators that
    came into being outside ``namespace``, ``untraceable`` those in it that fake tensors cannot pass through,
    ``effects`` what importing did to its surroundings, ``without_triton`` why it fails where there is none, and
    ``twin_error`` what goes wrong beside another build of it in one process.
    """

    namespace: str
    error: str | None = None
    file: str | None = None
    line: int | None = None
    unmet: tuple[str, ...] = ()
    public: tuple[str, ...] | None = None
    absent: tuple[str, ...] = ()
    foreign_ops: tuple[str, ...] = ()
    undocumented: tuple[str, ...] = ()
    untraceable: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()
    without_triton: str | None = None
    twin_error: str | None = None


def probe(variant: Path) -> Probed:
    """Load a variant with the ``kernels`` loader in a process that sees nothing of this one's surroundings.

    Args:
        variant: A directory with metadata that the loader can parse.
    """
    from kernels._rust import Metadata  # type: ignore[import-untyped]

    metadata = Metadata.read_from_file(variant / "metadata.json")
    with tempfile.TemporaryDirectory(prefix="kernelpress-twin-") as scratch:
        answer = _run(str(variant.resolve()), str(_twin(variant, metadata.id, Path(scratch))))
    if "crashed" in answer:
        return Probed(metadata.id, error=answer["crashed"])
    foreign = {op for op in answer["ops"] if op.partition("::")[0] != metadata.id}
    if foreign:
        # Parts of torch that the kernel was the first to import bring operators of their own.
        foreign -= set(_run("", "", *answer["modules"])["ops"])
    without_triton = None
    if answer["error"] is None and answer["triton"] and str(metadata.backend.backend_type).lower() == "cpu":
        alone = _run(str(variant.resolve()), "", "--without-triton")
        without_triton = alone.get("crashed") or alone["error"]
    return Probed(
        without_triton=without_triton,
        twin_error=_together(answer, metadata.id) if answer["error"] is None else None,
        undocumented=tuple(answer["undocumented"]),
        untraceable=tuple(op for op in answer["untraceable"] if op.partition("::")[0] == metadata.id),
        effects=tuple(answer["effects"]),
        namespace=metadata.id,
        error=answer["error"],
        file=answer["file"],
        line=answer["line"],
        unmet=_unmet(metadata.python_depends),
        public=None if answer["public"] is None else tuple(answer["public"]),
        absent=tuple(answer["absent"]),
        foreign_ops=tuple(sorted(foreign)),
    )


def _twin(variant: Path, id: str, scratch: Path) -> Path:
    """A copy of a variant that differs from it in its id alone."""
    twin = scratch / variant.name
    for path in sorted(variant.rglob("*")):
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts:
            target = twin / path.relative_to(variant)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes().replace(id.encode(), _again(id).encode()))
    return twin


def _again(id: str) -> str:
    return f"{id}_again"


def _together(answer: dict[str, Any], id: str) -> str | None:
    """What went wrong when a variant and its twin were loaded in one process."""
    if answer["twin_error"] is not None:
        return str(answer["twin_error"])
    first, second = (
        {op.partition("::")[2] for op in answer["all_ops"] if op.startswith(f"{name}::")}
        for name in (id, _again(id))
    )
    return f"operators of one alone: {', '.join(sorted(first ^ second))}" if first != second else None


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

    nothing: dict[str, Any] = {"error": None, "file": None, "line": None, "public": None, "absent": []}
    nothing |= {"undocumented": [], "effects": []}
    before, printed, reached = _surroundings(), io.StringIO(), _watch_network()
    try:
        with contextlib.redirect_stdout(printed):
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
    after = _surroundings()
    effects = [
        f"changes {name}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in _TORCHS_OWN
    ]
    if printed.getvalue():
        effects.append(f"prints {printed.getvalue().strip().splitlines()[0]!r}")
    effects += [f"reaches for the network ({each})" for each in dict.fromkeys(reached)]
    public = getattr(module, "__all__", None)
    absent = [name for name in public or () if not hasattr(module, name)]
    undocumented = [
        name
        for name in public or ()
        if (inspect.isfunction(found := getattr(module, name, None)) or inspect.isclass(found))
        and not (found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__)
    ]
    return nothing | {
        "public": public and list(public), "absent": absent, "undocumented": undocumented, "effects": effects
    }  # fmt: skip


def _surroundings() -> dict[str, Any]:
    """What a caller may rely on to be the same after an import."""
    import torch

    settings = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
        "TF32 in cuBLAS": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in cuDNN": torch.backends.cudnn.allow_tf32,
        "cuDNN's benchmark mode": torch.backends.cudnn.benchmark,
        "cuDNN's determinism": torch.backends.cudnn.deterministic,
        "the root logger": (logging.getLogger().level, len(logging.getLogger().handlers)),
        "the working directory": os.getcwd(),
        "the search path of modules": tuple(sys.path),
    }
    named = {name: str(value) for name, value in settings.items()}
    return named | {f"environment variable {name}": value for name, value in os.environ.items()}


def _watch_network() -> list[str]:
    reached: list[str] = []
    sys.addaudithook(
        lambda event, arguments: (
            reached.append(event)
            if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
            else None
        )
    )
    return reached


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


def _main(report: str, variant: str, twin: str, *modules: str) -> None:
    import torch

    if modules == ("--without-triton",):
        sys.meta_path.insert(0, _NoTriton())
        modules = ()
    before, ops = set(sys.modules), set(torch._C._dispatch_get_all_op_names())
    answer = _load(Path(variant)) if variant else {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - not every module can be imported by itself
            continue
    answer["ops"] = sorted(set(torch._C._dispatch_get_all_op_names()) - ops)
    answer["untraceable"] = _untraceable(answer["ops"]) if variant else []
    answer["triton"] = "triton" in sys.modules
    answer["modules"] = sorted(
        name
        for name in set(sys.modules) - before
        if getattr(sys.modules[name], "__spec__", None) and not name.startswith("_")
    )
    answer["twin_error"] = _load(Path(twin))["error"] if twin and answer["error"] is None else None
    answer["all_ops"] = sorted(torch._C._dispatch_get_all_op_names())
    Path(report).write_text(json.dumps(answer), "utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
