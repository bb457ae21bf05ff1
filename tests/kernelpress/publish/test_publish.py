from __future__ import annotations

import re
import socket
from pathlib import Path

import httpx2
import pytest
from dulwich import porcelain
from huggingface_hub import CommitOperationAdd, HfApi
from kernelpress.errors import PublishError
from kernelpress.hub.client import RefusedError
from kernelpress.hub.client import hub as client
from kernelpress.publish.plan import plan
from kernelpress.publish.publish import PublishOptions, publish
from localhub import create_token, running_hub
from sample_kernel import PACKAGE, commits, content, edit, files, heads, make

pytestmark = pytest.mark.usefixtures("no_settings_of_the_developers_own")


LOAD = """
import sys, torch
from kernels import get_kernel
kernel = get_kernel(sys.argv[1], version=int(sys.argv[2]))
print(kernel.__name__, kernel.twice(torch.ones(1)).item())
"""


def test_the_unmodified_loader_fetches_and_runs_what_was_published(make_kernel, api, repo, server, run_clean):
    kernel = make(make_kernel())
    published = publish(kernel, repo, api)
    assert [branch.name for branch in published.branches] == ["v1", "main"]
    loaded = run_clean(LOAD, repo, "1", HF_ENDPOINT=server.endpoint)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout == f"{kernel.variants[0].id} 2.0\n"


def test_both_branches_hold_the_card_and_the_build_and_nothing_else(make_kernel, api, repo):
    kernel = make(make_kernel())
    publish(kernel, repo, api)
    expected = {f"build/{variant.name}/{file.path}" for variant in kernel.variants for file in variant.files}
    for branch in ("v1", "main"):
        assert files(api, repo, branch) - {".gitattributes"} == {*expected, "README.md"}


def test_pictures_of_the_card_are_published_beside_it_and_shown_on_the_page(make_kernel, api, repo, server):
    text = "![Time of a step](docs/time%20a.png) ![elsewhere](https://example.org/x.png)\n\n    ![code](no.png)\n"
    root = make_kernel(**{"CARD.md": f"---\nlicense: mit\n---\n{text}"})
    picture = b"\x89PNG\r\n\x1a\n" + bytes(2000)
    (root / "docs").mkdir()
    (root / "docs/time a.png").write_bytes(picture)
    publish(make(root), repo, api)
    for branch in ("v1", "main"):
        assert {name for name in files(api, repo, branch) if not name.startswith("build/")} == {
            ".gitattributes",
            "README.md",
            "docs/time a.png",
        }
    shown = httpx2.get(f"{server.endpoint}/kernels/{repo}").text
    (address,) = re.findall(r'<img src="(/[^"]+)" alt="Time of a step"', shown)
    answer = httpx2.get(server.endpoint + address)
    assert (answer.content, answer.headers["content-type"]) == (picture, "image/png")
    assert not any(branch.changed for branch in publish(make(root), repo, api).branches)
    # A new picture alone is published, too: it is what the page shows.
    (root / "docs/time a.png").write_bytes(picture + b"2")
    assert [branch.added for branch in publish(make(root), repo, api).branches] == [1, 1]


def test_each_branch_gets_one_commit(make_kernel, api, repo):
    api.create_repo(repo, repo_type="kernel")
    before = commits(api, repo, "main")
    publish(make(make_kernel()), repo, api)
    assert {branch: commits(api, repo, branch) - before for branch in ("v1", "main")} == {"v1": 1, "main": 1}
    assert set(heads(api, repo)) == {"v1", "main"}


def test_second_publish_of_same_sources_commits_nothing(make_kernel, api, repo):
    root = make_kernel()
    first = publish(make(root), repo, api)
    before = heads(api, repo)
    second = publish(make(root), repo, api)
    assert all(branch.changed for branch in first.branches)
    assert not any(branch.changed for branch in second.branches)
    assert [branch.commit for branch in second.branches] == [before["v1"], before["main"]]
    assert heads(api, repo) == before


def test_a_new_commit_of_the_same_sources_publishes_nothing(make_kernel, api, repo):
    root = make_kernel()
    porcelain.init(str(root))
    everything = [str(path) for path in root.rglob("*") if path.is_file() and ".git" not in path.parts]
    builds = []
    for message in (b"one", b"two"):
        porcelain.add(str(root), everything)
        porcelain.commit(str(root), message=message, author=b"A <a@b>", committer=b"A <a@b>")
        builds.append(make(root))
    assert builds[0].variants != builds[1].variants, "the metadata names the commit"
    publish(builds[0], repo, api)
    before = heads(api, repo)
    publish(builds[1], repo, api)
    assert heads(api, repo) == before


def test_a_changed_source_is_published_with_its_metadata(make_kernel, api, repo, tmp_path):
    root = make_kernel()
    publish(make(root), repo, api)
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 20")
    kernel = make(root)
    publish(kernel, repo, api)
    for branch in ("v1", "main"):
        where = tmp_path / "got"
        assert "FACTOR = 20" in content(api, repo, "build/torch-cpu/twice.py", branch, where)
        assert kernel.variants[0].id in content(api, repo, "build/torch-cpu/metadata.json", branch, where)


