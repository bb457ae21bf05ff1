"""The places of a project's modules in the kernel made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

# Modules from outside of the package keep their dotted names below this folder of the kernel.
VENDOR = "_vendor"


@dataclass(frozen=True)
class ModuleMap:
    """Names in place against places in the kernel.

    Args:
        package: The package's dotted name in place; it becomes the kernel itself.
        vendored: Dotted names of the modules from outside of the package that ship with it.
        named_whole: True if a module binds the first part of the package's name, so that the parents must be
            there even where nothing is vendored.
    """

    package: str
    vendored: frozenset[str] = frozenset()
    named_whole: bool = False

    @cached_property
    def tops(self) -> frozenset[str]:
        """First parts of the project's module names."""
        return frozenset(name.partition(".")[0] for name in (self.package, *self.vendored))

    @cached_property
    def parents(self) -> frozenset[str]:
        """Packages around what ships, as far as they do not ship themselves; to the kernel they are empty."""
        parents = set()
        for name in (self.package, *self.vendored):
            parts = name.split(".")
            parents |= {".".join(parts[:count]) for count in range(1, len(parts))}
        return frozenset(parents - self.vendored)

    def owns(self, module: str) -> bool:
        """True for the package and the modules in it."""
        return module == self.package or module.startswith(f"{self.package}.")

    def place(self, module: str) -> tuple[str, ...] | None:
        """A module's parts below the kernel: none for the package itself; ``None`` if it does not ship."""
        if self.owns(module):
            return tuple(module[len(self.package) + 1 :].split(".")) if module != self.package else ()
        if module in self.vendored or (module in self.parents and (self.vendored or self.named_whole)):
            return (VENDOR, *module.split("."))
        return None

    def module_at(self, path: str) -> str:
        """The name in place of the module that stands at a path of the kernel."""
        parts = PurePosixPath(path).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        return ".".join(parts[1:]) if parts[:1] == (VENDOR,) else ".".join((self.package, *parts))


def module_file(root: Path, module: str) -> Path | None:
    """The file of a module below the directory that its first part stands in."""
    stem = root.joinpath(*module.split("."))
    for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
        if path.is_file():
            return path
    return None
