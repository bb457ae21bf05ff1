"""Processes that run a kernel's code: without this one's secrets, and without this project on their path.

This keeps tokens from code that looks for them in its environment, as most thieves do. It is no sandbox: such a process
still reads whatever file its user reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_NAMES = frozenset(
    (
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "TMPDIR", "TMP", "TEMP",
        "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "CC", "CXX",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_PROXY", "no_proxy",
        "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "USERPROFILE", "APPDATA", "LOCALAPPDATA",
        "PROGRAMDATA",
    )
)  # fmt: skip
# Settings of compilers, devices and libraries for numbers.
_PREFIXES = (
    "LC_", "XDG_", "TRITON_", "TORCH", "PYTORCH_", "CUDA_", "CUDNN_", "NVIDIA_", "HIP_", "HSA_", "ROCM_", "ROCR_",
    "ONEAPI_", "SYCL_", "ZE_", "ASCEND_", "NEURON_", "TPU_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_",
    "NUMEXPR_", "MALLOC_",
)  # fmt: skip
# How to get out of some networks; such an address may hold a password, so only who has to download is given it.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_SECRET = (
    "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "APIKEY", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY",
)  # fmt: skip
# Loads kernelpress's modules under a name that no kernel imports by accident, and from where they are running now.
_START = """\
import importlib, sys, types
package = sys.modules["_kernelpress"] = types.ModuleType("_kernelpress")
package.__path__ = [sys.argv[1]]
importlib.import_module(sys.argv[2]).main(*sys.argv[3:])
"""


def child_environment(environment: Mapping[str, str], *, network: bool) -> dict[str, str]:
    """The part of an environment that a process gets which loads a kernel; ``network``: it downloads it, too."""
    return {
        name: value
        for name, value in environment.items()
        if (name in _NAMES or name.startswith(_PREFIXES) or (network and name.upper() in _PROXIES))
        and not any(word in name.upper() for word in _SECRET)
    }


def lacks_torch() -> bool:
    """True if the processes that load kernels find no PyTorch."""
    code = "import sys; from importlib.util import find_spec; sys.exit(find_spec('torch') is None)"
    return subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode != 0


def run_isolated(
    module: ModuleType,
    arguments: Sequence[str],
    *,
    report: Path,
    environment: Mapping[str, str],
    timeout: float | None = None,
) -> Any:
    """Run a module's ``main`` in a Python that has the installed packages, and return what it reports.

    Args:
        module: One of kernelpress that imports the standard library, and others of kernelpress relatively.
        arguments: Passed to ``main``.
        report: The JSON file that ``main`` writes, in a directory that becomes the process's own.
        environment: All that the process gets of one.
        timeout: Seconds that it may take.

    Returns:
        The report; or why there is none, as a string.
    """
    package, _, name = module.__name__.partition(".")
    command = [sys.executable, "-I", "-B", "-c", _START]
    folder = Path(sys.modules[package].__path__[0]).resolve()
    try:
        process = subprocess.run(
            [*command, str(folder), f"_kernelpress.{name}", *arguments], cwd=report.parent, env=environment,
            capture_output=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"took longer than {timeout:.0f} s"
    if report.is_file():
        return json.loads(report.read_text("utf-8"))
    lines = process.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
    return f"ended with status {process.returncode}: {lines[-1]}"
