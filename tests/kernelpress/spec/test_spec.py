from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernelpress.errors import SpecError
from kernelpress.spec.load import load_spec
from kernelpress.spec.model import BACKENDS, is_repo_id

GOOD = """\
[general]
name = "demo-kernel"
version = 1
edition = 5
license = "MIT"
backends = ["cpu", "cuda"]

[general.hub]
repo-id = "org/demo-kernel"

[torch-noarch]
"""


def load(directory: Path, text: str):
    (directory / "build.toml").write_text(text, "utf-8")
    return load_spec(directory)


def test_a_plain_file_is_read(tmp_path):
    spec = load(tmp_path, GOOD)
    assert (spec.name, spec.python_name, spec.version, spec.license) == (
        "demo-kernel",
        "demo_kernel",
        1,
        "MIT",
    )
    assert [backend.name for backend in spec.backends] == ["cpu", "cuda"]
    assert spec.repo_id == "org/demo-kernel"
    assert spec.pyext == ("py", "pyi")
    assert spec.package_dir == tmp_path / "torch-ext" / "demo_kernel"


def test_dependencies_and_architectures_go_to_their_backends(tmp_path):
    text = GOOD.replace(
        "[general.hub]", '[general.cuda]\npython-depends = ["nvidia-cutlass-dsl"]\n\n[general.hub]'
    ).replace("[general]\n", '[general]\npython-depends = ["einops"]\n')
    spec = load(tmp_path, text + 'cuda_capabilities = ["8.0", "9.0"]\n')
    cpu, cuda = spec.backends
    assert spec.python_depends == ("einops",)
    assert (cpu.python_depends, cpu.archs) == ((), None)
    assert (cuda.python_depends, cuda.archs) == (("nvidia-cutlass-dsl",), ("8.0", "9.0"))


def test_other_kernels_are_named_by_version_or_revision(tmp_path):
    depends = 'kernel-depends = [{ repo-id = "a/b", version = 2 }, { repo-id = "a/c", revision = "main" }]\n'
    spec = load(tmp_path, GOOD.replace("[general]\n", f"[general]\n{depends}"))
    dependencies = {dep.repo_id: (dep.version, dep.revision) for dep in spec.backends[0].kernel_depends}
    assert dependencies == {"a/b": (2, None), "a/c": (None, "main")}


@pytest.mark.parametrize(
    ("old", "new", "line", "part"),
    [
        ('name = "demo-kernel"\n', "", 1, "no `name`"),
        ("version = 1\n", "", 1, "no `version`"),
        ('edition = 5\nlicense = "MIT"\n', "", 1, "no `edition`, so this is an older form; `kernelpress migrate`"),
        ('edition = 5\nlicense = "MIT"\n', "edition = 4\n", 4, "is of edition 4"),
        ('license = "MIT"\n', "", 1, "no `license`"),
        ("version = 1", "version = -1", 3, "below 0"),
        ("version = 1", 'version = "1"', 3, "a whole number"),
        ("version = 1", "version = true", 3, "a whole number"),
        ("version = 1", "version = ", 3, "malformed TOML"),
        ("version = 1", "version = 1\nversion = 2", 4, "malformed TOML"),
        ("version = 1", f"version = {'[' * 9999}", None, "malformed TOML"),
        ("version = 1", f"{'.'.join('a' * 9999)} = 1", None, "malformed TOML"),
        ("edition = 5", "edition = 6", 4, "newer than kernelpress"),
        ("edition = 5", "edition = true", 4, "must be a whole number"),
        ("demo-kernel", "Demo_Kernel", 2, "no kernel name"),
        ("demo-kernel", "d", 2, "no kernel name"),
        ("demo-kernel", "demo-", 2, "no kernel name"),
        ('"demo-kernel"', '"class"', 2, "class is a word of Python's"),
        ('"demo-kernel"', '"torch"', 2, "torch is a module that kernels import"),
        ('"demo-kernel"', '"tvm-ffi"', 2, "tvm_ffi is a module that kernels import"),
        ('"demo-kernel"', '"random"', 2, "random is a module that kernels import"),
        ('"MIT"', '"My own"', 5, "no SPDX licence"),
        ('["cpu", "cuda"]', "[]", 6, "empty"),
        ('["cpu", "cuda"]', '["cpu", "gpu"]', 6, "unknown backend 'gpu'"),
        ('["cpu", "cuda"]', '["cpu", "cpu"]', 6, "listed twice"),
        ('["cpu", "cuda"]', '"cpu"', 6, "a list of strings"),
        ('["cpu", "cuda"]', "[1]", 6, "a list of strings"),
        ("org/demo-kernel", "demo-kernel", 9, "no repository id"),
        ("org/demo-kernel", "../demo", 9, "no repository id"),
        ("repo-id", "repo", 9, "unknown key `repo` in [general.hub]"),
        ("version = 1", 'version = 1\npython-depends = ["numpy"]', 4, "cannot depend on 'numpy'"),
        ("version = 1", 'version = 1\npython-depends = ["nki"]', 4, "move it to [general.neuron]"),
        ("version = 1", "version = 1\nverison = 2", 4, "unknown key `verison` in [general]"),
        ("[torch-noarch]", "[torch]", 11, "compiled sources"),
        ("[torch-noarch]\n", "", None, "no [torch-noarch]"),
        ("[torch-noarch]", "[torch-noarch]\npyext = [\"json\"]", 12, "leaves out 'py'"),
        ("[torch-noarch]", "[torch-noarch]\nrocm_archs = [\"gfx942\"]", 12, "rocm is not among the backends"),
        ("[torch-noarch]", "[torch-noarch]\nfoo = 1", 12, "unknown key `foo`"),
        ("version = 1", 'version = 1\nsource = "no url"', None, "parser refuses"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path, old, new, line, part):
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert part in caught.value.message
    assert caught.value.line == line
    assert caught.value.path == tmp_path / "build.toml"


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD}\n[kernel]\n",
        f"kernel = {{}}\n{GOOD}",
        f"{GOOD}cuda_capabilities = []\nrocm_archs = []\n",
        GOOD.replace("[general.hub]", "[general.xpu]\n\n[general.hub]"),
        GOOD.replace("[general.hub]", "[general.cuda]\nminver = '12.0'\n\n[general.hub]"),
        GOOD.replace("version = 1", "version = 1\npython-depends = []\nkernel-depends = []"),
    ],
    ids=["kernel", "inline", "archs", "other-backend", "cuda-version", "no-dependencies"],
)
def test_tables_and_lists_that_ask_for_nothing_change_nothing(tmp_path, text):
    assert load(tmp_path, text) == load(tmp_path, GOOD)


