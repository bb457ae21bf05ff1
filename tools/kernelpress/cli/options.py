"""Options that commands share, and how they print."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

# Exit status.
NOTHING_TO_DO = 3

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory that holds build.toml.")]
License = Annotated[str | None, typer.Option(help="SPDX identifier; default: what the project says.")]
Endpoint = Annotated[str | None, typer.Option(help="The Hub's address; default: HF_ENDPOINT.")]
OutputJson = Annotated[bool, typer.Option("--output-json", help="Print JSON, and nothing else.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]


def console() -> Console:
    """Standard output, without colours guessed from what is printed."""
    return Console(highlight=False)


def say(text: str) -> None:
    """Print a line about what is under way; standard output is for the result alone."""
    print(text, file=sys.stderr)


def kernel_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that describe a kernel; it gets them as one argument, ``options``.

    A parameter of the command's own under the name of one of them takes that one's place.
    """

    @functools.wraps(command)
    def run(**values: Any) -> None:
        from kernelpress.spec.load import KernelOptions

        described = {name: values.pop(name) for name in _KERNEL}
        described["include"] = tuple(described["include"] or ())
        command(options=KernelOptions(**described), **values)

    # Its type is known to type checkers alone: a command imports the step that it runs when it runs.
    del command.__annotations__["options"]
    own = dict(inspect.signature(command, eval_str=True).parameters)
    del own["options"]
    required = inspect.Parameter.empty
    parameters = sorted({**_KERNEL, **own}.values(), key=lambda parameter: parameter.default is not required)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run


def _describe_kernel(
    directory: Directory = Path(),
    source_dir: Annotated[
        Path | None, typer.Option(help="A package anywhere, instead of build.toml's under torch-ext/.")
    ] = None,
    package: Annotated[
        str | None, typer.Option(help="That package's dotted name, as Python imports it.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The kernel's name on the Hub; default: the package's.")
    ] = None,
    license: License = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="A file or directory of the project that ships too; may be given several times."),
    ] = None,
) -> None: ...


_KERNEL = dict(inspect.signature(_describe_kernel, eval_str=True).parameters)
