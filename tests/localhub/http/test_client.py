"""The unmodified huggingface_hub client against the embedded Hub."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from localhub import RunningHub, create_token, running_hub

NewRepo = Callable[..., str]
AWKWARD = {
    "bytes.bin": bytes(range(256)) * 40,
    "latin1.txt": "caf\xe9 \xfc".encode("latin-1"),
    "crlf.txt": b"one\r\ntwo\rthree\n\n",
    "empty": b"",
    ".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.txt text eol=crlf\n",
    "folder/sub folder/\u00e9\u4e2d#%?&+.py": b"x = 1\n",
}


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


def commit(api: HfApi, repo: str, *operations: object, **options: object) -> str:
    info = api.create_commit(
        repo,
        list(operations),  # type: ignore[arg-type]
        repo_type="kernel",
        commit_message=str(options.pop("message", "change")),
        **options,  # type: ignore[arg-type]
    )
    return info.oid  # type: ignore[return-value]


def files(api: HfApi, repo: str, revision: str | None = None) -> set[str]:
    return set(api.list_repo_files(repo, repo_type="kernel", revision=revision))


def test_new_repository_has_one_commit_on_main(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    refs = api.list_repo_refs(repo, repo_type="kernel")
    assert [branch.ref for branch in refs.branches] == ["refs/heads/main"]
    commits = api.list_repo_commits(repo, repo_type="kernel")
    assert [item.commit_id for item in commits] == [refs.branches[0].target_commit]
    assert api.kernel_info(repo).sha == refs.branches[0].target_commit


def test_creating_an_existing_repository_is_an_error_unless_told_otherwise(
    api: HfApi, hub: RunningHub, new_repo: NewRepo
) -> None:
    repo = new_repo()
    assert api.create_repo(repo, repo_type="kernel", exist_ok=True) == f"{hub.endpoint}/kernels/{repo}"
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo(repo, repo_type="kernel")
    assert caught.value.response.status_code == 409


def test_kernel_and_model_of_one_name_are_two_repositories(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    assert api.create_repo(repo) == f"{api.endpoint}/{repo}"
    api.upload_file(path_or_fileobj=b"model", path_in_repo="config.json", repo_id=repo)
    assert files(api, repo) == {".gitattributes"}
    assert api.model_info(repo, files_metadata=True).siblings is not None
    sizes = {item.rfilename: item.size for item in api.model_info(repo, files_metadata=True).siblings or []}
    assert sizes["config.json"] == 5
    api.delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)
    assert api.kernel_info(repo).id == repo


def test_every_byte_comes_back(api: HfApi, new_repo: NewRepo, tmp_path: Path) -> None:
    repo = new_repo()
    commit(api, repo, *(add(path, data) for path, data in AWKWARD.items()))
    folder = Path(api.snapshot_download(repo, repo_type="kernel", cache_dir=tmp_path))
    downloaded = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert downloaded == AWKWARD


def test_tree_listing_gives_git_blob_ids_and_sizes(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    commit(api, repo, add("a/b.txt", b"hello\n"))
    listed = {item.path: item for item in api.list_repo_tree(repo, "a", repo_type="kernel")}
    # The id that `git hash-object` gives for this content.
    assert listed["a/b.txt"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # type: ignore[union-attr]
    assert listed["a/b.txt"].size == 6  # type: ignore[union-attr]


def test_upload_folder_honours_gitignore_and_deletes_what_matches(
    api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    commit(api, repo, add("build/old.py", b"old"), add("keep.txt", b"k"))
    for name, data in {
        "new.py": "n",
        "sub/skip.pyc": "x",
        "sub/cache/deep.txt": "d",
        ".gitignore": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(data)
    (tmp_path / ".gitignore").write_text("*.pyc\ncache/\n")
    api.upload_folder(
        repo_id=repo, repo_type="kernel", folder_path=tmp_path, path_in_repo="build", delete_patterns="*"
    )
    # Only a .gitignore at the repository's root counts, so this one is a file like any other.
    assert files(api, repo) == {
        ".gitattributes", "keep.txt", "build/new.py", "build/sub/skip.pyc", "build/sub/cache/deep.txt",
        "build/.gitignore",
    }  # fmt: skip
    api.upload_folder(repo_id=repo, repo_type="kernel", folder_path=tmp_path)
    assert {path for path in files(api, repo) if not path.startswith("build/")} == {
        ".gitattributes", ".gitignore", "keep.txt", "new.py",
    }  # fmt: skip


def test_operations_of_a_commit_apply_in_order(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    commit(api, repo, add("build/a.py", b"a"), add("build/sub/b.py", b"b"), add("file", b"f"))
    commit(api, repo, CommitOperationDelete("build/"), add("build/c.py", b"c"), CommitOperationDelete("file"))
    assert files(api, repo) == {".gitattributes", "build/c.py"}
    commit(api, repo, CommitOperationDelete("build/c.py"), add("build", b"now a file"))
    assert files(api, repo) == {".gitattributes", "build"}


def test_copy_within_a_repository(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    commit(api, repo, add("a", b"content"))
    commit(api, repo, CommitOperationCopy("a", "b/c"))
    a, c = api.get_paths_info(repo, ["a", "b/c"], repo_type="kernel")
    assert a.blob_id == c.blob_id  # type: ignore[union-attr]


def test_uploading_an_unchanged_file_commits_nothing(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    first = commit(api, repo, add("a", b"same"))
    assert commit(api, repo, add("a", b"same")) == first


def test_deleting_what_is_not_there_is_entry_not_found(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    commit(api, repo, add("folder/a", b"a"))
    with pytest.raises(EntryNotFoundError, match="differentiate file and folder"):
        commit(api, repo, CommitOperationDelete("other", is_folder=False))
    with pytest.raises(EntryNotFoundError):
        commit(api, repo, CommitOperationDelete("folder/a", is_folder=True))
    with pytest.raises(BadRequestError, match="is a file there"):
        commit(api, repo, add("folder/a/b", b"b"))
    with pytest.raises(BadRequestError, match="a folder of this name exists"):
        commit(api, repo, add("folder", b"b"))
    assert files(api, repo) == {".gitattributes", "folder/a"}
    # As on the Hugging Face Hub, whose client marks folders by a slash only where it is told that they are some.
    commit(api, repo, CommitOperationDelete("folder", is_folder=False))
    assert files(api, repo) == {".gitattributes"}


def test_branches_and_tags_point_where_they_were_made(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    first = commit(api, repo, add("a", b"1"))
    api.create_branch(repo, branch="v1", repo_type="kernel")
    api.create_tag(repo, tag="light", repo_type="kernel")
    api.create_tag(repo, tag="annotated", tag_message="why\nand how", repo_type="kernel", revision="v1")
    second = commit(api, repo, add("a", b"2"), revision="v1")
    api.create_branch(repo, branch="from-sha", revision=first, repo_type="kernel")
    api.create_branch(repo, branch="feature/x", revision="v1", repo_type="kernel")
    refs = api.list_repo_refs(repo, repo_type="kernel")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": first, "v1": second, "from-sha": first, "feature/x": second,
    }  # fmt: skip
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"light": first, "annotated": first}
    for revision, expected in {
        "feature/x": second, "annotated": first, first: first, "refs/heads/v1": second,
    }.items():  # fmt: skip
        assert api.kernel_info(repo, revision=revision).sha == expected


def test_branch_names_in_use_are_conflicts(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    api.create_branch(repo, branch="v1", repo_type="kernel")
    api.create_branch(repo, branch="v1", repo_type="kernel", exist_ok=True)
    for name in ("v1", "v1/sub"):
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_branch(repo, branch=name, repo_type="kernel")
        assert caught.value.response.status_code == 409
    api.delete_branch(repo, branch="v1", repo_type="kernel")
    api.create_branch(repo, branch="v1/sub", repo_type="kernel")
    with pytest.raises(HfHubHTTPError):
        api.create_branch(repo, branch="v1", repo_type="kernel")
    api.delete_branch(repo, branch="v1/sub", repo_type="kernel")
    api.create_branch(repo, branch="v1", repo_type="kernel")
    with pytest.raises(BadRequestError, match="default branch"):
        api.delete_branch(repo, branch="main", repo_type="kernel")
    with pytest.raises(RevisionNotFoundError):
        api.delete_branch(repo, branch="never", repo_type="kernel")


def test_what_does_not_exist_raises_the_clients_own_exceptions(
    api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    commit(api, repo, add("a", b"1"))
    for call in (api.kernel_info, api.model_info):
        with pytest.raises(RepositoryNotFoundError):
            call("org/never")
    for revision in ("never", "f" * 40, "no..such", "\udcff"):
        with pytest.raises((RevisionNotFoundError, UnicodeEncodeError)):
            api.kernel_info(repo, revision=revision)
    with pytest.raises(RevisionNotFoundError):
        commit(api, repo, add("a", b"2"), revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "nope", repo_type="kernel", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "a", repo_type="kernel"))
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(repo, "a", revision="v9", repo_type="kernel", cache_dir=tmp_path)


def test_commit_against_a_stale_parent_is_refused_and_changes_nothing(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    first = commit(api, repo, add("a", b"1"))
    second = commit(api, repo, add("a", b"2"), parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="a commit has happened since") as caught:
        commit(api, repo, add("a", b"3"), parent_commit=first)
    assert caught.value.response.status_code == 412
    assert api.kernel_info(repo).sha == second


def test_commit_messages_come_back_as_title_and_description(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    commit(api, repo, add("a", b"1"), message="Ti\u00dftle", commit_description="one\n\ntwo <b>")
    newest = api.list_repo_commits(repo, repo_type="kernel", formatted=True)[0]
    assert (newest.title, newest.message) == ("Ti\u00dftle", "one\n\ntwo <b>")
    assert newest.formatted_message == "one\n\ntwo &lt;b&gt;"


def test_long_trees_and_histories_are_paged_without_loss(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    names = [f"many/{number:04}.txt" for number in range(1203)]
    commit(api, repo, *(add(name, name.encode()) for name in names))
    listed = [item.path for item in api.list_repo_tree(repo, recursive=True, repo_type="kernel")]
    assert listed == [".gitattributes", "many", *names]
    expanded = list(api.list_repo_tree(repo, "many", expand=True, repo_type="kernel"))
    assert [item.path for item in expanded] == names
    for number in range(55):
        commit(api, repo, add("n", str(number).encode()), message=str(number))
    titles = [item.title for item in api.list_repo_commits(repo, repo_type="kernel")]
    assert titles == [*(str(number) for number in reversed(range(55))), "change", "initial commit"]


def test_expand_names_the_commit_that_last_changed_each_path(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    commit(api, repo, add("a", b"1"), add("d/b", b"1"), message="first")
    commit(api, repo, add("d/c", b"1"), message="second")
    tree = api.list_repo_tree(repo, recursive=True, expand=True, repo_type="kernel")
    titles = {item.path: item.last_commit.title for item in tree if item.last_commit is not None}
    assert titles == {
        ".gitattributes": "initial commit", "a": "first", "d": "second", "d/b": "first", "d/c": "second",
    }  # fmt: skip


def test_a_file_that_did_not_change_is_not_downloaded_again(
    api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    commit(api, repo, add("same", b"same"), add("new", b"1"))
    one = Path(api.snapshot_download(repo, repo_type="kernel", cache_dir=tmp_path))
    commit(api, repo, add("new", b"2"))
    two = Path(api.snapshot_download(repo, repo_type="kernel", cache_dir=tmp_path))
    assert (two / "new").read_bytes() == b"2"
    # The client's cache shares one blob between revisions when the ETag is the same.
    assert (one / "same").resolve() == (two / "same").resolve()
    assert (one / "new").resolve() != (two / "new").resolve()


def test_resolve_speaks_http_caching_and_ranges(api: HfApi, hub: RunningHub, new_repo: NewRepo) -> None:
    repo = new_repo()
    oid = commit(api, repo, add("d/f.txt", b"0123456789"))
    url = f"{hub.endpoint}/kernels/{repo}/resolve/main/d/f.txt"
    head = httpx2.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "10")
    assert head.headers["x-repo-commit"] == oid
    etag = head.headers["etag"]
    unchanged = httpx2.get(url, headers={"If-None-Match": f'"other", W/{etag}'})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    for byte_range, status, content, span in [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=0-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=4-2", 200, b"0123456789", None),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
    ]:
        answer = httpx2.get(url, headers={"Range": byte_range})
        assert (answer.status_code, answer.headers.get("content-range")) == (status, span), byte_range
        assert content is None or answer.content == content
    stale = httpx2.get(url, headers={"Range": "bytes=2-4", "If-Range": '"old"'})
    assert (stale.status_code, stale.content) == (200, b"0123456789")
    for path in ("raw/main/d/f.txt", "resolve/refs/heads/main/d/f.txt", f"resolve/{oid}/d%2Ff.txt"):
        assert httpx2.get(f"{hub.endpoint}/kernels/{repo}/{path}").content == b"0123456789"


def test_a_files_type_is_never_one_that_a_browser_runs(
    api: HfApi, hub: RunningHub, new_repo: NewRepo
) -> None:
    repo = new_repo()
    commit(
        api, repo, add("page.html", b"<script>alert(1)</script>"), add("x.svg", b"<svg/>"), add("b", b"\0")
    )
    for name, expected in {
        "page.html": "text/plain",
        "x.svg": "text/plain",
        "b": "application/octet-stream",
    }.items():
        answer = httpx2.get(f"{hub.endpoint}/kernels/{repo}/resolve/main/{name}")
        assert answer.headers["content-type"].split(";")[0] == expected
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_invalid_card_metadata_is_refused_by_the_client(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    with pytest.raises(ValueError, match="not valid YAML"):
        commit(api, repo, add("README.md", b"---\nlicense: [mit\n---\n# Title\n"))
    commit(api, repo, add("README.md", b"---\nlicense: mit\n---\n# Title\n"))
    assert "README.md" in files(api, repo)


def test_listing_searches_names_and_owners(api: HfApi, hub: RunningHub) -> None:
    for name in ("searchable/alpha", "searchable/beta", "elsewhere/alpha"):
        api.create_repo(name)
    assert [item.id for item in api.list_models(search="ALPHA")] == ["elsewhere/alpha", "searchable/alpha"]
    assert [item.id for item in api.list_models(author="searchable")] == [
        "searchable/alpha",
        "searchable/beta",
    ]
    assert len(list(api.list_models(limit=1))) == 1
    kernels = httpx2.get(f"{hub.endpoint}/api/kernels", params={"search": "searchable"})
    assert kernels.json() == []


def test_a_listing_does_what_it_is_asked_or_says_that_it_does_not(root: Path) -> None:
    token = create_token(root, "alice")
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=token)
        for name in ("org/b", "org/a", "org/c"):
            api.create_repo(name)
        api.update_repo_settings("org/b", gated="auto")
        # Commits have times in seconds: a change on the next one is later.
        before = time.time()
        while int(time.time()) == int(before):
            time.sleep(0.05)
        api.upload_file(path_or_fileobj=b"x", path_in_repo="f", repo_id="org/c")

        def listed(**options: Any) -> list[str]:
            return [info.id for info in api.list_models(**options)]

        assert listed() == ["org/a", "org/b", "org/c"]
        assert listed(gated=True) == ["org/b"]
        assert listed(gated=False) == ["org/a", "org/c"]
        assert listed(sort="last_modified")[0] == "org/c"
        assert listed(sort="likes") == ["org/a", "org/b", "org/c"]
        assert listed(limit=2, search="ORG", author="org") == ["org/a", "org/b"]
        [info] = api.list_models(search="org/c", expand=["sha", "siblings"])
        assert [file.rfilename for file in info.siblings or ()] == [".gitattributes", "f"]
        assert (info.sha, info.author) == (api.model_info("org/c").sha, None)
        [info] = api.list_models(search="org/c", full=True)
        assert len(info.siblings or ()) == 2
        assert next(iter(api.list_models())).siblings is None
        for options in (
            {"filter": "text-generation"}, {"num_parameters": "min:1B"}, {"pipeline_tag": "x"}, {"apps": "y"},
            {"inference": "warm"}, {"cardData": True}, {"fetch_config": True}, {"expand": ["safetensors"]},
        ):  # fmt: skip
            with pytest.raises(BadRequestError, match=r"does not (implement|keep) these"):
                listed(**options)


@pytest.mark.parametrize(
    "path",
    [
        "", "/org/k", "/org/k/refs", "/org/k/tree/main", "/org/k/commits/main", "/org/k/discussions",
    ],
)  # fmt: skip
def test_a_parameter_that_means_nothing_here_is_refused(hub: RunningHub, api: HfApi, path: str) -> None:
    api.create_repo("org/k", repo_type="kernel", exist_ok=True)
    assert httpx2.get(f"{hub.endpoint}/api/kernels{path}").status_code == 200
    answer = httpx2.get(f"{hub.endpoint}/api/kernels{path}?colour=red")
    assert (answer.status_code, "colour" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    "query", ["?sort=size", "?direction=1", "?gated=maybe", "/org/k/discussions?status=x", "/org/k/discussions?type=x",
              "/org/k/commits/main?expand=x"],
)  # fmt: skip
def test_a_value_that_means_nothing_here_is_refused(hub: RunningHub, api: HfApi, query: str) -> None:
    api.create_repo("org/k", repo_type="kernel", exist_ok=True)
    assert httpx2.get(f"{hub.endpoint}/api/kernels{query}").status_code == 400


def test_a_deleted_repository_comes_back_empty(api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    old = commit(api, repo, add("secret", b"1"))
    # Read it, so that it is in the Hub's cache.
    assert api.kernel_info(repo, revision=old).sha == old
    api.delete_repo(repo, repo_type="kernel")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo, repo_type="kernel")
    api.delete_repo(repo, repo_type="kernel", missing_ok=True)
    api.create_repo(repo, repo_type="kernel")
    assert files(api, repo) == {".gitattributes"}
    with pytest.raises(RevisionNotFoundError):
        api.kernel_info(repo, revision=old)


def test_what_is_not_implemented_says_so(hub: RunningHub, api: HfApi, new_repo: NewRepo) -> None:
    repo = new_repo()
    api.create_repo(repo)
    with pytest.raises(HfHubHTTPError, match="does not implement POST"):
        api.create_discussion(repo, title="x")
    answer = httpx2.patch(f"{hub.endpoint}/api/kernels/{repo}")
    assert (answer.status_code, answer.json()) == (
        405, {"error": f"the embedded Hub does not implement PATCH /api/kernels/{repo}"},
    )  # fmt: skip
    with pytest.raises(RepositoryNotFoundError, match="serves kernel and model repositories only"):
        api.dataset_info("org/data")
