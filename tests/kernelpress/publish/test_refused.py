"""Inputs that publishing refuses or cannot see: each ends in one message and never in a traceback."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from command_line import kernelpress
from huggingface_hub import CommitOperationAdd, HfApi
from kernelpress.hub.client import RefusedError
from kernelpress.publish.publish import PublishOptions, publish
from kernelpress.versions.info import info
from kernelpress.versions.yank import yank
from localhub import create_token, running_hub
from sample_kernel import PACKAGE, edit, make

pytestmark = pytest.mark.usefixtures("no_settings_of_the_developers_own")

# Assembled here, so that no scanner takes this file for a leak.
SECRET = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize("force", [False, True])
def test_a_secret_in_the_sources_never_leaves_the_machine(make_kernel, api, repo, force):
    root = make_kernel()
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", f'FACTOR = 2\nTOKEN = "{SECRET}"')
    with pytest.raises(RefusedError, match=r"twice\.py:\d+: KP104 what looks like a secret"):
        publish(make(root), repo, api, PublishOptions(force=force))
    assert not api.repo_exists(repo, repo_type="kernel")


def test_what_is_checked_is_what_was_built_whatever_the_disk_holds_by_then(make_kernel, api, repo):
    root = make_kernel()
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", f'FACTOR = 2\nTOKEN = "{SECRET}"')
    leaky = make(root)
    edit(root, f"{PACKAGE}/twice.py", f'\nTOKEN = "{SECRET}"', "")
    with pytest.raises(RefusedError, match="KP104"):
        publish(leaky, repo, api)
    clean = make(root)
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", f'FACTOR = 2\nTOKEN = "{SECRET}"')
    assert publish(clean, repo, api).changed


def test_a_secret_in_the_card_never_leaves_the_machine(make_kernel, api, repo):
    root = make_kernel(**{"CARD.md": f"# {{{{ name }}}}\n\nlog in with {SECRET}\n"})
    with pytest.raises(RefusedError, match=r"CARD\.md:3: KP104"):
        publish(make(root), repo, api)
    assert not api.repo_exists(repo, repo_type="kernel")


@pytest.mark.parametrize(
    "address", [f"https://me:{SECRET}@example.org/kernel", "https://me:word@example.org/kernel"]
)
def test_a_secret_in_the_description_never_leaves_the_machine(make_kernel, api, repo, address):
    root = make_kernel()
    edit(root, "build.toml", "edition = 5\n", f'edition = 5\nsource = "{address}"\n')
    with pytest.raises(RefusedError, match=r"build\.toml: KP104"):
        publish(make(root), repo, api)
    assert not api.repo_exists(repo, repo_type="kernel")


def test_a_plan_names_faults_of_the_sources_and_what_force_overrides(make_kernel, api, repo):
    root = make_kernel()
    publish(make(root), repo, api)
    options = ("publish", "--dry-run", str(root), "--repo-id", repo, "--endpoint", api.endpoint)
    edit(root, f"{PACKAGE}/__init__.py", "def label() -> str:", "def label(must: int) -> str:")
    refused, forced = kernelpress(*options), kernelpress(*options, "--force")
    assert (refused.returncode, "refused v1 breaks" in refused.stdout) == (4, True)
    assert (forced.returncode, "forced v1 breaks" in forced.stdout) == (0, True)
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", f'FACTOR = 2\nTOKEN = "{SECRET}"')
    faulty = kernelpress(*options, "--force", "--output-json")
    assert faulty.returncode == 4
    assert "KP104" in json.loads(faulty.stdout)["faults"][0]


def test_a_stranger_plans_a_first_release_and_cannot_publish_it(make_kernel, tmp_path):
    root = make_kernel()
    create_token(tmp_path / "hub", "alice")
    with running_hub(tmp_path / "hub") as hub:
        options = (str(root), "--repo-id", "org/unseen", "--endpoint", hub.endpoint)
        planned = kernelpress("publish", "--dry-run", *options)
        assert planned.returncode == 0, planned.stderr
        assert "cannot see org/unseen without a token" in planned.stdout
        published = kernelpress("publish", *options)
        assert published.returncode == 1
        assert published.stderr.startswith("error: the Hub refuses the token")
        wrong = kernelpress("publish", "--dry-run", *options, HF_TOKEN="kp_" + "0" * 40)
        assert wrong.returncode == 1
        assert "Traceback" not in wrong.stderr


@pytest.fixture(scope="module")
def portal() -> Iterator[str]:
    """A server that answers everything like a network without a login: by a page, with status 200."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"<html>log in</html>")

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("command", [("publish",), ("info", "org/name"), ("api", "--against", "org/name@v1")])
def test_a_login_page_in_place_of_the_hub_is_said(make_kernel, portal, command):
    project = () if command[0] == "info" else (str(make_kernel()),)
    # In a process of its own: the Hub's client reads its address when it is imported.
    process = subprocess.run(
        [sys.executable, "-m", "kernelpress", command[0], *project, *command[1:]],
        env=os.environ | {"HF_ENDPOINT": portal}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert "Traceback" not in process.stderr
    if command[0] != "api":
        assert "is no Hub: it sends something else than JSON" in process.stderr


@pytest.mark.parametrize("digest", [None, {}, {"algorithm": "sha256"}])
def test_a_kernel_without_digests_is_yanked_too(api, repo, digest):
    metadata = {"name": "x", "id": "x_1", "version": 1, "license": "MIT", "python-depends": []}
    metadata |= {"backend": {"type": "cpu"}} | ({} if digest is None else {"digest": digest})
    api.create_repo(repo, repo_type="kernel")
    _add(api, repo, metadata=json.dumps(metadata).encode())
    api.create_branch(repo, branch="v1", repo_type="kernel")
    assert yank(api, repo, 1, "wrong").keys() == {"v1", "main"}
    assert info(api, repo).versions[0].yanked == "wrong"


@pytest.mark.parametrize("metadata", [b"no json", b"[" * 100_000], ids=["text", "deep"])
def test_metadata_that_cannot_be_read_is_said_when_a_version_is_yanked(api, repo, metadata):
    api.create_repo(repo, repo_type="kernel")
    _add(api, repo, metadata=metadata)
    api.create_branch(repo, branch="v1", repo_type="kernel")
    process = kernelpress("yank", repo, "v1", "--reason", "wrong", "--endpoint", api.endpoint)
    assert process.returncode == 1
    assert f"build/torch-cpu/metadata.json of {repo} is no JSON object" in process.stderr


def _add(api: HfApi, repo: str, metadata: bytes) -> None:
    files = [
        CommitOperationAdd("build/torch-cpu/__init__.py", b'"""A kernel."""\n'),
        CommitOperationAdd("build/torch-cpu/metadata.json", metadata),
    ]
    api.create_commit(repo, files, commit_message="x", repo_type="kernel")