@pytest.mark.parametrize("table", ['[kernel.a]\nbackend = "cuda"\n', "[kernel]\na = 3\n", "[tvm-ffi]\n"])
def test_a_table_of_compiled_sources_is_refused_with_its_line(tmp_path, table):
    with pytest.raises(SpecError, match=r"build\.toml:1[23]: .*compiled sources"):
        load(tmp_path, f"{GOOD}{table}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"there is no build\.toml"):
        load_spec(tmp_path)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "build.toml").write_bytes(GOOD.encode() + b"# \xff\n")
    with pytest.raises(SpecError, match="not UTF-8"):
        load_spec(tmp_path)


TOML_VALUES = st.recursive(
    st.booleans()
    | st.integers(-3, 9)
    | st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=8)
    | st.sampled_from([*BACKENDS, "MIT", "a/b", "a-b"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(toml(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@given(
    general=st.dictionaries(
        st.sampled_from(
            ["name", "version", "edition", "license", "backends", "upstream", "python-depends", "hub"]
        ),
        TOML_VALUES,
    ),
    noarch=st.dictionaries(st.sampled_from(["pyext", "cuda_capabilities", "other"]), TOML_VALUES),
)
def test_any_file_is_either_read_or_refused_with_its_path(tmp_path_factory, general, noarch):
    good = {"name": "a-b", "version": 1, "edition": 5, "license": "MIT", "backends": ["cpu"]}
    lines = ["[general]", *(f"{key} = {toml(value)}" for key, value in (good | general).items())]
    lines += ["[torch-noarch]", *(f"{key} = {toml(value)}" for key, value in noarch.items())]
    directory = tmp_path_factory.mktemp("spec")
    try:
        spec = load(directory, "\n".join(lines) + "\n")
    except SpecError as error:
        where = error.path
    else:
        where = spec.root / "build.toml"
        assert spec.version >= 0
        assert {backend.name for backend in spec.backends} <= set(BACKENDS)
    assert where == directory / "build.toml"


@pytest.mark.parametrize("good", ["org/name", "a/b", "Org-1/my.kernel_2"])
def test_repository_ids_are_accepted(good):
    assert is_repo_id(good)


@pytest.mark.parametrize(
    "bad", ["", "name", "/name", "org/", "a/b/c", "../b", "a/..", "a b/c", "a/b.git", "a/b\n", "ä/b"]
)
def test_other_text_is_no_repository_id(bad):
    assert not is_repo_id(bad)
