"""A request for a repository by a former name is sent on to its present one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from localhub import RunningHub, fsck, running_hub
from localhub.names import RepoId
from localhub.store import Store

NewRepo = Callable[..., str]


@pytest.fixture
def moved(api: HfApi, new_repo: NewRepo) -> tuple[str, str]:
    """The former and the present name of a repository with a file."""
    old = new_repo()
    api.upload_file(path_or_fileobj=b"here", path_in_repo="a/b c.txt", repo_id=old, repo_type="kernel")
    new = f"{old}-moved"
    api.move_repo(old, new, repo_type="kernel")
    return old, new


def test_the_client_reads_and_writes_by_the_former_name(
    api: HfApi, moved: tuple[str, str], tmp_path: Path
) -> None:
    old, new = moved
    assert api.repo_info(old, repo_type="kernel").id == new
    assert "a/b c.txt" in {item.path for item in api.list_repo_tree(old, repo_type="kernel", recursive=True)}
    assert [item.path for item in api.get_paths_info(old, ["a/b c.txt"], repo_type="kernel")] == ["a/b c.txt"]
    assert api.list_repo_refs(old, repo_type="kernel").branches[0].name == "main"
    file = api.hf_hub_download(old, "a/b c.txt", repo_type="kernel", cache_dir=tmp_path / "one")
    assert Path(file).read_bytes() == b"here"
    folder = api.snapshot_download(old, repo_type="kernel", cache_dir=tmp_path / "two")
    assert Path(folder, "a", "b c.txt").read_bytes() == b"here"
    api.create_branch(old, branch="v1", repo_type="kernel")
    info = api.create_commit(
        old, [CommitOperationAdd("new.txt", b"x")], commit_message="x", repo_type="kernel", revision="v1"
    )
    assert api.list_repo_commits(new, repo_type="kernel", revision="v1")[0].commit_id == info.oid


def test_git_clones_from_the_former_address(hub: RunningHub, moved: tuple[str, str], tmp_path: Path) -> None:
    for suffix in ("", ".git"):
        place = tmp_path / f"clone{suffix}"
        command = ["git", "clone", "--quiet", f"{hub.endpoint}/kernels/{moved[0]}{suffix}", str(place)]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        assert (place / "a" / "b c.txt").read_bytes() == b"here"


def test_the_answer_is_a_relative_redirect_that_keeps_method_and_query(
    hub: RunningHub, moved: tuple[str, str]
) -> None:
    old, new = moved
    for method, path in [
        ("HEAD", "/kernels/{}/resolve/refs%2Fheads%2Fmain/a/b%20c.txt?x=1&y"),
        ("GET", "/api/kernels/{}/tree/main?recursive=true"),
        ("POST", "/api/kernels/{}/commit/main"),
        ("GET", "/kernels/{}"),
    ]:
        answer = httpx2.request(method, hub.endpoint + path.format(old))
        assert (answer.status_code, answer.headers["location"]) == (307, path.format(new)), path


def test_every_former_name_leads_to_the_last_and_a_new_repository_takes_its_name_back(
    api: HfApi, new_repo: NewRepo
) -> None:
    first = new_repo()
    second, third = f"{first}-b", f"{first}-c"
    api.move_repo(first, second, repo_type="kernel")
    api.move_repo(second, third, repo_type="kernel")
    assert [api.repo_info(name, repo_type="kernel").id for name in (first, second)] == [third, third]
    api.create_repo(first, repo_type="kernel")
    assert api.repo_info(first, repo_type="kernel").id == first
    api.move_repo(third, second, repo_type="kernel")
    assert api.repo_info(third, repo_type="kernel").id == second
    api.delete_repo(second, repo_type="kernel")
    for gone in (second, third):
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info(gone, repo_type="kernel")


def test_a_private_repository_does_not_give_its_new_name_away(root: Path) -> None:
    store = Store(root)
    store.create(RepoId("kernel", "org", "secret"), private=True, author="a")
    store.move(RepoId("kernel", "org", "secret"), RepoId("kernel", "org", "hidden"))
    with running_hub(root) as hub:
        answer = httpx2.get(f"{hub.endpoint}/api/kernels/org/secret")
        assert answer.status_code == 404
        assert "hidden" not in answer.text


def test_a_hub_knows_former_names_after_a_restart(root: Path) -> None:
    store = Store(root)
    store.create(RepoId("kernel", "org", "one"), private=False, author="a")
    store.move(RepoId("kernel", "org", "one"), RepoId("kernel", "team", "two"))
    with running_hub(root) as hub:
        assert (
            HfApi(endpoint=hub.endpoint, token=False).repo_info("org/one", repo_type="kernel").id
            == "team/two"
        )
    assert fsck(root).faults == ()


def test_a_repository_that_is_made_while_it_is_asked_for_is_not_sent_to_itself(root: Path) -> None:
    # The request found nothing, another one creates it, and the first looks for where it may have gone.
    store = Store(root)
    repo = RepoId("kernel", "org", "k")
    assert store.get(repo) is None
    store.create(repo, private=False, author="a")
    assert store.moved(repo) is None
    assert store.moved(RepoId("kernel", "Org", "K")) == repo
