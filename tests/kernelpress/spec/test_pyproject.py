from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from kernelpress.builder.build import build
from kernelpress.builder.model import Build
from kernelpress.errors import SourceError, SpecError
from kernelpress.findings.model import FindingsError
from kernelpress.spec.load import load_spec
from kernelpress.spec.pyproject import load_project

PYPROJECT = """\
[project]
name = "frame"
license = "BSD-3-Clause"

[tool.kernelpress]
source-dir = "src/frame/nn/fast"
package = "frame.nn.fast"
name = "frame-fast"
include = ["frame/tools/shape.py"]
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "src/frame/__init__.py": "raise RuntimeError('the project is not there')\n",
    "src/frame/nn/__init__.py": "raise RuntimeError('the project is not there')\n",
    "src/frame/nn/fast/__init__.py": (
        "from frame.nn.fast.core import answer\nimport frame.nn.fast.core\n__all__ = ['answer', 'chain']\n\n\n"
        "def chain():\n    '''By the whole name.'''\n    import frame.tools.shape\n"
        "    return frame.nn.fast.core.answer(), frame.tools.shape.WIDE\n"
    ),
    "src/frame/nn/fast/core.py": (
        "import importlib\nfrom typing import TYPE_CHECKING\n\nfrom frame.tools import shape as sh\n"
        "from frame.tools.shape import (\n    WIDE,  # kept\n)\nfrom ...tools.shape import *\n"
        "if TYPE_CHECKING:\n    from frame.config import Config\n\n\n"
        "def answer():\n    '''Everything it found.'''\n"
        "    again = importlib.import_module('frame.tools.shape')\n"
        "    return [WIDE, sh.WIDE, again.WIDE, again.up.RAISED, NARROW]\n"
    ),
    "src/frame/tools/__init__.py": "raise RuntimeError('nothing of it is asked for')\n",
    "src/frame/tools/shape.py": "from . import up\nfrom frame.tools.up import RAISED\nWIDE = RAISED + 1\nNARROW = 0\n",
    "src/frame/tools/up.py": "RAISED = 1\n",
}


@pytest.fixture
def make_project(tmp_path: Path) -> Callable[..., Path]:
    """Write a project with a package inside; keywords replace files' contents."""

    def make(**changed: str | None) -> Path:
        for name, text in {**FILES, **changed}.items():
            if text is not None:
                path = tmp_path / "project" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, "utf-8")
        return tmp_path / "project"

    return make


def files(kernel: Build) -> dict[str, str]:
    return {file.path: file.data.decode() for file in kernel.variants[0].files}


LOAD = (
    "import sys; from pathlib import Path; from kernels import get_local_kernel\n"
    "kernel = get_local_kernel(Path(sys.argv[1])); print(kernel.answer(), kernel.chain())\n"
    "print([name for name in sys.modules if name.partition('.')[0] == 'frame'])\n"
)


@pytest.mark.parametrize("variant", ["torch-cpu", "torch-universal"])
def test_a_package_inside_a_project_loads_without_the_project(make_project, run_clean, variant):
    kernel = build(load_spec(make_project()))
    assert (kernel.spec.name, kernel.spec.license) == ("frame-fast", "BSD-3-Clause")
    process = run_clean(LOAD, str(kernel.directory / variant))
    assert process.stdout == "[2, 2, 2, 1, 0] ([2, 2, 2, 1, 0], 2)\n[]\n", process.stderr


def test_vendored_modules_bring_what_they_import_and_nothing_else(make_project):
    shipped = files(build(load_spec(make_project())))
    assert {path for path in shipped if path.startswith("_vendor/")} == {
        "_vendor/__init__.py", "_vendor/frame/__init__.py", "_vendor/frame/nn/__init__.py",
        "_vendor/frame/tools/__init__.py", "_vendor/frame/tools/shape.py", "_vendor/frame/tools/up.py",
    }  # fmt: skip
    assert shipped["_vendor/frame/tools/__init__.py"] == ""


def test_no_line_of_a_rewritten_file_moves(make_project):
    core = files(build(load_spec(make_project())))["core.py"]
    before = FILES["src/frame/nn/fast/core.py"]
    assert len(core.splitlines()) == len(before.splitlines())
    assert "    WIDE,  # kept\n" in core
    assert "from frame.config import Config" in core, "it is never imported, so it may stay"


def test_the_whole_name_works_where_nothing_is_vendored(make_project, run_clean):
    kernel = build(
        load_spec(
            make_project(
                **{
                    "pyproject.toml": PYPROJECT.replace('["frame/tools/shape.py"]', "[]"),
                    "src/frame/nn/fast/core.py": "def answer(): return 7\n",
                    "src/frame/nn/fast/__init__.py": "import frame.nn.fast.core\nX = frame.nn.fast.core.answer()\n",
                }
            )
        )
    )
    load = "import sys; from pathlib import Path; from kernels import get_local_kernel as g\n"
    process = run_clean(f"{load}print(g(Path(sys.argv[1])).X)", str(kernel.directory / "torch-cpu"))
    assert process.stdout == "7\n", process.stderr


