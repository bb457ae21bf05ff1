"""The map in docs/architecture.md is true: packages import only what stands above them in its tables."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
BUILDER = REPOSITORY / "tools/kernelpress"
HUB = REPOSITORY / "tools/localhub"
KERNEL = REPOSITORY / "torch-ext/scattermoe_lora"
# Modules beside the packages, each of which imports none but those before it.
GROUND = ("conventions", "errors", "new_directory")


def order(heading: str) -> list[str]:
    """The packages that the table below a heading lists."""
    text = (REPOSITORY / "docs/architecture.md").read_text("utf-8")
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def imported(root: Path) -> Iterator[tuple[Path, str]]:
    """Every module that a file below ``root`` imports, anywhere in it, by its full name."""
    for path in sorted(root.rglob("*.py")):
        package = path.relative_to(root.parent).parts[:-1]
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                source = ".".join((*base, *((node.module,) if node.module else ())))
                yield from ((path, f"{source}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize(
    ("root", "heading", "ground"),
    [
        (BUILDER, "The builder", GROUND),
        (KERNEL, "The kernel package", ()),
    ],
)
def test_each_package_imports_only_those_above_it_in_the_map(
    root: Path, heading: str, ground: tuple[str, ...]
) -> None:
    packages = order(heading)
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    assert set(packages) == folders
    for path, name in imported(root):
        parts = name.split(".")
        inside = path.relative_to(root).parts[0]
        if parts[0] != root.name or inside not in packages:
            continue
        target = parts[1]
        assert target in ground or packages.index(target) <= packages.index(inside), f"{path} imports {name}"


def test_modules_beside_the_packages_import_none_of_them() -> None:
    assert {path.stem for path in BUILDER.glob("*.py")} == {"__init__", "__main__", *GROUND}
    for path, name in imported(BUILDER):
        if path.parent == BUILDER and path.stem in GROUND and name.startswith("kernelpress."):
            assert name.split(".")[1] in GROUND[: GROUND.index(path.stem)], f"{path} imports {name}"


def test_no_package_of_the_builder_is_a_single_module() -> None:
    for init in BUILDER.glob("*/__init__.py"):
        assert len([path for path in init.parent.glob("*.py") if path.name != "__init__.py"]) > 1, init.parent


def test_the_embedded_hub_knows_nothing_of_the_builder_and_its_storage_nothing_of_http() -> None:
    for path, name in imported(HUB):
        assert not name.startswith("kernelpress"), f"{path} imports {name}"
        if path.is_relative_to(HUB / "git"):
            assert not name.startswith(("localhub.http", "starlette", "uvicorn")), f"{path} imports {name}"


def test_features_of_the_kernel_package_do_not_import_each_other_and_define_no_operators() -> None:
    features = KERNEL / "integration"
    for path, name in imported(features):
        feature = path.relative_to(features).parts[0]
        parts = name.split(".")
        # Puts them together, and is imported by none.
        if feature == "apply.py":
            continue
        assert parts[:2] != ["integration", "apply"], f"{path} imports {name}"
        if parts[0] == "integration" and len(parts) > 1 and (features / parts[1]).is_dir():
            assert parts[1] == feature, f"{path} imports {name}"
    for path in features.rglob("*.py"):
        assert not re.search(r"custom_op|torch\.library\.", path.read_text("utf-8")), path


def test_modules_import_no_circle() -> None:
    for root in (BUILDER, HUB, KERNEL):
        graph: dict[str, set[str]] = {}
        modules = {
            ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): path
            for path in root.rglob("*.py")
        }
        by_path = {path: module for module, path in modules.items()}
        for path, name in imported(root):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != by_path[path] and modules[target].name != "__init__.py":
                graph.setdefault(by_path[path], set()).add(target)
        TopologicalSorter(graph).prepare()
