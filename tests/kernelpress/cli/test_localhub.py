"""The commands that run a Hub of one's own and look after it."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest
from command_line import kernelpress


def test_a_token_is_made_for_a_hub_that_is_there_or_was_named(tmp_path: Path) -> None:
    def token(*arguments: str) -> CompletedProcess[str]:
        return kernelpress("token", *arguments, cwd=tmp_path)

    lost = token("create", "alice")
    assert lost.returncode == 1
    assert "there is no Hub here; name its directory with --root" in lost.stderr
    assert token("revoke", "alice", "--root", "nowhere").returncode == 1
    assert list(tmp_path.iterdir()) == []
    created = token("create", "alice", "--root", "hub")
    assert created.returncode == 0
    assert created.stdout.startswith("kp_")
    assert "made hub for a new Hub" in created.stderr
    assert token("create", "bob", "--root", "hub").stderr == ""
    assert token("list", "--root", "hub").stdout.count("write") == 2


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["fsck"], "there is no Hub here"),
        (["clean"], "there is no Hub here"),
        (["serve", "--trust", "a/b"], "cannot be the name of an organization"),
        (["token", "create", "a/b", "--root", "."], "no valid token name"),
    ],
)
def test_an_error_of_the_hub_is_one_line_and_no_traceback(
    tmp_path: Path, command: list[str], reason: str
) -> None:
    answer = kernelpress(*command, cwd=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert reason in answer.stderr
    assert answer.stderr.count("\n") == 1
