"""The card: the Hub's README.md of a kernel, rendered from CARD.md and what the sources say of themselves."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jinja2

from kernelpress.build_model import Build, Variant
from kernelpress.errors import SourceError
from kernelpress.generated import own_version
from kernelpress.text import parse

_DEFAULT = "card.md"
_LAYERS = "layers"


@dataclass(frozen=True)
class PublicName:
    """A function or class of the package's ``__all__``; ``signature`` is empty for anything else."""

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
        names = public_names(build.variants[0])
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
            functions=[each for each in names if each.name != _LAYERS],
            layers=layers(build.variants[0]) if any(each.name == _LAYERS for each in names) else [],
            has_benchmark=(spec.root / "benchmarks" / "benchmark.py").is_file(),
            benchmarks=_benchmarks(spec.root),
            built_with=f"kernelpress {own_version()}",
            variants=[{"name": each.name, "id": each.id} for each in build.variants],
            content_hash=build.content_hash,
            tree_hash=build.tree_hash,
            dirty=build.source.git is not None and build.source.git.dirty,
        )
    except jinja2.TemplateSyntaxError as error:
        raise SourceError(f"no valid template: {error.message}", path=path, line=error.lineno) from None
    except jinja2.TemplateError as error:
        raise SourceError(f"the card cannot be rendered: {error.message}", path=path) from None


def layers(variant: Variant) -> list[PublicName]:
    """Classes that the package's ``layers`` module defines; by upstream's convention they replace a model's own."""
    modules = {file.path: parse(file.data) for file in variant.files if file.path.endswith(".py")}
    for path in (f"{_LAYERS}.py", f"{_LAYERS}/__init__.py"):
        if path in modules:
            return [
                _describe(each.name, each) for each in modules[path].body if isinstance(each, ast.ClassDef)
            ]
    return []


def _benchmarks(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.glob("benchmarks/benchmark*.py"))


def public_names(variant: Variant) -> list[PublicName]:
    """What ``__all__`` of the package holds, with signatures and first lines of docstrings.

    Args:
        variant: One with the package directly in it; there, all imports within the package are relative.
    """
    modules = {file.path: parse(file.data) for file in variant.files if file.path.endswith(".py")}
    return [
        _describe(name, _definition(name, "__init__.py", modules)) for name in _all(modules["__init__.py"])
    ]


def _all(module: ast.Module) -> list[str]:
    for statement in module.body:
        if (
            isinstance(statement, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == "__all__" for target in statement.targets)
            and isinstance(statement.value, ast.List | ast.Tuple)
        ):
            return [
                item.value
                for item in statement.value.elts
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            ]
    return []


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definition(
    name: str, path: str, modules: Mapping[str, ast.Module], seen: frozenset[tuple[str, str]] = frozenset()
) -> _Definition | None:
    """Follow a name through the package's own imports to where it is defined."""
    if (path, name) in seen or path not in modules:
        return None
    for statement in ast.walk(modules[path]):
        if isinstance(statement, _Definition) and statement.name == name and statement in modules[path].body:
            return statement
        if isinstance(statement, ast.ImportFrom) and statement.level:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    target = _module_path(path, statement, modules)
                    return _definition(alias.name, target, modules, seen | {(path, name)})
    return None


def _module_path(path: str, statement: ast.ImportFrom, modules: Mapping[str, ast.Module]) -> str:
    folder = PurePosixPath(path).parent
    for _ in range(statement.level - 1):
        folder = folder.parent
    stem = (
        folder.joinpath(*(statement.module or "").split(".")).as_posix()
        if statement.module
        else folder.as_posix()
    )
    return f"{stem}.py" if f"{stem}.py" in modules else PurePosixPath(stem, "__init__.py").as_posix()


def _describe(name: str, found: _Definition | None) -> PublicName:
    if found is None:
        return PublicName(name, "", "")
    summary = (ast.get_docstring(found) or "").partition("\n")[0]
    if isinstance(found, ast.ClassDef):
        return PublicName(name, f"class {name}", summary)
    returns = f" -> {ast.unparse(found.returns)}" if found.returns is not None else ""
    return PublicName(name, f"{name}({ast.unparse(found.args)}){returns}", summary)
