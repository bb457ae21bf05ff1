"""Git itself reads the lines for large files as they are meant."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from localhub.git.attributes import pattern, patterns, with_patterns

paths = st.lists(
    st.text(alphabet="ab *?[]!\\\"#'é-.", min_size=1, max_size=6).filter(lambda name: name.strip(". ") != ""),
    min_size=1,
    max_size=2,
).map("/".join)


@given(path=paths, other=paths)
def test_a_line_names_its_file_and_no_other(path: str, other: str, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = Path(tmp_path_factory.getbasetemp()) / "attributes"
    if not folder.exists():
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / ".gitattributes").write_text(with_patterns("", set(), {pattern(path)}))
    answer = subprocess.run(
        ["git", "check-attr", "-z", "filter", "--", path, other],
        cwd=folder, env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    values = answer.stdout.split("\0")[2::3]
    assert values == ["lfs", "lfs" if other == path else "unspecified"]


@given(first=paths, second=paths)
def test_lines_come_and_go_and_leave_what_people_wrote(first: str, second: str) -> None:
    one, both = {pattern(first)}, {pattern(first), pattern(second)}
    text = with_patterns("*.txt text\n# mine\n", set(), both)
    assert patterns(text) == both
    assert with_patterns(text, both, both) == text
    assert patterns(with_patterns(text, both, one)) == one
    assert with_patterns(text, both, set()) == "*.txt text\n# mine\n"
