"""A small kernel package to build, check and publish; it needs torch alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from kernelpress.check.variants import check
from kernelpress.findings.model import Finding
from kernelpress.hub.client import hub
from localhub import RunningHub, running_hub
from sample_kernel import make as build_kernel
from sample_kernel import write

_numbers = itertools.count()


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
        return write(tmp_path / where, changed)

    return make


@dataclass(frozen=True)
class Checked:
    """A variant that was checked: its directory as ``check`` was told of it, and what was found in it."""

    directory: Path
    findings: list[Finding]


@pytest.fixture(scope="module")
def _checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checked]:
    """Every test's variant. They are checked as one build: a check imports torch once, and that takes longest."""
    folder = tmp_path_factory.mktemp("checked").resolve()
    tests = {}
    for item in request.session.items:
        marker = item.get_closest_marker("kernel")
        if item.path == request.path and marker is not None:
            root = write(folder / f"sources-{len(tests)}", *marker.args)
            variant = Path("build", f"torch-{len(tests)}")
            (folder / "build").mkdir(exist_ok=True)
            (build_kernel(root).directory / "torch-cpu").rename(folder / variant)
            marker.kwargs.get("spoil", lambda directory: None)(folder / variant)
            tests[item.nodeid] = variant
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # What a kernel must not see of its publisher's: modules on the path, and caches of compiled functions.
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        findings = check(Path("build"))
    assert sorted(folder.rglob("*")) == before, "a check leaves nothing behind"
    checked = {
        test: Checked(variant, [f for f in findings if (folder / f.path).is_relative_to(folder / variant)])
        for test, variant in tests.items()
    }
    assert sum(len(own.findings) for own in checked.values()) == len(findings), "each is of one variant"
    return checked


@pytest.fixture
def checked(request: pytest.FixtureRequest, _checked: dict[str, Checked]) -> Checked:
    """The sample kernel's variant for CPUs, checked after the changes to its files that the test's marker names.

    ``@pytest.mark.kernel({path: text}, spoil=function)``; ``spoil`` gets the directory that was built.
    """
    return _checked[request.node.nodeid]


@pytest.fixture
def findings(checked: Checked) -> list[Finding]:
    """What was found in it."""
    return checked.findings


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
