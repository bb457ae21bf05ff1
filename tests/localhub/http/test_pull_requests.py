"""Pull requests, moving, gates and tokens for single organizations, with the real client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from localhub import RunningHub, create_token, fsck, revoke_tokens, running_hub
from localhub.errors import HubError

NewRepo = Callable[..., str]


def add(path: str, data: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, data)]


def model(api: HfApi, name: str) -> str:
    # A model: the client has functions for pull requests of these only.
    api.create_repo(name)
    return name


def test_a_pull_request_leaves_main_alone_until_it_is_merged(api: HfApi, tmp_path: Path) -> None:
    repo = model(api, "pulls/merged")
    before = api.model_info(repo).sha
    info = api.create_commit(repo, add("a.txt", b"1"), commit_message="Add a", create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    api.create_commit(repo, add("b.txt", b"2"), commit_message="Add b", revision="refs/pr/1")
    assert api.model_info(repo).sha == before
    assert {"a.txt", "b.txt"} <= set(api.list_repo_files(repo, revision="refs/pr/1"))
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1"]
    api.create_commit(repo, add("c.txt", b"3"), commit_message="meanwhile")
    api.merge_pull_request(repo, 1)
    assert {"a.txt", "b.txt", "c.txt"} <= set(api.list_repo_files(repo))
    details = api.get_discussion_details(repo, 1)
    assert (details.status, details.title) == ("merged", "Add a")
    with pytest.raises(HfHubHTTPError, match="is merged"):
        api.merge_pull_request(repo, 1)


def test_a_pull_request_that_conflicts_is_not_merged_and_says_where(api: HfApi) -> None:
    repo = model(api, "pulls/conflict")
    api.create_commit(repo, add("a.txt", b"1"), commit_message="theirs", create_pr=True)
    ours = api.create_commit(repo, add("a.txt", b"2"), commit_message="ours")
    with pytest.raises(HfHubHTTPError, match=r"main has changed these since: a\.txt"):
        api.merge_pull_request(repo, 1)
    assert api.model_info(repo).sha == ours.oid
    assert api.get_discussion_details(repo, 1).conflicting_files == ["a.txt"]
    api.change_discussion_status(repo, 1, "closed")
    assert [pull.status for pull in api.get_repo_discussions(repo)] == ["closed"]


def test_a_pull_request_of_a_kernel_is_made_and_only_on_main(
    hub: RunningHub, api: HfApi, new_repo: NewRepo
) -> None:
    repo = new_repo()
    info = api.create_commit(repo, add("x", b"1"), commit_message="x", repo_type="kernel", create_pr=True)
    assert info.pr_url == f"{hub.endpoint}/kernels/{repo}/discussions/1"
    answer = httpx2.post(f"{hub.endpoint}/api/kernels/{repo}/commit/v1?create_pr=1", content=b"")
    assert (answer.status_code, "for main only" in answer.text) == (400, True)


def test_a_kernel_answers_for_a_model_that_does_not_exist_and_takes_no_writes_as_one(
    api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=repo, repo_type="kernel")
    got = api.hf_hub_download(repo, "x", repo_type="model", local_dir=tmp_path)
    assert Path(got).read_bytes() == b"1"
    assert api.list_repo_refs(repo, repo_type="model").branches[0].name == "main"
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=repo, repo_type="model")


def test_a_repository_moves_with_everything_in_it(hub: RunningHub, api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    oid = api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=repo, repo_type="kernel").oid
    api.move_repo(repo, f"{repo}-moved", repo_type="kernel")
    assert api.kernel_info(f"{repo}-moved").sha == oid
    assert api.kernel_info(repo).id == f"{repo}-moved"
    taken = new_repo()
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.move_repo(f"{repo}-moved", taken, repo_type="kernel")
    assert fsck(hub.root).faults == ()


def test_tokens_of_one_organization_gates_and_revoking(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    ours, theirs = (
        create_token(root, "us", organizations=["us"]),
        create_token(root, "them", organizations=["them"]),
    )
    with running_hub(root) as hub:
        us, them = HfApi(endpoint=hub.endpoint, token=ours), HfApi(endpoint=hub.endpoint, token=theirs)
        nobody = HfApi(endpoint=hub.endpoint, token=False)
        us.create_repo("us/open")
        us.create_repo("us/private", private=True)
        us.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="us/open")
        with pytest.raises(HfHubHTTPError, match="other organizations than 'us'"):
            them.upload_file(path_or_fileobj=b"2", path_in_repo="x", repo_id="us/open")
        with pytest.raises(HfHubHTTPError, match="other organizations"):
            them.create_repo("us/theirs")
        with pytest.raises(RepositoryNotFoundError):
            them.model_info("us/private")
        us.update_repo_settings("us/open", gated="auto")
        with pytest.raises(GatedRepoError):
            nobody.hf_hub_download("us/open", "x", local_dir=tmp_path / "a")
        assert Path(them.hf_hub_download("us/open", "x", local_dir=tmp_path / "b")).read_bytes() == b"1"
        us.update_repo_settings("us/open", gated="manual")
        with pytest.raises(GatedRepoError):
            them.hf_hub_download("us/open", "x", local_dir=tmp_path / "c")
        assert Path(us.hf_hub_download("us/open", "x", local_dir=tmp_path / "d")).read_bytes() == b"1"
        assert revoke_tokens(root, "us") == 1
        with pytest.raises(HfHubHTTPError, match="401"):
            us.upload_file(path_or_fileobj=b"3", path_in_repo="x", repo_id="us/open")
        revoke_tokens(root, "them")
        with pytest.raises(HfHubHTTPError, match="only with a token"):
            nobody.create_repo("us/nobodys")


@pytest.mark.parametrize("damage", ["flipped", "missing", "large", "settings"])
def test_fsck_finds_what_was_damaged(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "hub"
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.create_repo("org/k", repo_type="kernel")
        oid = api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="org/k", repo_type="kernel").oid
    assert fsck(root).faults == ()
    place = root / "repos" / "kernels" / "org" / "k.git"
    commit = place / "objects" / oid[:2] / oid[2:]
    commit.chmod(0o644)
    if damage == "flipped":
        data = bytearray(commit.read_bytes())
        data[len(data) // 2] ^= 1
        commit.write_bytes(data)
    elif damage == "missing":
        commit.unlink()
    elif damage == "large":
        large = place / "lfs" / "objects" / "00" / "00" / ("0" * 64)
        large.parent.mkdir(parents=True)
        large.write_bytes(b"?")
    else:
        (place / "hub.json").write_text("{")
    faults = fsck(root).faults
    assert faults
    assert all(fault.startswith("kernels/org/k: ") for fault in faults)


def test_fsck_of_a_directory_that_is_no_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no Hub here"):
        fsck(tmp_path)
