"""What the command-line modules have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory that holds build.toml.")]


def console() -> Console:
    """Standard output, without colours guessed from what is printed."""
    return Console(highlight=False)
