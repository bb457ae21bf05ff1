"""A new kernel project that builds, passes its checks and its own tests."""

from __future__ import annotations

import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from kernelpress.errors import BuildError, SpecError
from kernelpress.spec import load_spec
from kernelpress.spec_model import is_repo_id

_PACKAGE = "torch-ext/@PACKAGE@"
# What a project's file is made from; `@NAME@`, `@PACKAGE@` and `@ORG@` in either are filled in.
_FILES = {
    "build.toml": "build.toml",
    "flake.nix": "flake.nix",
    "CARD.md": "CARD.md",
    ".gitignore": "gitignore",
    f"{_PACKAGE}/__init__.py": "package_init.py",
    f"{_PACKAGE}/swiglu.py": "swiglu.py",
    f"{_PACKAGE}/kernels.py": "kernels.py",
    "tests/test_swiglu.py": "test_swiglu.py",
    "benchmarks/benchmark.py": "benchmark.py",
    ".github/workflows/kernel.yml": "workflow.yml",
}


def scaffold(name: str, organization: str, where: Path) -> Path:
    """Write a project: a Triton kernel with a path for the CPU, tests, a benchmark, a card and a workflow.

    Args:
        name: The kernel's name.
        organization: Whose repository it will be.
        where: A directory that is not there yet.

    Raises:
        SpecError: The name or the organization is none.
        BuildError: The directory is there, or cannot be written; nothing is left half-written.
    """
    if not is_repo_id(f"{organization}/{name}"):
        raise SpecError(f"'{organization}/{name}' is no repository id; correct the name or --org")
    if where.exists():
        raise BuildError("this is there already; name a new kernel or move it", path=where)
    filled = {"@NAME@": name, "@PACKAGE@": name.replace("-", "_"), "@ORG@": organization}
    templates = files("kernelpress") / "templates" / "init"
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f".{where.name}.tmp-", dir=where.absolute().parent))
        try:
            for target, template in _FILES.items():
                text = _fill((templates / f"{template}.tmpl").read_text("utf-8"), filled)
                path = fresh / _fill(target, filled)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, "utf-8")
            try:
                load_spec(fresh)  # refuses a name that the loader would
            except SpecError as error:
                # The file it names is gone with the message.
                raise SpecError(error.message) from None
            fresh.chmod(0o755)
            fresh.rename(where)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"cannot be written: {error.strerror}", path=error.filename or where) from error
    return where


def _fill(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(key, value)
    return text
