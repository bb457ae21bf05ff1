"""Triton's interpreter, with its language prepared once a launch.

By itself it searches all of ``triton.language`` for what to replace not only then but at every call of a device
function, in every program of a grid.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# The two names under which kernels, and the device functions of Triton itself, know the language.
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
prepare = interpreter._patch_lang


def call(function: interpreter.InterpretedFunction, *arguments: Any, **options: Any) -> Any:
    """Call a device function in a program whose launch has prepared the language."""
    return function.rewrite()(*arguments, **options)


def install() -> None:
    interpreter._patch_lang = lambda kernel: prepare(LANGUAGE)
    interpreter.InterpretedFunction.__call__ = call
