"""Releases as a whole: what the command prints, what a consumer finds, and what is put back."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from command_line import kernelpress
from huggingface_hub import CommitOperationAdd, HfApi
from kernelpress.conventions import SIGNATURE
from kernelpress.errors import PublishError
from kernelpress.hub.client import RefusedError
from kernelpress.hub.repository import branch_heads, restore, tree
from kernelpress.publish.plan import plan
from kernelpress.publish.publish import publish
from kernelpress.publish.release import release
from kernelpress.publish.sign import sign
from kernelpress.publish.verify import verify
from kernelpress.versions.bundle import bundle, unbundle
from kernelpress.versions.info import info, version_at
from kernelpress.versions.rollback import rollback
from kernelpress.versions.unbundle import upload
from kernelpress.versions.yank import redirect, yank
from kernels.status import resolve_status
from kernels.verify import VerificationResult, verify_variant
from sample_kernel import PACKAGE, edit, make

pytestmark = pytest.mark.usefixtures("no_settings_of_the_developers_own")


def contents(api: HfApi, repo: str, revision: str) -> dict[str, str]:
    return {path: entry.blob_id for path, entry in tree(api, repo, revision).items()}


LOAD = """
import sys, torch
from kernels import get_kernel
print(get_kernel(sys.argv[1], **eval(sys.argv[2])).twice(torch.ones(1)).item())
"""


def test_a_release_is_used_as_a_consumer_would(make_kernel, api, repo):
    kernel = make(make_kernel())
    result = release(kernel, repo, api)
    assert result.seen is not None
    assert set(result.seen.loaded) == {"torch-cpu", "torch-universal"}
    assert result.seen.skipped == ("torch-cuda",)
    assert str(result.seen.called).startswith("_demo_kernel_cpu_")


def test_a_release_for_other_hardware_is_verified_as_far_as_this_machine_can(make_kernel, api, repo):
    root = make_kernel()
    edit(root, "build.toml", '"cpu", "cuda"', '"rocm", "metal"')
    verification = release(make(root), repo, api).seen
    assert verification is not None
    assert (verification.loaded, verification.skipped) == ((), ("torch-metal", "torch-rocm"))


@pytest.mark.usefixtures("without_torch")
def test_without_torch_nothing_is_published(make_kernel, api, repo):
    build = make(make_kernel())
    with pytest.raises(PublishError, match=r"lacks torch.*nothing was published.*`pip install torch`"):
        release(build, repo, api)
    assert not api.repo_exists(repo, repo_type="kernel")


BROKEN_ON_THE_HUB_ONLY = 'import os\nif "LOCAL" not in os.environ:\n    raise RuntimeError("broken here")\n'


def test_a_release_that_does_not_load_puts_every_branch_back(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    before = {name: contents(api, repo, name) for name in ("main", "v1")}
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", BROKEN_ON_THE_HUB_ONLY + "FACTOR = 3")
    (root / PACKAGE / "extra.py").write_text("")
    with pytest.raises(PublishError, match=r"broken here.*v1 holds what .* main holds what") as caught:
        release(make(root), repo, api)
    assert caught.value.exit_code == 1
    assert {name: contents(api, repo, name) for name in ("main", "v1")} == before


def test_a_first_release_that_does_not_load_leaves_no_version(make_kernel, api, repo):
    root = make_kernel()
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", BROKEN_ON_THE_HUB_ONLY + "FACTOR = 3")
    with pytest.raises(PublishError, match="v1, which was new, is removed again"):
        release(make(root), repo, api)
    assert branch_heads(api, repo).keys() == {"main"}
    assert not [path for path in contents(api, repo, "main") if path.startswith("build/")]


def test_a_consumer_sees_a_file_that_is_not_what_the_digest_says(make_kernel, api, repo):
    publish(make(make_kernel()), repo, api)
    bad = [CommitOperationAdd("build/torch-cpu/twice.py", b"import os\n")]
    commit = api.create_commit(repo, bad, commit_message="x", repo_type="kernel", revision="v1")
    verification = verify(api, repo, [commit.oid], 1)
    assert len(verification.faults) == 1
    assert "torch-cpu" in verification.faults[0]
    assert "twice.py" in verification.faults[0]
    assert verification.loaded == ()


def test_exit_codes_tell_published_nothing_to_do_and_refused_apart(make_kernel, server, repo):
    root = make_kernel()
    options = (str(root), "--repo-id", repo, "--endpoint", server.endpoint)
    dry = kernelpress("publish", "--dry-run", *options)
    assert (dry.returncode, "would be created" in dry.stdout) == (0, True), dry.stderr
    first = kernelpress("publish", *options, "--output-json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["seen"]["faults"] == []
    second = kernelpress("publish", *options)
    assert second.returncode == 3
    assert kernelpress("diff", *options).returncode == 3
    edit(root, f"{PACKAGE}/__init__.py", "def label() -> str:", "def label(must: int) -> str:")
    refused = kernelpress("publish", *options)
    assert refused.returncode == 4
    assert refused.stderr.startswith("error: v1 breaks what it promised, label")
    assert kernelpress("publish", "--dry-run", *options).returncode == 4


def test_a_publisher_killed_at_any_moment_leaves_no_mixed_tree_and_is_finished_by_the_next(
    make_kernel, api, server
):
    kernel = make(make_kernel())
    expected = {f"build/{variant.name}/{file.path}" for variant in kernel.variants for file in variant.files}
    root = kernel.spec.root
    script = (
        "import sys; from pathlib import Path; from kernelpress.publish.publish import hub, publish; "
        "from kernelpress.spec.load import load_spec; from kernelpress.builder.build import build\n"
        "made = build(load_spec(Path(sys.argv[1]))); print('built', flush=True)\n"
        "publish(made, sys.argv[2], hub(sys.argv[3]))"
    )
    for number, delay in enumerate((0.0, 0.02, 0.05, 0.1, 0.2)):
        repo = f"org/killed-{number}"
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(root), repo, server.endpoint],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if api.repo_exists(repo, repo_type="kernel"):
            for branch in branch_heads(api, repo):
                paths = {path for path in contents(api, repo, branch) if path.startswith("build/")}
                assert paths in (set(), expected)
        publish(kernel, repo, api)
        assert plan(kernel, repo, api).unchanged
        assert branch_heads(api, repo).keys() == {"main", "v1"}


def test_info_lists_versions_with_their_sources_and_variants(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    edit(root, "build.toml", "version = 1", "version = 2")
    publish(make(root), repo, api)
    repository = info(api, repo)
    assert [version.version for version in repository.versions] == [1, 2]
    assert repository.main_version == 2
    assert repository.versions[0].variants == ("torch-cpu", "torch-cuda", "torch-universal")
    assert not repository.versions[0].signed


def test_a_rollback_is_a_commit_with_the_files_of_before(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    first, before = branch_heads(api, repo), contents(api, repo, "v1")
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3")
    (root / PACKAGE / "extra.py").write_text("")
    publish(make(root), repo, api)
    newest = branch_heads(api, repo)["v1"]
    branch, commit = rollback(api, repo, first["v1"])
    assert branch == "v1"
    assert contents(api, repo, "v1") == before
    history = [commit.commit_id for commit in api.list_repo_commits(repo, repo_type="kernel", revision="v1")]
    assert history[:2] == [commit, newest]
    assert rollback(api, repo, first["v1"]) == ("v1", commit)


def test_a_rollback_takes_a_commit_as_messages_shorten_it(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    first, before = branch_heads(api, repo), contents(api, repo, "v1")
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3")
    publish(make(root), repo, api)
    shortened = first["v1"][:12]
    assert version_at(api, repo, shortened) == 1
    rollback(api, repo, shortened)
    assert contents(api, repo, "v1") == before
    with pytest.raises(PublishError, match=f"{repo} has no such branch, tag or commit"):
        rollback(api, repo, "0" * 12)


def test_a_branch_does_not_roll_back_to_another_version(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    edit(root, "build.toml", "version = 1", "version = 2")
    publish(make(root), repo, api)
    with pytest.raises(RefusedError, match="holds version 1, and v2 cannot"):
        rollback(api, repo, branch_heads(api, repo)["v1"], "v2")


def test_readers_of_a_yanked_version_are_told_why_and_locked_ones_are_not(
    make_kernel, api, repo, server, run_clean
):
    root = make_kernel()
    publish(make(root), repo, api)
    locked = branch_heads(api, repo)["v1"]
    reason = 'wrong for "bf16" \\ é; use v2'
    changed = yank(api, repo, 1, f"{reason}\n")
    assert changed.keys() == {"v1", "main"}
    process = run_clean(LOAD, repo, "dict(version=1)", HF_ENDPOINT=server.endpoint)
    assert process.stdout == "2.0\n"
    assert f"UserWarning: {repo} v1 was yanked by its publisher: {reason}" in process.stderr
    kept = run_clean(LOAD, repo, f"dict(revision='{locked}')", HF_ENDPOINT=server.endpoint)
    assert kept.stdout == "2.0\n", kept.stderr
    assert "yanked" not in kept.stderr
    assert verify(api, repo, list(changed.values()), 1).faults == ()
    assert info(api, repo).versions[0].yanked == reason
    assert yank(api, repo, 1, reason) == {}
    with pytest.raises(RefusedError, match="v1 was yanked"):
        publish(make(root), repo, api)
    edit(root, "build.toml", "version = 1", "version = 2")
    publish(make(root), repo, api)
    assert [version.yanked is None for version in info(api, repo).versions] == [False, True]
    assert "kernel-yanked.toml" not in contents(api, repo, "main")


def test_readers_of_a_redirected_kernel_are_told_and_the_status_file_is_upstreams(
    make_kernel, api, repo, server, run_clean
):
    root = make_kernel()
    publish(make(root), repo, api)
    new = f"{repo}-new"
    with pytest.raises(PublishError, match=f"{new} is not there"):
        redirect(api, repo, new)
    publish(make(root), new, api)
    assert redirect(api, repo, new).keys() == {"main", "v1"}
    assert resolve_status(api, repo, "v1") == (new, "v1")
    got = run_clean(LOAD, repo, "dict(version=1)", HF_ENDPOINT=server.endpoint)
    assert got.stdout == "2.0\n", got.stderr
    assert f"{repo} has moved to {new}" in got.stderr
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3")
    with pytest.raises(RefusedError, match="redirects its readers"):
        publish(make(root), repo, api)
    before = branch_heads(api, new)
    with pytest.raises(RefusedError, match=f"{repo} itself redirects to {new}"):
        redirect(api, new, repo)
    assert branch_heads(api, new) == before


def two_versions(root: Path, repo: str, api: HfApi) -> None:
    publish(make(root), repo, api)
    edit(root, "build.toml", "version = 1", "version = 2")
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3")
    publish(make(root), repo, api)


def test_a_bundle_loads_without_a_hub_and_fills_another_one(make_kernel, api, repo, tmp_path, run_clean):
    two_versions(make_kernel(), repo, api)
    archive = tmp_path / "kernel.tar"
    bundle(api, repo, archive)
    again = bundle(api, repo, tmp_path / "again.tar")
    assert archive.read_bytes() == again.path.read_bytes()
    unbundle(archive, tmp_path / "unpacked")
    local = f"{repo}={tmp_path / 'unpacked' / 'v1'}"
    got = run_clean(LOAD, repo, "dict(version=1)", LOCAL_KERNELS=local, HF_HUB_OFFLINE="1")
    assert got.stdout == "2.0\n", got.stderr
    target = f"{repo}-copy"
    assert upload(archive, api, target).keys() == {"main", "v1", "v2"}
    for branch in ("main", "v1", "v2"):
        assert contents(api, target, branch) == contents(api, repo, branch)
    assert upload(archive, api, target) == {}


def test_a_branch_that_only_looks_like_a_version_is_none(make_kernel, api, repo):
    kernel = make(make_kernel())
    publish(kernel, repo, api)
    for name in ("v01", "v1x", "v\u0661", "v" + "9" * 90):
        api.create_branch(repo, branch=name, repo_type="kernel")
    assert [version.version for version in info(api, repo).versions] == [1]
    assert plan(kernel, repo, api).unchanged


def test_an_archive_of_older_versions_leaves_main_where_it_is(make_kernel, api, repo, tmp_path):
    root = make_kernel()
    publish(make(root), repo, api)
    archive = tmp_path / "old.tar"
    bundle(api, repo, archive)
    target = f"{repo}-copy"
    edit(root, "build.toml", "version = 1", "version = 2")
    publish(make(root), target, api)
    before = branch_heads(api, target)
    revisions = []
    real = api.create_commit

    def watched(*arguments, **options):
        revisions.append(options["revision"])
        return real(*arguments, **options)

    api.create_commit = watched
    assert upload(archive, api, target).keys() == {"v1"}
    assert "main" not in revisions
    assert branch_heads(api, target) == {**before, "v1": branch_heads(api, target)["v1"]}
    assert contents(api, target, "v1") == contents(api, repo, "v1")
    assert upload(archive, api, target) == {}


@pytest.mark.parametrize("damage", ["cut", "flipped", "card", "foreign", "none"])
def test_a_damaged_bundle_is_refused_and_leaves_nothing(make_kernel, api, repo, tmp_path, damage):
    publish(make(make_kernel()), repo, api)
    archive = tmp_path / "kernel.tar"
    bundle(api, repo, archive)
    data = archive.read_bytes()
    at = data.index(b"FACTOR = 2")
    # A card is in no variant's digest: only the manifest knows what it was. Its content follows its header.
    card = data.rindex(b"v1/README.md") + 600
    changed = {
        "cut": data[: len(data) // 2],
        "flipped": data[:at] + b"FACTOR = 9" + data[at + 10 :],
        "card": data[:card] + bytes([data[card] ^ 1]) + data[card + 1 :],
        "foreign": b"not an archive",
        "none": data,
    }[damage]
    archive.write_bytes(changed)
    if damage == "none":
        unbundle(archive, tmp_path / "out")
        return
    with pytest.raises(PublishError):
        unbundle(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PublishError):
        upload(archive, api, f"{repo}-x")
    assert not api.repo_exists(f"{repo}-x", repo_type="kernel")


def test_a_bundle_that_names_a_path_outside_is_refused(make_kernel, api, repo, tmp_path):
    publish(make(make_kernel()), repo, api)
    archive = tmp_path / "kernel.tar"
    bundle(api, repo, archive)
    data = archive.read_bytes()
    name = b"v1/build/torch-cpu/twice.py"
    assert data.count(name) > 1
    archive.write_bytes(data.replace(name, b"v1/../../../../tmp/twice.py"))
    with pytest.raises(PublishError, match="manifest is damaged"):
        unbundle(archive, tmp_path / "out")


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"format":' * 100_000, b"\xff", b"[]", b"1" * 5000])
def test_a_bundle_whose_manifest_is_none_is_refused(text, tmp_path):
    archive = tmp_path / "kernel.tar"
    with tarfile.open(archive, "w") as out:
        member = tarfile.TarInfo("manifest.json")
        member.size = len(text)
        out.addfile(member, io.BytesIO(text))
    with pytest.raises(PublishError, match="manifest is damaged"):
        unbundle(archive, tmp_path / "out")


def test_without_an_identity_nothing_is_signed(make_kernel, monkeypatch):
    for name in ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    kernel = make(make_kernel())
    assert sign(kernel) == ()
    assert not list(kernel.directory.rglob(f"*{SIGNATURE}"))


def test_an_identity_that_cannot_be_had_fails_in_one_message(make_kernel, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", raising=False)
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_URL", raising=False)
    with pytest.raises(PublishError, match=r"cannot be signed.*id-token"):
        sign(make(make_kernel()))


def test_a_signature_is_uploaded_kept_out_of_the_digest_and_kept_by_who_cannot_sign(
    make_kernel, api, repo, tmp_path
):
    root = make_kernel()
    kernel = make(root)
    for variant in kernel.variants:
        (kernel.directory / variant.name / SIGNATURE).write_text("{}")
    publish(kernel, repo, api)
    assert info(api, repo).versions[0].signed
    verification = verify(api, repo, [branch_heads(api, repo)["v1"]], 1)
    assert verification.faults == ()
    assert "torch-cpu" in verification.signed
    assert plan(make(root), repo, api).unchanged
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3")
    publish(make(root), repo, api)
    assert not info(api, repo).versions[0].signed


def test_the_loaders_verifier_tells_missing_and_broken_bundles_apart(make_kernel):
    kernel = make(make_kernel())
    variant = kernel.directory / "torch-cpu"
    assert isinstance(verify_variant(variant), VerificationResult.SignatureBundleMissing)
    (variant / SIGNATURE).write_text("{not a bundle")
    assert isinstance(verify_variant(variant), VerificationResult.SignatureBundleInvalid)


def test_restoring_never_overwrites_what_somebody_published_in_that_moment(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    before = branch_heads(api, repo)["v1"]
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 3")
    mine = publish(make(root), repo, api).branches
    (own,) = [branch.commit for branch in mine if branch.name == "v1"]
    note = [CommitOperationAdd("note.txt", b"theirs")]
    theirs = api.create_commit(repo, note, commit_message="x", repo_type="kernel", revision="v1")
    with pytest.raises(PublishError):
        restore(api, repo, "v1", before, "back", base=own)
    assert branch_heads(api, repo)["v1"] == theirs.oid
