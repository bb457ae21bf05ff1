"""Global state that a caller relies on to survive an import: settings of Python and PyTorch, and their attributes.

Runs in processes that have torch and the standard library alone.
"""

from __future__ import annotations

import builtins
import gc
import locale
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

# Parts of torch that a kernel may be the first to import set these for processes of their own.
_TORCHS_OWN = ("environment variable TORCHINDUCTOR_CACHE_DIR", "environment variable TRITON_CACHE_DIR")


class GlobalState(NamedTuple):
    """Settings, as text by what they are called, and attributes, by their full names.

    The attributes are kept as they are, so that another object cannot come to have the address of one of them.
    """

    settings: dict[str, str]
    attributes: dict[str, Any]


def global_state() -> GlobalState:
    """Record the global state as it is now."""
    settings = {name: str(value) for name, value in (_python() | _torch()).items()}
    settings |= {f"environment variable {name}": value for name, value in os.environ.items()}
    settings |= dict.fromkeys(map(_filter, warnings.filters), "set")
    settings |= dict(_configurations())
    return GlobalState(settings, dict(_attributes()))


def differences(before: GlobalState, after: GlobalState) -> list[str]:
    """List what has changed, each as the end of a sentence about who did it."""
    changed = [
        f"changes {name}"
        for name in sorted(before.settings.keys() | after.settings.keys())
        if before.settings.get(name) != after.settings.get(name) and name not in _TORCHS_OWN
    ]
    for name, value in before.attributes.items():
        if name not in after.attributes:
            changed.append(f"removes {name}")
        elif after.attributes[name] is not value:
            changed.append(f"replaces {name}")
    # An imported module becomes an attribute of the package that it is in.
    return changed + [
        f"adds {name}"
        for name, value in after.attributes.items()
        if name not in before.attributes and not isinstance(value, ModuleType)
    ]


def _python() -> dict[str, Any]:
    return {
        "the working directory": os.getcwd(),
        "the search path of modules": tuple(sys.path),
        "how modules are found": (sys.meta_path, sys.path_hooks),
        "the standard streams": (id(sys.stdin), id(sys.stdout), id(sys.stderr)),
        "what Python calls for exceptions and results": (id(sys.excepthook), id(sys.displayhook)),
        "Python's recursion limit": sys.getrecursionlimit(),
        "Python's random numbers": hash(random.getstate()),
        "the garbage collector": (gc.isenabled(), gc.get_threshold()),
        "the locale": locale.setlocale(locale.LC_ALL, None),
        "the handlers of signals": [
            (number, signal.getsignal(number)) for number in sorted(signal.valid_signals())
        ],
        "the threads that run": threading.active_count(),
        "how processes are started": multiprocessing.get_start_method(allow_none=True),
        "the time-out of sockets": socket.getdefaulttimeout(),
        "the root logger": (logging.getLogger().level, len(logging.getLogger().handlers)),
    }


def _torch() -> dict[str, Any]:
    import torch

    backends: Any = torch.backends
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's inference mode": torch.is_inference_mode_enabled(),
        "torch's detection of anomalies": torch.is_anomaly_enabled(),
        "torch's number of threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch's random numbers": hash(tuple(torch.get_rng_state().tolist())),
        "how torch prints tensors": torch._tensor_str.PRINT_OPTS,
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
        "TF32 in cuBLAS": backends.cuda.matmul.allow_tf32,
        "TF32 in cuDNN": backends.cudnn.allow_tf32,
        "cuDNN's benchmark mode": backends.cudnn.benchmark,
        "cuDNN's determinism": backends.cudnn.deterministic,
        "whether cuDNN is used": backends.cudnn.enabled,
        "the kinds of attention that torch chooses from": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ),
        "reduced precision in cuBLAS": (
            backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
    }


def _filter(entry: Any) -> str:
    action, message, category, module, line = entry
    patterns = [getattr(pattern, "pattern", pattern) for pattern in (message, module)]
    parts = [str(part) for part in (action, category.__name__, *patterns, line) if part]
    return f"which warnings are shown ({' '.join(parts)})"


def _configurations() -> Iterator[tuple[str, str]]:
    """Settings of torch's compilers that are not what they are by default, of those that are loaded."""
    from torch.utils._config_module import ConfigModule

    for module in list(sys.modules.values()):
        if isinstance(module, ConfigModule) and hasattr(module, "_is_default"):
            for name, entry in module._config.items():
                # What was overridden for a while, as torch.compile does, holds its default and counts as overridden.
                if not module._is_default(name) and (value := repr(getattr(module, name))) != repr(
                    entry.default
                ):
                    yield f"{module.__name__}.{name}", value


def _attributes() -> Iterator[tuple[str, Any]]:
    """The attributes that kernels are tempted to replace, by their full names."""
    import torch
    from torch.nn import functional

    owners = (
        builtins, torch, torch.nn, functional, torch.autograd, torch.library, torch.cuda, torch.utils.checkpoint,
        torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.autograd.Function,
    )  # fmt: skip
    for owner in owners:
        if isinstance(owner, ModuleType):
            prefix, attributes = owner.__name__, vars(owner)
        else:
            prefix, attributes = f"{owner.__module__}.{owner.__qualname__}", {}
            for base in reversed(owner.__mro__):
                attributes |= vars(base)
        for name, value in attributes.items():
            if not name.startswith("_") or (isinstance(owner, type) and name.endswith("__")):
                yield f"{prefix}.{name}", value
