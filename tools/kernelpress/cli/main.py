"""The command line: reads arguments, calls a step, prints what it returns."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress.cli import localhub, publish, versions
from kernelpress.cli.options import Directory, License, console, kernel_options, say
from kernelpress.errors import KernelpressError
from kernelpress.findings.format import Form

if TYPE_CHECKING:
    from kernelpress.spec.load import KernelOptions

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


Output = Annotated[Form, typer.Option(help="How to print what is found.")]


@app.command()
@kernel_options
def build(
    options: KernelOptions,
    verify: Annotated[
        bool, typer.Option("--verify", help="Build twice more, elsewhere and otherwise, and compare.")
    ] = False,
) -> None:
    """Build every variant of a kernel into build/."""
    from kernelpress.builder.build import build
    from kernelpress.lint.sources import optional_packages

    kernel = build(options.load())
    table = Table("variant", "id", "files", box=None, pad_edge=False)
    for variant in kernel.variants:
        table.add_row(variant.name, variant.id, str(len(variant.files)))
    out = console()
    out.print(table)
    optional = optional_packages(kernel.outside, kernel.spec)
    if optional:
        out.print(
            f"optional: {', '.join(optional)} (imported in functions, or where they are)", soft_wrap=True
        )
    if verify:
        from kernelpress.builder.reproduce import reproduce

        reproduce(kernel)
        out.print("[green]reproduced[/] in two other places, byte for byte")
    out.print(
        f"[green]built[/] {escape(str(kernel.directory))}  tree {kernel.tree_hash[:16]}", soft_wrap=True
    )


@app.command()
@kernel_options
def check(
    options: KernelOptions,
    output: Output = "text",
) -> None:
    """Check the sources and the build in build/: imports, operators, metadata, digests, loading and more."""
    from kernelpress.check.kernel import check_kernel
    from kernelpress.findings.format import render, summary

    findings = check_kernel(options, say)
    out = console()
    if output != "text" or findings:
        out.print(render(findings, output), soft_wrap=True, markup=output == "text")
    errors = any(finding.severity == "error" for finding in findings)
    if output == "text":
        out.print(f"[{'red' if errors else 'yellow'}]{summary(findings)}[/]" if findings else _WHOLE)
    if errors:
        raise typer.Exit(1)


@app.command("compile")
@kernel_options
def compile_ahead(
    options: KernelOptions,
    target: Annotated[
        list[str] | None, typer.Option(help="Only this architecture, such as sm_90; may be repeated.")
    ] = None,
    output: Output = "text",
) -> None:
    """Compile the Triton kernels that have COMPILE_SPECS ahead of time, without a GPU, and print what each needs."""
    from kernelpress.compile.aot import compile_package, findings, table
    from kernelpress.findings.format import render

    spec = options.load()
    results = list(compile_package(spec.package_dir, target or ()))
    print(table(results) if output == "text" else render(findings(results, spec.package_dir), output))
    if any(result.error is not None for result in results):
        raise typer.Exit(1)


@app.command()
def explain(code: Annotated[str, typer.Argument(help="A rule's code, such as KP103.")]) -> None:
    """Say what a rule demands, why, and how to meet it."""
    from kernelpress.findings.rules import explain

    rule = explain(code)
    out = console()
    out.print(f"[bold]{rule.code}[/] ({rule.severity}): {escape(rule.title)}\n")
    out.print(escape(rule.why) + "\n")
    out.print(escape(rule.fix))


@app.command()
@kernel_options
def api(
    options: KernelOptions,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|REPO@vN", help="A build, a variant, or a version on the Hub; default: build/."
        ),
    ] = None,
) -> None:
    """Compare what __all__ holds with a published build: what breaks, and what is added."""
    from kernelpress.api.baseline import read_variant
    from kernelpress.api.compare import compare
    from kernelpress.builder.build import prepare
    from kernelpress.hub.published import published_files

    kernel = prepare(options.load())
    baseline = read_variant(options.directory / "build") if against is None else published_files(against)
    changes = compare(baseline, {file.path: file.data for file in kernel.variants[0].files})
    out = console()
    for change in changes:
        where = f" ({change.path}:{change.line})" if change.path else ""
        colour = "red" if change.effect == "breaks" else "green"
        out.print(f"[{colour}]{change.effect}[/] {escape(str(change) + where)}", soft_wrap=True)
    if any(change.effect == "breaks" for change in changes):
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
    from kernelpress.spec.migrate import migrate

    spec = migrate(directory, license)
    out = console()
    if spec is None:
        out.print("nothing to do: this is today's edition")
        return
    out.print(f"[green]migrated[/] {escape(str(directory / 'build.toml'))}")
    if not spec.package_dir.is_dir():
        out.print(f"the package belongs into torch-ext/{spec.python_name}; move it there")


@app.command()
@kernel_options
def export(
    options: KernelOptions,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    directory: Annotated[Path, typer.Option(help="The directory that holds build.toml.")] = Path(),
) -> None:
    """Write the kernel as a project for huggingface/kernels' kernel-builder."""
    from kernelpress.project.export import export

    project = export(options.load(), out)
    console().print(f"[green]exported[/] {escape(str(project))}", soft_wrap=True)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The kernel's name: lowercase letters, digits and dashes.")],
    organization: Annotated[str, typer.Option("--org", help="Whose repository it will be.")] = "my-org",
) -> None:
    """Start a Triton kernel project that builds, passes its checks and its tests."""
    from kernelpress.project.init import scaffold

    project = scaffold(name, organization, Path(name))
    out = console()
    out.print(f"[green]made[/] {escape(str(project))}")
    out.print(
        f"next: cd {escape(str(project))} && kernelpress build && kernelpress check && python -m pytest"
    )
    out.print("check and the tests need: pip install torch numpy pytest")


for part in (publish, versions, localhub):
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
