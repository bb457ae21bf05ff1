"""The command ``kernelpress`` in this process: to start Python and to import what it needs takes seconds."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from kernelpress.cli.main import main


def kernelpress(*arguments: str, cwd: Path | None = None, **environment: str) -> CompletedProcess[str]:
    """Run the command; its status and what it printed, as of a process of its own.

    Not for what the Hub's client reads from the environment when it is imported, as HF_ENDPOINT.
    """
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kernelpress", *arguments])
        for name, value in {"COLUMNS": "200", **environment}.items():
            patch.setenv(name, value)
        if cwd is not None:
            patch.chdir(cwd)
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                main()
            except SystemExit as ended:
                status = int(ended.code or 0)
    return CompletedProcess(list(arguments), status, stdout.getvalue(), stderr.getvalue())
