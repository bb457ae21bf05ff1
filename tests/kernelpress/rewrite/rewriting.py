"""Helpers that the tests of the rewriter share."""

from __future__ import annotations

from pathlib import Path

from kernelpress.rewrite.rewrite import Rewritten, rewrite
from kernelpress.syntax.source_file import SourceFile

HERE = Path("torch-ext/demo")
DEFINES = 'from torch.library import define\ndefine("demo::one", "(Tensor x) -> Tensor")\n'


def rewrite_or_raise(files: list[SourceFile], package: str = "demo") -> Rewritten:
    result = rewrite(files, package, HERE)
    result.raise_errors()
    return result


def rewritten(text: str, path: str = "__init__.py", namespace: str = "NEW", package: str = "demo") -> str:
    result = rewrite_or_raise([SourceFile(path, text.encode())], package)
    return result.files[0].render(namespace).decode()


def package(**files: str) -> dict[str, str]:
    """The files of a package after a rewrite; keywords are modules' names, with `__` for a dot."""
    sources = [
        SourceFile(f"{name.replace('__', '/').replace('init', '__init__')}.py", f"{text}\n".encode())
        for name, text in files.items()
    ]
    return {file.path: file.render("NEW").decode() for file in rewrite_or_raise(sources).files}
