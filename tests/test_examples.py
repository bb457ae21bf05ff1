"""Property tests draw the same examples in every run, whatever ran before them in the same process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
DRAW = """
import json, os
from hypothesis import given, strategies as st

drawn = []

@given(st.lists(st.integers(), min_size=20, max_size=30))
def test_draw(numbers):
    drawn.append(numbers)

def test_end():
    open(os.environ["DRAWN"], "w").write(json.dumps(drawn))
"""


def drawn(folder: Path, *options: str) -> list[list[int]]:
    out = folder / "drawn.json"
    code = (
        "import os, sys, pytest\n"
        "os.environ.update(DRAWN=sys.argv.pop(1), PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')\n"
        "sys.path[:0] = sys.argv.pop(1).split(os.pathsep)\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable, "-c", code, str(out), f"{TESTS}:{folder}", "-q", "-p", "no:cacheprovider",
        "-p", "conftest", *options, str(folder / "test_draw.py"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[list[int]] = json.loads(out.read_text())
    return found


def test_examples_do_not_depend_on_what_is_imported(tmp_path: Path) -> None:
    (tmp_path / "test_draw.py").write_text(DRAW)
    numbers = ", ".join(map(str, range(10**6, 10**6 + 500)))
    (tmp_path / "imported_before.py").write_text(f"X = [{numbers}]\n")
    alone = drawn(tmp_path)
    assert len(alone) == 40
    assert drawn(tmp_path, "-p", "imported_before") == alone
