"""The command line: reads arguments, calls a step, prints what it returns."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress import cli_hub, cli_localhub, cli_publish
from kernelpress.cli_shared import Directory, console
from kernelpress.errors import KernelpressError, SpecError
from kernelpress.output import Form
from kernelpress.spec import Spec

# What Typer ends with after Ctrl-C, without a word.
_INTERRUPTED = 130
_WHOLE = "[green]the build loads and is whole[/]"

# Each command imports its step when it runs: a build must not wait for the Hub's client, nor for torch.

app = typer.Typer(
    help="Build, check and publish Python/Triton kernels on the Hugging Face Kernel Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        print(f"kernelpress {installed_version('kernelpress')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


SourceDir = Annotated[
    Path | None, typer.Option(help="A package anywhere, instead of build.toml's under torch-ext/.")
]
Package = Annotated[str | None, typer.Option(help="That package's dotted name, as Python imports it.")]
Name = Annotated[str | None, typer.Option(help="The kernel's name on the Hub; default: the package's.")]
License = Annotated[str | None, typer.Option(help="SPDX identifier; default: what the project says.")]
Include = Annotated[
    list[str] | None,
    typer.Option(help="A file or directory of the project that ships too; may be given several times."),
]
Output = Annotated[Form, typer.Option(help="How to print what is found.")]


@app.command()
def build(
    directory: Directory = Path(),
    source_dir: SourceDir = None,
    package: Package = None,
    name: Name = None,
    license: License = None,
    include: Include = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Build twice more, elsewhere and otherwise, and compare.")
    ] = False,
) -> None:
    """Build every variant of a kernel into build/."""
    from kernelpress.source_rules import optional_packages
    from kernelpress.variant import build as make

    spec = _spec(directory, source_dir, package, name, license, include)
    made = make(spec)
    table = Table("variant", "id", "files", box=None, pad_edge=False)
    for variant in made.variants:
        table.add_row(variant.name, variant.id, str(len(variant.files)))
    out = console()
    out.print(table)
    optional = optional_packages(made.outside, spec)
    if optional:
        out.print(
            f"optional: {', '.join(optional)} (imported in functions, or where they are)", soft_wrap=True
        )
    if verify:
        from kernelpress.reproduce import reproduce

        reproduce(made)
        out.print("[green]reproduced[/] in two other places, byte for byte")
    out.print(f"[green]built[/] {escape(str(made.directory))}  tree {made.tree_hash[:16]}", soft_wrap=True)


@app.command()
def check(
    directory: Directory = Path(),
    source_dir: SourceDir = None,
    package: Package = None,
    name: Name = None,
    license: License = None,
    include: Include = None,
    output: Output = "text",
) -> None:
    """Check the sources and the build in build/: imports, operators, metadata, digests, loading and more."""
    from kernelpress.built import check_built
    from kernelpress.check import check as examine
    from kernelpress.output import render, summary
    from kernelpress.source_rules import as_finding, check_sources

    found = []
    spec = None
    if source_dir is not None or any(
        (directory / each).exists() for each in ("build.toml", "pyproject.toml")
    ):
        try:
            spec = _spec(directory, source_dir, package, name, license, include)
            found += check_sources(spec)
        except KernelpressError as error:
            found.append(as_finding(error))
    # Sources that cannot be built may leave no build behind; then what is found in them is the answer.
    if (directory / "build").is_dir() or not any(each.severity == "error" for each in found):
        build_dir = directory / "build"
        found += examine(build_dir) if spec is None else check_built(spec, build_dir)
    out = console()
    if output != "text" or found:
        out.print(render(found, output), soft_wrap=True, markup=output == "text")
    errors = any(each.severity == "error" for each in found)
    if output == "text":
        out.print(f"[{'red' if errors else 'yellow'}]{summary(found)}[/]" if found else _WHOLE)
    if errors:
        raise typer.Exit(1)


@app.command("compile")
def compile_ahead(
    directory: Directory = Path(),
    source_dir: SourceDir = None,
    package: Package = None,
    name: Name = None,
    license: License = None,
    include: Include = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Only this architecture, such as sm_90; may be repeated.")
    ] = None,
    output: Output = "text",
) -> None:
    """Compile the Triton kernels that have COMPILE_SPECS ahead of time, without a GPU, and print what each needs."""
    from kernelpress.aot import compile_package, findings, table
    from kernelpress.output import render

    spec = _spec(directory, source_dir, package, name, license, include)
    results = list(compile_package(spec.package_dir, target or ()))
    print(table(results) if output == "text" else render(findings(results, spec.package_dir), output))
    if any(result.error is not None for result in results):
        raise typer.Exit(1)


@app.command()
def explain(code: Annotated[str, typer.Argument(help="A rule's code, such as KP103.")]) -> None:
    """Say what a rule demands, why, and how to meet it."""
    from kernelpress.rules import explain as look_up

    rule = look_up(code)
    out = console()
    out.print(f"[bold]{rule.code}[/] ({rule.severity}): {escape(rule.title)}\n")
    out.print(escape(rule.why) + "\n")
    out.print(escape(rule.fix))


@app.command()
def api(
    directory: Directory = Path(),
    source_dir: SourceDir = None,
    package: Package = None,
    name: Name = None,
    license: License = None,
    include: Include = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|REPO@vN", help="A build, a variant, or a version on the Hub; default: build/."
        ),
    ] = None,
) -> None:
    """Compare what __all__ holds with a published build: what breaks, and what is added."""
    from kernelpress.contract import compare
    from kernelpress.published import published_files, read_variant
    from kernelpress.variant import prepare

    made = prepare(_spec(directory, source_dir, package, name, license, include))
    old = read_variant(directory / "build") if against is None else published_files(against)
    changes = compare(old, {file.path: file.data for file in made.variants[0].files})
    out = console()
    for each in changes:
        where = f" ({each.path}:{each.line})" if each.path else ""
        colour = "red" if each.effect == "breaks" else "green"
        out.print(f"[{colour}]{each.effect}[/] {escape(str(each) + where)}", soft_wrap=True)
    if any(each.effect == "breaks" for each in changes):
        out.print("these break a caller: publish them as a new version (`version` in build.toml)")
        raise typer.Exit(1)
    out.print(
        "additions alone: a kernel of Python sources keeps its version"
        if changes
        else "[green]the public API is the same[/]"
    )


@app.command()
def migrate(directory: Directory = Path(), license: License = None) -> None:
    """Bring an older build.toml to today's edition, with its comments kept."""
    from kernelpress.migrate import migrate as bring

    spec = bring(directory, license)
    out = console()
    if spec is None:
        out.print("nothing to do: this is today's edition")
        return
    out.print(f"[green]migrated[/] {escape(str(directory / 'build.toml'))}")
    if not spec.package_dir.is_dir():
        out.print(f"the package belongs into torch-ext/{spec.python_name}; move it there")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    directory: Annotated[Path, typer.Option(help="The directory that holds build.toml.")] = Path(),
    source_dir: SourceDir = None,
    package: Package = None,
    name: Name = None,
    license: License = None,
    include: Include = None,
) -> None:
    """Write the kernel as a project for huggingface/kernels' kernel-builder."""
    from kernelpress.export import export as write

    written = write(_spec(directory, source_dir, package, name, license, include), out)
    console().print(f"[green]exported[/] {escape(str(written))}", soft_wrap=True)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The kernel's name: lowercase letters, digits and dashes.")],
    organization: Annotated[str, typer.Option("--org", help="Whose repository it will be.")] = "my-org",
) -> None:
    """Start a Triton kernel project that builds, passes its checks and its tests."""
    from kernelpress.scaffold import scaffold

    made = scaffold(name, organization, Path(name))
    out = console()
    out.print(f"[green]made[/] {escape(str(made))}")
    out.print(f"next: cd {escape(str(made))} && kernelpress build && kernelpress check && python -m pytest")


def _spec(
    directory: Path,
    source_dir: Path | None,
    package: str | None,
    name: str | None,
    license: str | None,
    include: list[str] | None,
) -> Spec:
    from kernelpress.project import load_project
    from kernelpress.spec import load_spec

    given = {"--source-dir": source_dir, "--package": package, "--name": name, "--license": license}
    if source_dir is None and package is None:
        for option, value in {**given, "--include": include}.items():
            if value:
                raise SpecError(f"{option} goes with --source-dir and --package; give these too")
        return load_spec(directory)
    return load_project(
        directory, source_dir=source_dir, package=package, name=name, license=license, include=include or ()
    )


for part in (cli_publish, cli_hub, cli_localhub):
    app.add_typer(part.commands)


def main() -> None:
    """Entry point: one message and a non-zero status for whatever the user can mend."""
    try:
        app(standalone_mode=True)
    except KernelpressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            print("error: interrupted; run the same command again to finish", file=sys.stderr)
        raise
