"""A TOML file and the tables in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from kernelpress.errors import SpecError


def read_document(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file, and what it says.

    Raises:
        FileNotFoundError: There is none.
        SpecError: It cannot be read, is not UTF-8 or no TOML; with the line where there is one.
    """
    text = read_text(path)
    try:
        return text, tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise SpecError(f"malformed TOML: {error.msg}", path=path, line=error.lineno) from None
    except RecursionError as error:
        raise SpecError(f"malformed TOML: {error}", path=path) from None


def read_text(path: Path) -> str:
    """The text of a TOML file.

    Raises:
        FileNotFoundError: There is none.
        SpecError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise SpecError(f"not UTF-8 (byte {error.start})", path=path) from None
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", path=path) from None