def test_modules_that_do_not_ship_are_all_named_with_their_lines(make_project):
    root = make_project(**{"pyproject.toml": PYPROJECT.replace('["frame/tools/shape.py"]', "[]")})
    with pytest.raises(FindingsError) as caught:
        build(load_spec(root))
    findings = [(finding.code, finding.path.name, finding.line) for finding in caught.value.findings]
    assert findings == [
        ("KP302", "__init__.py", 8), ("KP302", "core.py", 4), ("KP302", "core.py", 5),
        ("KP302", "core.py", 8), ("KP302", "core.py", 15),
    ]  # fmt: skip
    assert str(caught.value).count("\n") == 4
    assert str(caught.value).endswith('; all of them: include = ["frame/tools/shape.py"]')


def test_options_describe_a_package_as_the_table_does(make_project, tmp_path):
    described = build(load_spec(make_project()))
    kernel = build(
        load_project(
            tmp_path,
            source_dir=tmp_path / "project/src/frame/nn/fast",
            package="frame.nn.fast",
            name="frame-fast",
            include=["frame/tools/shape.py"],
        )
    )
    assert kernel.directory == tmp_path / "build"
    assert kernel.tree_hash == described.tree_hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('package = "frame.nn.fast"\n', "", "not named"),
        ("frame.nn.fast", "frame.nn.slow", "does not end in frame/nn/slow"),
        ('name = "frame-fast"', 'name = "Frame"', "no kernel name"),
        ('license = "BSD-3-Clause"', "", "give --license"),
        ("include = ", "includes = ", "unknown key `includes`"),
        ("include = ", "version = 99999999999999999999\ninclude = ", "Kernel Hub's parser refuses"),
        ("include = ", "kernel-depends = [3]\ninclude = ", "Kernel Hub's parser refuses"),
        ("include = ", 'kernel-depends = "org/other"\ninclude = ', "`kernel-depends` must be a list"),
    ],
)
def test_a_table_that_does_not_hold_is_refused(make_project, old, new, message):
    with pytest.raises(SpecError, match=message):
        load_spec(make_project(**{"pyproject.toml": PYPROJECT.replace(old, new)}))


def test_kernels_that_a_package_depends_on_stand_in_the_metadata(make_project):
    depends = 'kernel-depends = [{ repo-id = "org/other", version = 2 }]\ninclude = '
    spec = load_spec(make_project(**{"pyproject.toml": PYPROJECT.replace("include = ", depends)}))
    for variant in build(spec).variants:
        (metadata,) = (json.loads(file.data) for file in variant.files if file.path == "metadata.json")
        assert metadata["kernel-depends"] == [{"repo-id": "org/other", "version": 2}]


@pytest.mark.parametrize(
    ("include", "message"),
    [("frame/nowhere.py", "no such module"), ("frame/nn/fast/core.py", "in the package anyway")],
)
def test_what_cannot_be_included_is_refused(make_project, include, message):
    with pytest.raises(SourceError, match=message):
        build(
            load_spec(make_project(**{"pyproject.toml": PYPROJECT.replace("frame/tools/shape.py", include)}))
        )


def test_a_module_named_like_the_generated_one_is_refused(make_project):
    with pytest.raises(SourceError, match="rename"):
        build(load_spec(make_project(**{"src/frame/nn/fast/_ops.py": "x = 1\n"})))


def test_a_kernel_in_upstreams_convention_builds_unchanged(make_kernel, run_clean):
    text = (
        "import torch\nfrom ._ops import add_op_namespace_prefix, ops\n__all__ = ['twice']\n\n\n"
        "@torch.library.custom_op(add_op_namespace_prefix('twice'), mutates_args=())\n"
        "def _twice(x: torch.Tensor) -> torch.Tensor:\n    return 2 * x\n\n\n"
        "def twice(x):\n    '''Twice.'''\n    return ops.twice(x)\n"
    )
    kernel = build(load_spec(make_kernel(**{"torch-ext/demo_kernel/__init__.py": text})))
    assert files(kernel)["__init__.py"] == text
    load = (
        "import sys, torch; from pathlib import Path; from kernels import get_local_kernel\n"
        "print(get_local_kernel(Path(sys.argv[1])).twice(torch.ones(1)).item())\n"
    )
    process = run_clean(load, str(kernel.directory / "torch-cpu"))
    assert process.stdout == "2.0\n", process.stderr


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[tool.kernelpress]\nsource-dir = 3", "`source-dir` in [tool.kernelpress] must be a string, not 3"),
        ("[tool.kernelpress]\npackage = ['a']", "`package` in [tool.kernelpress] must be a string"),
        ("[tool.kernelpress]\ninclude = [3]", "`include` in [tool.kernelpress] must be a list of strings"),
        (
            "[tool.kernelpress]\ninclude = 'fr/x.py'",
            "`include` in [tool.kernelpress] must be a list of strings",
        ),
        ("[tool]\nkernelpress = 3", "`tool.kernelpress` must be a table"),
        ("tool = 3", "`tool` must be a table"),
        ("project = 3", "`project` must be a table"),
    ],
)
def test_what_is_of_the_wrong_kind_is_said_with_its_name(tmp_path, table, message):
    (tmp_path / "pyproject.toml").write_text(table)
    with pytest.raises(SpecError, match=re.escape(message)):
        load_project(tmp_path, package="frame" if "source-dir" in table else None)