def test_files_gone_from_the_build_go_from_the_branch_and_others_stay(make_kernel, api, repo):
    root = make_kernel(**{f"{PACKAGE}/extra.py": "X = 1\n"})
    publish(make(root), repo, api)
    for branch in ("v1", "main"):
        api.create_commit(
            repo,
            [CommitOperationAdd("notes.md", b"mine"), CommitOperationAdd("build/stray.txt", b"?")],
            commit_message="by hand", repo_type="kernel", revision=branch,
        )  # fmt: skip
    (root / PACKAGE / "extra.py").unlink()
    edit(root, "build.toml", ', "cuda"', "")
    publish(make(root), repo, api)
    for branch in ("v1", "main"):
        paths = files(api, repo, branch)
        assert "notes.md" in paths
        assert not [path for path in paths if "extra.py" in path or "torch-cuda" in path or "stray" in path]


def test_main_follows_the_newest_version_and_is_never_downgraded(make_kernel, api, repo, tmp_path):
    old, new = make_kernel("old"), make_kernel("new")
    edit(new, "build.toml", "version = 1", "version = 2")
    publish(make(old), repo, api)
    publish(make(new), repo, api)
    before = heads(api, repo)
    edit(old, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 20")
    published = publish(make(old), repo, api)
    after = heads(api, repo)
    assert [branch.name for branch in published.branches] == ["v1"]
    assert published.newer == 2
    assert (after["main"], after["v2"]) == (before["main"], before["v2"])
    assert after["v1"] != before["v1"]
    assert '"version": 2' in content(api, repo, "build/torch-cpu/metadata.json", "main", tmp_path)


def test_versions_are_compared_as_numbers(make_kernel, api, repo):
    root = make_kernel()
    for version in (9, 10):
        edit(root, "build.toml", f"version = {version - 1 if version == 10 else 1}", f"version = {version}")
        assert publish(make(root), repo, api).newer is None
    edit(root, "build.toml", "version = 10", "version = 9")
    assert publish(make(root), repo, api).newer == 10


def test_an_older_version_published_late_gets_a_branch_without_touching_main(make_kernel, api, repo):
    root = make_kernel()
    edit(root, "build.toml", "version = 1", "version = 2")
    publish(make(root), repo, api)
    before = heads(api, repo)
    edit(root, "build.toml", "version = 2", "version = 1")
    publish(make(root), repo, api)
    after = heads(api, repo)
    assert after.keys() == {"main", "v1", "v2"}
    assert {name: after[name] for name in before} == before


def test_planning_changes_nothing(make_kernel, api, repo):
    api.create_repo(repo, repo_type="kernel")
    before = heads(api, repo)
    todo = plan(make(make_kernel()), repo, api)
    assert [(branch.name, branch.exists, branch.unchanged) for branch in todo.branches] == [
        ("v1", False, False), ("main", True, False)
    ]  # fmt: skip
    assert heads(api, repo) == before


def test_a_dirty_tree_is_said_in_the_card(make_kernel, api, repo, tmp_path):
    root = make_kernel()
    porcelain.init(str(root))
    porcelain.add(str(root), [str(root / "build.toml")])
    porcelain.commit(str(root), message=b"x", author=b"A <a@b>", committer=b"A <a@b>")
    publish(make(root), repo, api)
    assert "uncommitted changes" in content(api, repo, "README.md", "v1", tmp_path)


def test_a_private_repository_is_made_on_request(make_kernel, tmp_path):
    kernel = make(make_kernel())
    with running_hub(tmp_path / "hub", trust=["org"]) as running:
        token = create_token(running.root, "me")
        publish(kernel, None, HfApi(endpoint=running.endpoint, token=token), PublishOptions(private=True))
        stranger = plan(kernel, "org/demo-kernel", HfApi(endpoint=running.endpoint, token=False))
        assert stranger.creates
        assert any("cannot see org/demo-kernel without a token" in note for note in stranger.notes)


@pytest.mark.parametrize(
    ("token", "part"), [("hf_wrong", "refuses the token"), (False, "token"), ("read", "may not write")]
)
def test_a_token_that_may_not_write_is_refused_and_nothing_is_made(make_kernel, tmp_path, token, part):
    kernel = make(make_kernel())
    with running_hub(tmp_path / "hub", trust=["org"]) as running:
        good = HfApi(endpoint=running.endpoint, token=create_token(running.root, "me"))
        if token == "read":
            token = create_token(running.root, "reader", "read")
        with pytest.raises(PublishError, match=part):
            publish(kernel, None, HfApi(endpoint=running.endpoint, token=token))
        assert not good.repo_exists("org/demo-kernel", repo_type="kernel")


def test_an_endpoint_that_does_not_answer_is_named(make_kernel):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(PublishError, match=f"{address} does not answer"):
            publish(make(make_kernel()), None, client(address))


@pytest.mark.parametrize("address", ["nonsense", "ftp://127.0.0.1", "http://127.0.0.1:70000"])
def test_an_endpoint_that_is_no_address_is_named(make_kernel, address):
    with pytest.raises(PublishError, match=address):
        publish(make(make_kernel()), None, client(address))


@pytest.mark.parametrize("bad", ["demo", "../demo", "a/b/c", "org/.."])
def test_a_repository_id_that_is_none_is_refused(make_kernel, api, bad):
    with pytest.raises(PublishError, match="no repository id"):
        publish(make(make_kernel()), bad, api)


def test_without_any_repository_id_the_ways_to_give_one_are_named(make_kernel, api):
    root = make_kernel()
    edit(root, "build.toml", '[general.hub]\nrepo-id = "org/demo-kernel"\n', "")
    with pytest.raises(PublishError, match="--repo-id"):
        publish(make(root), None, api)


def in_git(root: Path) -> None:
    porcelain.init(str(root))
    everything = [str(path) for path in root.rglob("*") if path.is_file() and ".git" not in path.parts]
    porcelain.add(str(root), everything)
    porcelain.commit(str(root), message=b"x", author=b"A <a@b>", committer=b"A <a@b>")


def test_a_published_version_is_not_replaced_from_a_dirty_tree_unless_forced(make_kernel, api, repo):
    root = make_kernel()
    in_git(root)
    publish(make(root), repo, api)
    before = heads(api, repo)
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 20")
    with pytest.raises(RefusedError, match=r"v1 is published and the sources differ.*--force"):
        publish(make(root), repo, api)
    assert heads(api, repo) == before
    published = publish(make(root), repo, api, PublishOptions(force=True))
    assert any("the sources differ" in objection for objection in published.overridden)
    assert heads(api, repo) != before


def test_a_break_of_the_api_within_a_version_is_refused_and_named(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    before = heads(api, repo)
    edit(root, f"{PACKAGE}/__init__.py", "def label() -> str:", "def label(must: int) -> str:")
    todo = plan(make(root), repo, api)
    assert (todo.against, todo.implied) == (1, 2)
    with pytest.raises(RefusedError, match=r"v1 breaks what it promised, label.*raise the version"):
        publish(make(root), repo, api)
    assert heads(api, repo) == before
    edit(root, "build.toml", "version = 1", "version = 2")
    assert publish(make(root), repo, api).overridden == ()
    assert heads(api, repo)["v1"] == before["v1"]


def test_a_dry_run_of_a_repository_that_is_not_there_plans_all_of_it(make_kernel, api, repo):
    kernel = make(make_kernel())
    todo = plan(kernel, repo, api)
    assert todo.creates
    added = {change.path for change in todo.branches[0].changes if change.kind == "added"}
    assert "build/torch-cpu/twice.py" in added
    assert "README.md" in added
    assert not api.repo_exists(repo, repo_type="kernel")


def test_the_plan_names_each_file_with_its_sizes(make_kernel, api, repo):
    root = make_kernel(**{f"{PACKAGE}/extra.py": "X = 1\n", f"{PACKAGE}/other.py": "Y = 1\n"})
    publish(make(root), repo, api)
    (root / PACKAGE / "extra.py").unlink()
    edit(root, f"{PACKAGE}/other.py", "Y = 1", "Y = 100")
    (root / PACKAGE / "new.py").write_text("")
    changes = {change.path: change for change in plan(make(root), repo, api).branches[0].changes}
    cpu = {
        path.removeprefix("build/torch-cpu/"): change for path, change in changes.items() if "-cpu" in path
    }
    assert [(cpu[name].kind, cpu[name].before, cpu[name].after) for name in ("extra.py", "other.py", "new.py")] == [
        ("removed", 6, None), ("changed", 6, 8), ("added", None, 0)
    ]  # fmt: skip


def test_a_proposal_changes_no_branch_and_the_same_one_is_opened_once(make_kernel, api, repo):
    root = make_kernel()
    first = publish(make(root), repo, api, PublishOptions(create_pr=True))
    assert first.changed
    assert first.pull_request is not None
    assert first.pull_request.endswith("/discussions/1")
    assert files(api, repo, "main").isdisjoint({"README.md"})
    assert set(heads(api, repo)) == {"main"}
    assert "build/torch-cpu/twice.py" in files(api, repo, "refs/pr/1")
    again = publish(make(root), repo, api, PublishOptions(create_pr=True))
    assert (again.pull_request, again.changed) == (first.pull_request, False)
    forced = publish(make(root), repo, api, PublishOptions(create_pr=True, force=True))
    assert forced.pull_request == first.pull_request.replace("discussions/1", "discussions/2")
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3")
    other = publish(make(root), repo, api, PublishOptions(create_pr=True))
    assert (other.pull_request, other.changed) == (
        first.pull_request.replace("discussions/1", "discussions/3"),
        True,
    )
