"""The card, a kernel's README.md on the Hub: rendered from CARD.md and the package's own docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import dedent

import griffe
import jinja2

from kernelpress.api.public_api import definition, load_api, public_names
from kernelpress.builder.generated import own_version
from kernelpress.builder.model import Build
from kernelpress.errors import SourceError

_DEFAULT = "card.md"
_LAYERS = "layers"
_ROLE = re.compile(r":[a-zA-Z][\w+-]*(?::[\w+-]+)*:`([^`]+)`")
_LINK = re.compile(r"(?<!`)`([^`<>]+?)\s*<([a-z]+://[^`<>\s]+)>`__?")


@dataclass(frozen=True)
class PublicName:
    """A name in the package's ``__all__``; ``signature`` and ``summary`` are empty unless it is a function or class."""

    name: str
    signature: str
    summary: str

    def __str__(self) -> str:
        """The name, which is all that upstream's templates know of a function."""
        return self.name


def render_card(build: Build, repo_id: str) -> str:
    """Render the card of a build.

    It does not name the commit, so that a new commit alone changes nothing of what is published.

    Raises:
        SourceError: CARD.md is no valid template, or asks for a variable that there is not.
    """
    spec = build.spec
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kernelpress"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, by the kernel's own author
    )
    path = spec.root / "CARD.md"
    try:
        text = build.source.card
        functions, layers = describe({file.path: file.data for file in build.variants[0].files})
        template = environment.get_template(_DEFAULT) if text is None else environment.from_string(text)
        return template.render(
            name=spec.name,
            python_name=spec.python_name,
            repo_id=repo_id,
            version=spec.version,
            license=spec.license,
            backends=[backend.name for backend in spec.backends],
            python_depends=list(spec.python_depends),
            upstream=spec.upstream,
            source=spec.source,
            functions=functions,
            layers=layers,
            has_benchmark=(spec.root / "benchmarks" / "benchmark.py").is_file(),
            benchmarks=[
                path.relative_to(spec.root).as_posix()
                for path in sorted(spec.root.glob("benchmarks/benchmark*.py"))
            ],
            built_with=f"kernelpress {own_version()}",
            variants=[{"name": variant.name, "id": variant.id} for variant in build.variants],
            content_hash=build.content_hash,
            tree_hash=build.tree_hash,
            dirty=build.source.git is not None and build.source.git.dirty,
        )
    except jinja2.TemplateSyntaxError as error:
        raise SourceError(f"no valid template: {error.message}", path=path, line=error.lineno) from None
    except jinja2.TemplateError as error:
        raise SourceError(f"the card cannot be rendered: {error.message}", path=path) from None


def describe(files: Mapping[str, bytes]) -> tuple[list[PublicName], list[PublicName]]:
    """Describe a variant's public names, and the classes in its layers.

    By upstream's convention a public module ``layers`` holds classes that replace a model's own.

    Args:
        files: The variant's files by their paths in it.
    """
    package = load_api(files)
    functions = {name: definition(package, name) for name in public_names(package)}
    module = functions.pop(_LAYERS, None)
    members = module.members if isinstance(module, griffe.Module) else {}
    layers = {name: member for name, member in members.items() if isinstance(member, griffe.Class)}
    return [_describe(*item) for item in functions.items()], [_describe(*item) for item in layers.items()]


def _describe(name: str, member: griffe.Object | None) -> PublicName:
    if not isinstance(member, griffe.Function | griffe.Class):
        return PublicName(name, "", "")
    summary = _markdown(member.docstring.value.partition("\n")[0]) if member.docstring else ""
    if isinstance(member, griffe.Class):
        return PublicName(name, f"class {name}", summary)
    function = ast.parse(dedent(member.source)).body[0]
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None else ""
    return PublicName(name, f"{name}({ast.unparse(function.args)}){returns}", summary)


def _markdown(text: str) -> str:
    """A line of reStructuredText for readers of Markdown: its roles as code, and its links as theirs."""
    text = _ROLE.sub(lambda role: f"`{_shown(role[1])}`", text)
    return _LINK.sub(r"[\1](\2)", text)


def _shown(target: str) -> str:
    """The text that Sphinx shows for a role: its title, or its target, of which ``~`` leaves the last part."""
    title = re.fullmatch(r"(.+?)\s*<[^<>]+>", target)
    if title is not None:
        return title[1]
    return target.rpartition(".")[2] if target.startswith("~") else target.lstrip("!")
