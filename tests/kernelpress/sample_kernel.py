"""A kernel as tests build, check and publish it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from kernelpress.builder.build import build
from kernelpress.builder.model import Build
from kernelpress.check.kernel import check_sources
from kernelpress.findings.model import Finding
from kernelpress.spec.load import KernelOptions, load_spec

PACKAGE = "torch-ext/demo_kernel"

BUILD_TOML = """\
[general]
name = "demo-kernel"
version = 1
edition = 5
license = "MIT"
backends = ["cpu", "cuda"]

[general.hub]
repo-id = "org/demo-kernel"

[torch-noarch]
"""

INIT = '''\
"""Sample: demo_kernel::twice is an operator's name here, and torch.ops.demo_kernel.twice its use."""

from demo_kernel.ops.scale import scale
from .twice import twice

__all__ = ["label", "scale", "twice"]


def label() -> str:
    """Text that looks like an operator's name and is none."""
    return "demo_kernel::twice"
'''

TWICE = '''\
import torch
from torch.library import custom_op as operator


@operator("demo_kernel::twice", mutates_args=())
def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR


@torch.library.register_fake("demo_kernel::twice")
def _(x):
    return torch.empty_like(x)


FACTOR = 2


def twice(x: torch.Tensor) -> torch.Tensor:
    """Twice ``x``.

    The rest of the docstring.
    """
    return torch.ops.demo_kernel.twice(x)
'''

SCALE = '''\
import torch
from torch import library as lib

import demo_kernel.ops.common as common

NAMESPACE = "demo_kernel"
LIBRARY = lib.Library(NAMESPACE, "FRAGMENT")
LIBRARY.define("scale(Tensor x, float by) -> Tensor")


@lib.impl("demo_kernel::scale", "CompositeExplicitAutograd")
def _scale(x, by):
    return x * by


@lib.register_fake("demo_kernel::scale")
def _(x, by):
    return torch.empty_like(x)


def scale(x, by: float = common.DEFAULT):
    """``x`` scaled."""
    return getattr(torch.ops, "demo_kernel").scale(x, by)
'''

FILES = {
    "build.toml": BUILD_TOML,
    f"{PACKAGE}/__init__.py": INIT,
    f"{PACKAGE}/twice.py": TWICE,
    f"{PACKAGE}/ops/__init__.py": "",
    f"{PACKAGE}/ops/common.py": "DEFAULT = 3.0\n",
    f"{PACKAGE}/ops/scale.py": SCALE,
}


def write(root: Path, changed: Mapping[str, str | None]) -> Path:
    """Write the sample kernel into a directory, with other contents for some of its files, or without them."""
    for name, text in {**FILES, **changed}.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, "utf-8")
    return root


def changed(file: str, *changes: tuple[str, str]) -> dict[str, str]:
    """One of its files with some of its text replaced, by its path."""
    path = f"{PACKAGE}/{file}"
    text = FILES[path]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return {path: text}


def make(root: Path) -> Build:
    return build(load_spec(root))


def source_findings(root: Path) -> list[Finding]:
    """The findings in the description and the sources of a kernel."""
    return check_sources(KernelOptions(root))[0]


def edit(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))


def heads(api: HfApi, repo: str) -> dict[str, str]:
    return {
        branch.name: branch.target_commit for branch in api.list_repo_refs(repo, repo_type="kernel").branches
    }


def files(api: HfApi, repo: str, revision: str) -> set[str]:
    tree = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type="kernel")
    return {entry.path for entry in tree if isinstance(entry, RepoFile)}


def content(api: HfApi, repo: str, path: str, revision: str, where: Path) -> str:
    return Path(
        api.hf_hub_download(repo, path, repo_type="kernel", revision=revision, local_dir=where / revision)
    ).read_text()


def commits(api: HfApi, repo: str, branch: str) -> int:
    return len(api.list_repo_commits(repo, repo_type="kernel", revision=branch))
