"""Patterns of a .gitignore: what git itself ignores, and never for long."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from localhub import RunningHub
from localhub.http.gitignore import GitIgnore
from localhub.http.problems import Problem

SLOW = "*a" * 60 + "b"


def ignored_by_git(folder: Path, text: str, paths: list[str]) -> set[str]:
    (folder / ".gitignore").write_text(text)
    if not (folder / ".git").exists():
        subprocess.run(["git", "init", "-q", folder], check=True)
    answer = subprocess.run(
        ["git", "-c", "core.quotePath=off", "-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index",
         "--stdin"],
        cwd=folder, input="\n".join(paths), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode in (0, 1), answer.stderr
    return set(answer.stdout.splitlines())


PATHS = [
    "a", "b", "ab", "a.b", "a b", "#a", "!a", "a/b", "a/ab", "a/b/a", "a/x/y/b", "b/a/b/a.b", "x/a/b", "abc/aab", "b/]",
    "a/-", "x/a.b", "b/b/b/b", "a*", "x/?", "[a]", "x/a/y/b/z", "é", "-b", "-b/x/b",
]  # fmt: skip
WRITTEN = r"""
*.b|a/|/a|a/b|a/**|**/a|**/b/a|a/**/b|/a/*|a/*/b|!b|*;!a/b|[ab]|[!a]|[^a]b|[a-c]b|[]]|[!]]|[a-]|a?|?|\#a|\!a|#a|a\ b|
a b|a |a\ |***|a**|**a|**/|/**|**|/|!|\|[|[a|a[|x/**/b/**|**/a/**/b|[[:alpha:]]|[[:foo:]]|[[:digit:]a]|\[a]|a\*|*/b|*/*|
x/?|a/\*|*a*b*|**/**/a|a/**/**/b|b/**/a.*|*.b;!a.b|a/;!a/b|/**/b|[a-c/]b|a[/]b|a/[!x]|***/*|-**/b|a**/b|?**/b|??|é|
[[:punct:]]|[[:cntrl:]]|[[:space:][:blank:]b]|[[:print:]]b
""".replace("\n", "").split("|")


@pytest.mark.parametrize("text", [pattern.replace(";", "\n") for pattern in WRITTEN])
def test_what_git_ignores_is_ignored(tmp_path: Path, text: str) -> None:
    ignore = GitIgnore(text)
    assert {path for path in PATHS if ignore.ignores(path)} == ignored_by_git(tmp_path, text, PATHS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text(alphabet="[]!*?/ab-^é", min_size=1, max_size=8), min_size=1, max_size=3))
def test_what_git_ignores_is_ignored_whatever_is_written(tmp_path: Path, lines: list[str]) -> None:
    text = "\n".join(lines)
    ignore = GitIgnore(text)
    assert {path for path in PATHS if ignore.ignores(path)} == ignored_by_git(tmp_path, text, PATHS)


@pytest.mark.parametrize("committed", [False, True])
def test_a_pattern_made_to_take_years_takes_no_time(
    hub: RunningHub, api: HfApi, new_repo: Callable[..., str], committed: bool
) -> None:
    repo = new_repo()
    body: dict[str, object] = {"files": [{"path": "a" * 200, "size": 1}]}
    if committed:
        api.create_commit(
            repo, [CommitOperationAdd(".gitignore", SLOW.encode())], commit_message="x", repo_type="kernel"
        )
    else:
        body["gitIgnore"] = SLOW
    # "No time" beside years; a busy machine takes its time over any request.
    answer = httpx2.post(f"{hub.endpoint}/api/kernels/{repo}/preupload/main", json=body, timeout=60)
    assert answer.json()["files"][0]["shouldIgnore"] is False


def test_more_patterns_than_anyone_writes_are_refused() -> None:
    with pytest.raises(Problem, match="longer than 64 KiB"):
        GitIgnore("a\n" * 40_000)
    start = time.process_time()
    many = GitIgnore("*a*a*a*\n" * 8000)
    with pytest.raises(Problem, match="too long"):
        any(many.ignores("b" * 100 + str(number)) for number in range(100_000))
    assert time.process_time() - start < 10
