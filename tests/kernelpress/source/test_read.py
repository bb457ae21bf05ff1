from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from dulwich import porcelain
from kernelpress.builder.build import build
from kernelpress.errors import SourceError
from kernelpress.source.read import read_source
from kernelpress.spec.load import KernelOptions, load_spec
from sample_kernel import source_findings

PACKAGE = "torch-ext/demo_kernel"
OPS = (
    "import torch\nfrom . import _demo\n_NAME: str = '_demo'\nops = torch.ops._demo\n\n\n"
    "def add_op_namespace_prefix(op_name: str):\n    return f'{_NAME}::{op_name}'\n"
)


def read(root: Path):
    return read_source(load_spec(root))


def paths(root: Path) -> list[str]:
    return [file.path for file in read(root).files]


def commit(root: Path, message: str = "x") -> str:
    porcelain.add(
        str(root), [str(path) for path in root.rglob("*") if path.is_file() and ".git" not in path.parts]
    )
    return porcelain.commit(
        str(root), message=message.encode(), author=b"A <a@b>", committer=b"A <a@b>"
    ).decode()  # fmt: skip


def test_only_what_ships_is_read_and_in_order(make_kernel):
    root = make_kernel(
        **{
            f"{PACKAGE}/__pycache__/twice.py": "",
            f"{PACKAGE}/.hidden.py": "",
            f"{PACKAGE}/.hidden/x.py": "",
            f"{PACKAGE}/#twice.py": "",
            f"{PACKAGE}/twice.py~": "",
            f"{PACKAGE}/notes.txt": "",
            f"{PACKAGE}/twice.pyc": "",
            f"{PACKAGE}/twice.pyi": "",
            f"{PACKAGE}/_ops.py": OPS,
        }
    )
    assert paths(root) == [
        "__init__.py", "ops/__init__.py", "ops/common.py", "ops/scale.py", "twice.py", "twice.pyi"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("_ops.py", "import torch\n"),
        ("_ops.py", "import torch\n\n\ndef rms_norm(x):\n    return x\n"),
        ("_ops.py", f"{OPS}\n\ndef rms_norm(x):\n    return x\n"),
        (
            "_ops.py",
            f"{OPS}\n\n@torch.library.custom_op('a::b', mutates_args=())\ndef _b(x: int) -> int: ...\n",
        ),
        ("_ops.py", f"{OPS}EPSILON = 1e-6\n"),
        # Operators that only this import would register.
        ("_ops.py", f"from . import twice\n{OPS}"),
        ("_ops.py", f"import demo_kernel.twice\n{OPS}"),
        ("_ops.py", OPS.replace("ops = torch.ops", "ops = make_ops() or torch.ops")),
        ("_ops/__init__.py", ""),
        ("_ops/norm.py", ""),
    ],
)
@pytest.mark.parametrize("inside_a_project", [False, True])
def test_a_module_that_the_build_would_replace_is_refused(make_kernel, path, text, inside_a_project):
    root = make_kernel(**{f"{PACKAGE}/{path}": text})
    options = KernelOptions(root)
    if inside_a_project:
        options = KernelOptions(root, root / PACKAGE, "demo_kernel", license="MIT")
    with pytest.raises(SourceError, match="rename this one") as caught:
        read_source(options.load())
    assert caught.value.path == root / PACKAGE / path


@pytest.mark.parametrize("use", ["from . import _ops\nx = _ops._LIMIT", "from ._ops import _LIMIT as limit"])
def test_a_value_of_an_own_ops_module_that_another_module_takes_is_refused(make_kernel, use):
    ops = f"{OPS}_LIMIT = 7\n"
    assert "_ops.py" not in paths(
        make_kernel(**{f"{PACKAGE}/_ops.py": ops, f"{PACKAGE}/a.py": "_LIMIT = 8\n"})
    )
    root = make_kernel(**{f"{PACKAGE}/_ops.py": ops, f"{PACKAGE}/b.py": f"{use}\n"})
    with pytest.raises(SourceError, match="rename this one"):
        read_source(KernelOptions(root).load())


def test_other_suffixes_ship_when_the_spec_names_them(make_kernel):
    root = make_kernel(**{f"{PACKAGE}/tiles.json": "{}"})
    assert "tiles.json" not in paths(root)
    text = (root / "build.toml").read_text()
    (root / "build.toml").write_text(text + 'pyext = ["py", "json"]\n')
    assert "tiles.json" in paths(root)


