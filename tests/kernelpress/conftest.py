"""A small kernel package to build, check and publish; it needs torch alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from kernelpress.hub.client import hub
from localhub import RunningHub, running_hub

_numbers = itertools.count()

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


@pytest.fixture(autouse=True, scope="session")
def _directories_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache and journal alone, and find nothing in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def make_kernel(tmp_path: Path) -> Callable[..., Path]:
    """Write the sample kernel into a directory of its own; keywords replace files' contents."""

    def make(where: str = "project", **changed: str | None) -> Path:
        root = tmp_path / where
        files: dict[str, str | None] = {
            "build.toml": BUILD_TOML,
            "torch-ext/demo_kernel/__init__.py": INIT,
            "torch-ext/demo_kernel/twice.py": TWICE,
            "torch-ext/demo_kernel/ops/__init__.py": "",
            "torch-ext/demo_kernel/ops/common.py": "DEFAULT = 3.0\n",
            "torch-ext/demo_kernel/ops/scale.py": SCALE,
            **changed,
        }
        for name, text in files.items():
            if text is not None:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text, "utf-8")
        return root

    return make


@pytest.fixture
def run_clean(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a process that sees neither the repository nor this process's settings."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {key: os.environ[key] for key in ("PATH", "TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
        kept |= {"HF_HOME": str(tmp_path / "hf-home"), "HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-I", "-B", "-c", code, *arguments],
            cwd=tmp_path,
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start other processes in an environment that has nothing installed."""
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "empty" / "bin" / "python"))


@pytest.fixture
def no_settings_of_the_developers_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """A Hub for all tests of a module to publish to."""
    with running_hub(tmp_path_factory.mktemp("hub"), trust=["org"]) as running:
        yield running


@pytest.fixture
def api(server: RunningHub) -> HfApi:
    return hub(server.endpoint)


@pytest.fixture
def repo() -> str:
    """A repository that no other test uses."""
    return f"org/demo-{next(_numbers)}"
