from __future__ import annotations

import pytest
from kernelpress.errors import SpecError
from kernelpress.spec.load import load_spec
from kernelpress.spec.migrate import migrate

V4 = """\
# what it is
[general]
name = "demo-kernel"  # its name
version = 2
license = "MIT"
backends = ["cpu", "cuda"]

# where it goes
[general.hub]
repo-id = "org/demo-kernel"
branch = "main"

[torch-noarch]
"""
V3 = V4.replace("\n[torch-noarch]\n", "")
V2 = """\
[general]
name = "demo_kernel"
universal = true  # any backend

[torch]
pyext = ["py", "json"]  # tiles
"""


@pytest.mark.parametrize("text", [V4, V3, f"{V4}\n[kernel]  # none\n", f"{V3}\n[torch]\n\n[kernel]\n"])
def test_an_older_edition_is_brought_up_to_date_with_its_comments(tmp_path, text):
    path = tmp_path / "build.toml"
    path.write_text(text)
    spec = migrate(tmp_path)
    assert spec is not None
    assert (spec.version, spec.repo_id, [backend.name for backend in spec.backends]) == (
        2, "org/demo-kernel", ["cpu", "cuda"]
    )  # fmt: skip
    after = path.read_text()
    for comment in ("# what it is", "# its name", "# where it goes"):
        assert comment in after
    assert "edition = 5" in after
    assert migrate(tmp_path) is None
    assert path.read_text() == after
    assert [path.name for path in tmp_path.iterdir()] == ["build.toml"]


@pytest.mark.parametrize(
    "text",
    [
        V4,
        V3,
        f"{V4}[kernel]\n",
        f"{V3}[torch]\n[kernel]\n",
        V4.replace("version", "edition = 4\nversion"),
        V4.replace("version", "edition = 3\nversion"),
    ],
)
def test_an_older_edition_is_read_as_what_migrating_makes_of_it(tmp_path, text):
    (tmp_path / "build.toml").write_text(text)
    read = load_spec(tmp_path)
    assert (tmp_path / "build.toml").read_text() == text
    assert read == migrate(tmp_path)


def test_a_universal_kernel_with_a_bare_kernel_table_is_migrated(tmp_path):
    (tmp_path / "build.toml").write_text(f"{V2}\n[kernel]\n")
    spec = migrate(tmp_path, "MIT")
    assert spec is not None
    assert (spec.name, spec.pyext) == ("demo-kernel", ("py", "json"))


def test_what_is_wrong_in_an_older_edition_is_named_with_its_own_line(tmp_path):
    (tmp_path / "build.toml").write_text(V4.replace("org/demo-kernel", "nowhere"))
    with pytest.raises(SpecError, match=r"build\.toml:10: 'nowhere' is no repository id"):
        load_spec(tmp_path)


def test_a_universal_kernel_gets_its_name_backends_and_licence(tmp_path):
    (tmp_path / "build.toml").write_text(V2)
    spec = migrate(tmp_path, "apache-2.0")
    assert spec is not None
    assert (spec.name, spec.version, spec.license) == ("demo-kernel", 1, "Apache-2.0")
    assert [backend.name for backend in spec.backends] == ["cpu", "cuda", "rocm", "xpu"]
    assert spec.pyext == ("py", "json")
    assert load_spec(tmp_path) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (V2, "give --license"),
        (V4.replace("[torch-noarch]", '[torch]\nsrc = ["a.cpp"]'), "migrate it with kernel-builder"),
        (V4 + '[kernel.a]\nbackend = "cuda"\n', "compiled sources"),
        (V4.replace('backends = ["cpu", "cuda"]\n', ""), "no backends"),
        (V4.replace('"MIT"', '"mine"'), "no SPDX licence"),
        (V4.replace("version = 2", "version = "), "malformed TOML"),
        (V4.replace("version = 2", "version = 2\nhub = {}\n[general.hub]\n"), "malformed TOML"),
        (V4.replace("version = 2", f"version = {'[' * 9999}"), "malformed TOML"),
        ("", "no .general. table"),
    ],
)
def test_what_cannot_be_migrated_stays_as_it_was(tmp_path, text, message):
    path = tmp_path / "build.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        migrate(tmp_path)
    assert path.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["build.toml"]


@pytest.mark.parametrize("text", ["general = 3\n", "torch = 3\n[general]\n", "torch-noarch = 3\n[general]\n"])
def test_what_is_no_table_is_said_and_left(tmp_path, text):
    (tmp_path / "build.toml").write_text(text)
    with pytest.raises(SpecError, match="must be a table"):
        migrate(tmp_path)
    assert (tmp_path / "build.toml").read_text() == text


def test_a_hub_that_is_no_table_is_said_and_left(tmp_path):
    text = V4.replace('[general.hub]\nrepo-id = "org/demo-kernel"\nbranch = "main"\n', "").replace(
        "version = 2", "version = 2\nhub = 3"
    )
    (tmp_path / "build.toml").write_text(text)
    with pytest.raises(SpecError, match="`hub` must be a table"):
        migrate(tmp_path)
    assert (tmp_path / "build.toml").read_text() == text