@pytest.mark.parametrize(
    ("changed", "line", "part"),
    [
        ({f"{PACKAGE}/__init__.py": None}, None, "no __init__.py"),
        ({f"{PACKAGE}/bad.py": "x = 1\ndef f(:\n"}, 2, "syntax error"),
        ({f"{PACKAGE}/bad.py": "x = 1\n  y = 2\n"}, 2, "syntax error"),
        ({f"{PACKAGE}/bad.py": "x = 1\ny = '\0'\n"}, 2, "null bytes"),
    ],
)
def test_sources_that_are_no_package_are_refused(make_kernel, changed, line, part):
    with pytest.raises(SourceError, match=part) as caught:
        read(make_kernel(**changed))
    assert caught.value.path is not None
    assert line is None or caught.value.line == line


def test_a_missing_package_is_named(make_kernel, tmp_path):
    root = make_kernel()
    (root / PACKAGE).rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="no package directory torch-ext/demo_kernel"):
        read(root)


def test_a_file_in_another_encoding_is_refused_with_its_line(make_kernel):
    root = make_kernel()
    (root / PACKAGE / "twice.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = 1\n# \xe4\n")
    with pytest.raises(SourceError, match="not UTF-8") as caught:
        read(root)
    assert caught.value.line == 3


@pytest.mark.parametrize("cookie", ["latin-1", "utf-16", "cp1252", "nowhere-1"])
def test_a_file_that_says_it_is_in_another_encoding_is_refused(make_kernel, cookie):
    root = make_kernel(**{f"{PACKAGE}/twice.py": f"# -*- coding: {cookie} -*-\ns = 'é'\n"})
    with pytest.raises(SourceError, match=r"twice\.py") as caught:
        read(root)
    assert "UTF-8" in str(caught.value) or "unknown encoding" in str(caught.value)


@pytest.mark.parametrize("cookie", ["utf-8", "utf8", "UTF_8", "ascii"])
def test_an_encoding_that_shifts_nothing_may_be_named(make_kernel, cookie):
    root = make_kernel(**{f"{PACKAGE}/ops/__init__.py": f"# -*- coding: {cookie} -*-\n"})
    assert "ops/__init__.py" in paths(root)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x = 0\ny = " + "1 + " * 1500 + "1\n", r"twice\.py:2: nested 1\d+ deep"),
        ("x = " + "-" * 60_000 + "1\n", r"twice\.py: nested too deeply"),
        ("if x: pass\n" + "elif x: pass\n" * 400, r"twice\.py:\d+: nested 40\d deep"),
    ],
    ids=["sum", "signs", "branches"],
)
def test_syntax_nested_too_deeply_is_refused_in_one_message(make_kernel, text, part):
    root = make_kernel(**{f"{PACKAGE}/twice.py": text})
    with pytest.raises(SourceError, match=part):
        read(root)
    (finding,) = source_findings(root)
    assert (finding.code, finding.path.name) == ("KP002", "twice.py")


def test_syntax_nested_as_deeply_as_allowed_builds(make_kernel):
    deep = "(" * 191 + "torch.ops.demo_kernel.twice" + ")(x)" * 191
    root = make_kernel(**{f"{PACKAGE}/more.py": f"import torch\ndef f(x):\n    return {deep}\n"})
    assert [finding.severity for finding in source_findings(root)] == []
    build(load_spec(root))


def test_a_source_named_like_the_metadata_is_refused(make_kernel):
    root = make_kernel(**{f"{PACKAGE}/metadata.json": "{}"})
    (root / "build.toml").write_text((root / "build.toml").read_text() + 'pyext = ["py", "json"]\n')
    with pytest.raises(SourceError, match="rename"):
        read(root)


