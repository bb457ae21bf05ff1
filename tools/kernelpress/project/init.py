"""New kernel projects, made from the files in ``templates/init``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kernelpress.errors import BuildError, SpecError
from kernelpress.new_directory import new_directory
from kernelpress.spec.load import load_spec
from kernelpress.spec.model import is_repo_id

_TEMPLATES = Path(str(files("kernelpress"))) / "templates" / "init"


def scaffold(name: str, organization: str, where: Path) -> Path:
    """Write a project: a Triton kernel with a path for the CPU, tests, a benchmark, a card and a workflow.

    Args:
        name: The kernel's name.
        organization: Whose repository it will be.
        where: A directory that is not there yet.

    Raises:
        SpecError: The name or the organization is none.
        BuildError: The directory is there, or cannot be written; nothing is left half-written.
    """
    if not is_repo_id(f"{organization}/{name}"):
        raise SpecError(f"'{organization}/{name}' is no repository id; correct the name or --org")
    if where.exists():
        raise BuildError("this is there already; name a new kernel or move it", path=where)
    # In the names and the text of the templates, which stand as the project's files do. Setuptools leaves hidden files
    # out of a package's data.
    values = {"@NAME@": name, "@PACKAGE@": name.replace("-", "_"), "@ORG@": organization, "@DOT@": "."}
    with new_directory(where) as fresh:
        for template in _TEMPLATES.rglob("*.tmpl"):
            path = fresh / _fill(template.relative_to(_TEMPLATES).with_suffix("").as_posix(), values)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_fill(template.read_text("utf-8"), values), "utf-8")
        try:
            load_spec(fresh)  # refuses a name that the loader would
        except SpecError as error:
            # The file it names is gone with the message.
            raise SpecError(error.message) from None
    return where


def _fill(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(key, value)
    return text
