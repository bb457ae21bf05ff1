"""What a process that runs a kernel's code is given of this one's environment: what it needs, and no secrets.

This keeps tokens from code that looks for them in its environment, as most thieves do. It is no sandbox: such a process
still reads whatever file its user reads.
"""

from __future__ import annotations

from collections.abc import Mapping

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
_PROXIES = frozenset(
    name for each in ("http_proxy", "https_proxy", "all_proxy") for name in (each, each.upper())
)
_SECRET = (
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "CREDENTIAL",
    "APIKEY",
    "API_KEY",
    "ACCESS_KEY",
    "PRIVATE_KEY",
)


def child_environment(environment: Mapping[str, str], *, network: bool) -> dict[str, str]:
    """The part of an environment that a process gets which loads a kernel; ``network``: it downloads it, too."""
    return {
        name: value
        for name, value in environment.items()
        if (name in _NAMES or name.startswith(_PREFIXES) or (network and name in _PROXIES))
        and not any(word in name.upper() for word in _SECRET)
    }