def test_a_link_that_leaves_the_package_is_refused(make_kernel, tmp_path):
    root = make_kernel()
    (tmp_path / "secret.py").write_text("")
    (root / PACKAGE / "link.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(SourceError, match="leaves the package"):
        read(root)


def test_a_link_within_the_package_ships_as_the_file(make_kernel):
    root = make_kernel()
    (root / PACKAGE / "link.py").symlink_to("twice.py")
    files = {file.path: file.data for file in read(root).files}
    assert files["link.py"] == files["twice.py"]


@pytest.mark.parametrize("target", ["..", "/", "nowhere"])
def test_a_linked_directory_or_broken_link_is_refused(make_kernel, target):
    root = make_kernel()
    name = "link.py" if target == "nowhere" else "link"
    (root / PACKAGE / name).symlink_to(target)
    with pytest.raises(SourceError):
        read(root)


def test_a_package_directory_outside_of_the_project_is_refused(make_kernel, tmp_path):
    root = make_kernel()
    (root / PACKAGE).rename(tmp_path / "outside")
    (root / PACKAGE).symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="leaves the project"):
        read(root)


def test_a_pipe_is_refused_and_not_waited_for(make_kernel):
    root = make_kernel()
    os.mkfifo(root / PACKAGE / "pipe.py")
    with pytest.raises(SourceError, match="not a regular file"):
        read(root)


def test_without_a_repository_there_is_no_git_state(make_kernel):
    assert read(make_kernel()).git is None


def test_a_repository_without_a_commit_has_no_git_state(make_kernel):
    root = make_kernel()
    porcelain.init(str(root))
    assert read(root).git is None


@pytest.mark.parametrize(
    ("path", "text", "dirty"),
    [
        (None, None, False),
        (f"{PACKAGE}/twice.py", "x = 1\n", True),
        (f"{PACKAGE}/new.py", "x = 1\n", True),
        (f"{PACKAGE}/twice.py", None, True),
        ("build.toml", "# \n", True),
        ("CARD.md", "# new\n", True),
        ("pyproject.toml", "[tool.kernelpress]\nuniversal = true\n", True),
        ("pyproject.toml", "[project]\n", False),
        ("README.md", "# new\n", False),
        (f"{PACKAGE}/notes.txt", "x\n", False),
        ("tests/test_x.py", "x = 1\n", False),
    ],
)
def test_only_changes_to_what_is_built_make_it_dirty(make_kernel, path, text, dirty):
    root = make_kernel(**{"README.md": "# old\n"})
    porcelain.init(str(root))
    head = commit(root)
    if path is not None and text is None:
        (root / path).unlink()
    elif path is not None:
        (root / path).parent.mkdir(exist_ok=True)
        with open(root / path, "a") as file:
            file.write(text)
    git = read(root).git
    assert git is not None
    assert (git.commit, git.dirty) == (head, dirty)


def test_a_kernel_below_the_top_of_a_repository_is_compared_with_its_own_files(make_kernel, tmp_path):
    root = make_kernel("repo/kernels/one")
    porcelain.init(str(tmp_path / "repo"))
    head = commit(tmp_path / "repo")
    git = read(root).git
    assert git is not None
    assert (git.commit, git.dirty) == (head, False)


def test_reading_and_building_print_no_warnings_about_the_sources(make_kernel, recwarn):
    build(load_spec(make_kernel(**{f"{PACKAGE}/ops/common.py": "DEFAULT = 3.0\nX = '\\d'\n"})))
    assert not recwarn.list


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_a_name_that_is_no_text_is_said(make_kernel):
    root = make_kernel()
    Path(os.fsdecode(os.fsencode(root / PACKAGE) + b"/\xff.py")).write_text("")
    with pytest.raises(SourceError, match="this name is not UTF-8"):
        read(root)


@pytest.mark.parametrize("dirty", [False, True])
def test_a_partial_clone_is_a_repository_like_any_other(make_kernel, dirty):
    root = make_kernel()
    porcelain.init(str(root))
    head = commit(root)
    with (root / ".git/config").open("a") as config:
        config.write("[extensions]\n\tpartialClone = origin\n[core]\n\trepositoryformatversion = 1\n")
    if dirty:
        (root / PACKAGE / "twice.py").write_text("")
    git = read(root).git
    assert git is not None
    assert (git.commit, git.dirty) == (head, dirty)


def test_a_repository_that_cannot_be_read_is_said(make_kernel):
    root = make_kernel()
    porcelain.init(str(root))
    with (root / ".git/config").open("a") as config:
        config.write("[extensions]\n\tunheardOf = true\n[core]\n\trepositoryformatversion = 1\n")
    with pytest.raises(SourceError, match=r"git repository cannot be read .*build from an ordinary clone"):
        read(root)
