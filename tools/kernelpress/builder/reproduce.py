"""Proof that a build comes out the same elsewhere."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from kernelpress.builder.generated import without_provenance
from kernelpress.builder.model import Build
from kernelpress.conventions import METADATA
from kernelpress.errors import BuildError

# In a process of its own, since hash seed, locale and time zone are settled when Python starts.
_AGAIN = """\
import os, pickle, sys
from pathlib import Path
os.umask(int(sys.argv[1], 8))
from kernelpress.builder.build import build
build(pickle.loads(sys.stdin.buffer.read()), Path(sys.argv[2]))
"""
_CIRCUMSTANCES = (
    ("077", {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "UTC"}),
    ("002", {"PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"}),
)


def reproduce(build: Build) -> None:
    """Build twice more, in other places and under other circumstances, and compare every byte.

    Raises:
        BuildError: A file comes out differently; the message names it.
    """
    spec = pickle.dumps(build.spec)
    expected = {
        f"{variant.name}/{file.path}": file.data for variant in build.variants for file in variant.files
    }
    for umask, settings in _CIRCUMSTANCES:
        with tempfile.TemporaryDirectory(prefix="kernelpress-verify-") as scratch:
            out = Path(scratch, "elsewhere", "build")
            process = subprocess.run(
                [sys.executable, "-c", _AGAIN, umask, str(out)], input=spec, capture_output=True, check=False,
                env=os.environ | settings | {"XDG_CACHE_HOME": scratch},
            )  # fmt: skip
            if process.returncode:
                last = process.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
                raise BuildError(f"the build cannot be made again elsewhere: {last}")
            again = {
                path.relative_to(out).as_posix(): path.read_bytes()
                for path in out.rglob("*")
                if path.is_file()
            }
        for name in sorted(expected.keys() | again.keys()):
            if name not in expected or name not in again or not _same(name, expected[name], again[name]):
                raise BuildError(
                    f"{name} comes out differently when the kernel is built again elsewhere; report this, it should "
                    "depend on the sources alone"
                )


def _same(name: str, one: bytes, other: bytes) -> bool:
    if name.rpartition("/")[2] == METADATA:
        return without_provenance(one) == without_provenance(other)
    return one == other
