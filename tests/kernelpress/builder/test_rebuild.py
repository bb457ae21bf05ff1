"""Builds over an earlier build: what is written anew, and what is not."""

from __future__ import annotations

import ast
import os
from collections import Counter
from pathlib import Path

import pytest
from kernelpress.builder.build import build
from kernelpress.spec.load import load_spec

TWICE = "torch-ext/demo_kernel/twice.py"


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(directory).as_posix(): (path.stat().st_ino, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_build_with_nothing_changed_writes_nothing(make_kernel):
    root = make_kernel()
    first = build(load_spec(root))
    before = files(first.directory)
    again = build(load_spec(root))
    assert files(again.directory) == before
    assert again == first


def test_a_build_parses_each_file_once(make_kernel, monkeypatch):
    root, parsed = make_kernel(), Counter()
    parse = ast.parse

    def counted(source, filename="<unknown>", *arguments, **options):
        parsed[Path(filename)] += 1
        return parse(source, filename, *arguments, **options)

    monkeypatch.setattr(ast, "parse", counted)
    build(load_spec(root))
    assert {path: parsed[path] for path in (root / "torch-ext").rglob("*.py")} == dict.fromkeys(
        (root / "torch-ext").rglob("*.py"), 1
    )


def test_new_content_of_the_same_size_and_time_is_built(make_kernel):
    root = make_kernel()
    build(load_spec(root))
    path = root / TWICE
    status = path.stat()
    path.write_text(path.read_text().replace("FACTOR = 2", "FACTOR = 3"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    kernel = build(load_spec(root))
    assert b"FACTOR = 3" in (kernel.directory / "torch-cpu" / "twice.py").read_bytes()


@pytest.mark.parametrize("spoil", ["change", "remove", "add", "mode", "variant"])
def test_a_build_that_somebody_touched_is_written_again(make_kernel, spoil):
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
