"""What is remembered of sources makes a build faster and never another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelpress.files import SourceFile
from kernelpress.layout import Layout
from kernelpress.memory import _CODE, Memory
from kernelpress.rewrite import examine
from kernelpress.spec import load_spec
from kernelpress.variant import build

TWICE = "torch-ext/demo_kernel/twice.py"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernelpress"


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(directory).as_posix(): (path.stat().st_ino, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_build_with_nothing_changed_writes_nothing(make_kernel, home):
    root = make_kernel()
    first = build(load_spec(root))
    before = files(first.directory)
    again = build(load_spec(root))
    assert files(again.directory) == before
    assert again == first


def test_new_content_of_the_same_size_and_time_is_built(make_kernel, home):
    root = make_kernel()
    build(load_spec(root))
    path = root / TWICE
    status = path.stat()
    path.write_text(path.read_text().replace("FACTOR = 2", "FACTOR = 3"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    made = build(load_spec(root))
    assert b"FACTOR = 3" in (made.directory / "torch-cpu" / "twice.py").read_bytes()


@pytest.mark.parametrize("spoil", ["change", "remove", "add", "mode", "variant"])
def test_a_build_that_somebody_touched_is_written_again(make_kernel, home, spoil):
    root = make_kernel()
    directory = build(load_spec(root)).directory
    before = {name: data for name, (_, data) in files(directory).items()}
    path = directory / "torch-cpu" / "twice.py"
    if spoil == "change":
        path.write_bytes(path.read_bytes().replace(b"2", b"4"))
    elif spoil == "remove":
        path.unlink()
    elif spoil == "add":
        (path.parent / "ops" / "more").mkdir()
    elif spoil == "mode":
        path.chmod(0o600)
    else:
        (directory / "torch-rocm").mkdir()
    build(load_spec(root))
    assert {name: data for name, (_, data) in files(directory).items()} == before
    assert path.stat().st_mode & 0o777 == 0o644
    assert not (path.parent / "ops" / "more").exists()
    assert not (directory / "torch-rocm").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data.replace(b"1", b"2", 1), lambda _: b""]
)
def test_a_damaged_memory_is_worth_nothing(make_kernel, home, damage):
    root = make_kernel()
    made = build(load_spec(root))
    (kept,) = home.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert build(load_spec(root)) == made
    assert Memory(kept).get("anything") is None
    assert kept.read_bytes()  # and is made anew


def test_where_nothing_can_be_kept_a_build_works_all_the_same(make_kernel, home):
    home.parent.write_text("in the way")
    build(load_spec(make_kernel()))


def test_what_is_no_longer_asked_for_is_forgotten(make_kernel, home):
    root = make_kernel()
    build(load_spec(root))
    (kept,) = home.iterdir()
    size = kept.stat().st_size
    for number in range(3):
        (root / TWICE).write_text((root / TWICE).read_text() + f"# {number}\n")
        build(load_spec(root))
    assert kept.stat().st_size < 1.1 * size


LINES = st.sampled_from(
    [
        "import demo_kernel.ops",
        "import demo_kernel.a as b, other.thing",
        "from demo_kernel.ops import \\\n    scale",
        "from .. import gone",
        "import importlib; importlib.import_module('demo_kernel.' + name)",
        "import importlib; importlib.import_module(name)",
        "from torch import library as lib, ops",
        "lib.define('demo_kernel::x', '() -> ()')",
        "lib.impl('demo_' + 'kernel::x', 'CPU')",
        "torch = ops.demo_kernel.x",
        "use(ops)",
        "L = lib.Library('demo_kernel', 'DEF')",
        "if True:\n    import somewhere.outside",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=6), st.sampled_from(["demo_kernel", "other"]))
def test_what_is_remembered_is_what_would_be_found(tmp_path_factory, lines, package):
    path = tmp_path_factory.mktemp("memory") / "kept.json"
    given = [SourceFile("__init__.py", b""), SourceFile("m.py", "\n".join(lines).encode())]
    fresh = examine(given, Layout(package), Path("here"))
    for _ in range(2):
        memory = Memory(path)
        assert examine(given, Layout(package), Path("here"), memory) == fresh
        memory.save()
    # Under another name, the same file is another case.
    other = Layout("another")
    assert examine(given, other, Path("here"), Memory(path)) == examine(given, other, Path("here"))


def test_a_change_of_any_code_that_looks_at_sources_forgets_what_it_found():
    code = (
        "import sys, kernelpress.analysis; from kernelpress.memory import _CODE\n"
        "used = {name.removeprefix('kernelpress.') for name in sys.modules if name.startswith('kernelpress.')}\n"
        "print(*sorted(used - set(_CODE)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Messages about files that cannot be read are made anew each time.
    assert done.stdout.split() == ["errors"]


def test_all_code_that_looks_at_sources_counts(run_clean):
    done = run_clean(
        "import sys, kernelpress.analysis\n"
        "print(*(name[12:] for name in sys.modules if name.startswith('kernelpress.')))"
    )
    assert set(done.stdout.split()) - {"errors"} <= set(_CODE), done.stderr
