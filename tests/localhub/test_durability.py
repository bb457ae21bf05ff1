"""A restart, a kill and writers that race each other lose nothing."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from dulwich.objects import Blob
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from localhub import RunningHub, running_hub
from localhub.errors import HubError
from localhub.git.repository import AddFile, Operation
from localhub.names import RepoId
from localhub.store import Store

FILES = [f"build/{number}.txt" for number in range(12)]


def generation(number: int) -> list[CommitOperationAdd | CommitOperationDelete]:
    return [CommitOperationAdd(path, str(number).encode()) for path in FILES]


def commit(api: HfApi, repo: str, number: int, **options: str) -> str:
    info = api.create_commit(
        repo, generation(number), commit_message=str(number), repo_type="kernel", **options
    )
    return str(info.oid)


def raw_commit(hub: RunningHub, repo: str, number: int) -> str:
    """Like ``commit``, without the client's own retries, which take long when the Hub is gone."""
    content = base64.b64encode(str(number).encode()).decode()
    lines: list[dict[str, object]] = [{"key": "header", "value": {"summary": str(number)}}]
    lines += [
        {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}} for path in FILES
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    answer = httpx2.post(f"{hub.endpoint}/api/kernels/{repo}/commit/main", content=body, timeout=60)
    return str(answer.raise_for_status().json()["commitOid"])


def generation_of(api: HfApi, repo: str, cache: Path) -> set[str]:
    folder = Path(api.snapshot_download(repo, repo_type="kernel", cache_dir=cache))
    return {path.read_text() for path in folder.glob("build/*")}


def assert_sound(root: Path, repo: str) -> None:
    """Git itself finds nothing wrong with the repository."""
    place = root / "repos" / "kernels" / f"{repo}.git"
    checked = subprocess.run(
        ["git", "-C", str(place), "fsck", "--full", "--strict", "--no-dangling"],
        env={
            **os.environ,
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        },
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr + checked.stdout


def test_everything_survives_a_restart(root: Path, tmp_path: Path) -> None:
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.create_repo("org/k", repo_type="kernel")
        oid = commit(api, "org/k", 1)
        api.create_branch("org/k", branch="v1", repo_type="kernel")
        before = api.list_repo_refs("org/k", repo_type="kernel")
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        assert api.list_repo_refs("org/k", repo_type="kernel") == before
        assert api.kernel_info("org/k").sha == oid
        assert generation_of(api, "org/k", tmp_path / "cache") == {"1"}


def test_a_killed_hub_comes_back_with_every_acknowledged_commit_and_no_mixed_tree(
    root: Path, tmp_path: Path
) -> None:
    acknowledged: list[str] = []
    number = 0
    for attempt in range(5):
        with running_hub(root) as hub:
            api = HfApi(endpoint=hub.endpoint, token=False)
            api.create_repo("org/k", repo_type="kernel", exist_ok=True)
            history = [item.commit_id for item in api.list_repo_commits("org/k", repo_type="kernel")]
            assert set(acknowledged) <= set(history)
            assert len(generation_of(api, "org/k", tmp_path / f"cache{attempt}")) <= 1
            assert_sound(root, "org/k")
            delay = random.Random(attempt).uniform(0.05, 0.3)
            killer = threading.Timer(delay, os.kill, (hub.pid, signal.SIGKILL))
            try:
                while True:
                    number += 1
                    acknowledged.append(raw_commit(hub, "org/k", number))
                    # Not before the first is there, however slow this machine is.
                    if killer.ident is None:
                        killer.start()
            except httpx2.TransportError:
                killer.join()
    assert acknowledged


def exiting_after(calls: int) -> None:
    """Make this process end, as if killed, at its n-th file-system step that lasts."""
    left = [calls]

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            if left[0] == 0:
                os._exit(99)
            left[0] -= 1
            return original(*arguments, **options)

        return step

    for name in ("fsync", "replace", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def crash_walk(root: Path) -> None:
    """Commit again and again, dying one step later each time, until a commit runs to its end."""
    for steps in range(60):
        child = os.fork()
        if child == 0:
            git = Store(root).get(RepoId("kernel", "org", "k"))
            assert git is not None
            exiting_after(steps)
            with git.batch() as batch:
                blob = batch.add(Blob.from_string(str(steps).encode()))
                added = [AddFile(path, blob) for path in FILES]
                git.commit("main", added, batch=batch, message=str(steps), author="a")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 99)
        assert_sound(root, "org/k")
        if status == 0:
            print(steps)
            return
    raise AssertionError("no commit ran to its end")


def test_a_crash_at_any_step_of_a_commit_leaves_the_old_state_or_the_new(root: Path, tmp_path: Path) -> None:
    with running_hub(root) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_repo("org/k", repo_type="kernel")
    # In a process without threads of its own, so that it can fork.
    walk = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pathlib, test_durability as t; t.crash_walk(pathlib.Path(sys.argv[1]))",
            str(root),
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert walk.returncode == 0, walk.stderr
    steps = int(walk.stdout)
    # Fewer would mean that the commit was not made durable step by step.
    assert steps > 8
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        newest, *older = api.list_repo_commits("org/k", repo_type="kernel")
        # The last attempt ran to its end; those that died before it landed whole or not at all.
        assert newest.title == str(steps)
        for item in [newest, *older[:-1]]:
            folder = api.snapshot_download(
                "org/k", repo_type="kernel", revision=item.commit_id, cache_dir=tmp_path / "c"
            )
            assert {path.read_text() for path in Path(folder).glob("build/*")} == {item.title}
        assert not list((root / "tmp").iterdir())


def test_a_commit_is_synced_to_disk_before_the_branch_moves_and_the_move_before_the_answer(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(root)
    repo = RepoId("kernel", "org", "k")
    store.create(repo, private=False, author="a")
    git = store.get(repo)
    assert git is not None
    steps: list[tuple[str, str]] = []
    real_sync, real_replace = os.fsync, os.replace

    def traced_sync(descriptor: int) -> None:
        real_sync(descriptor)
        status = os.fstat(descriptor)
        steps.append(("sync", str((status.st_dev, status.st_ino))))

    def traced_replace(source: Path | bytes, target: Path | bytes) -> None:
        status = os.stat(source)
        steps.append(("move", str((status.st_dev, status.st_ino))))
        real_replace(source, target)
        steps.append(("moved to", os.fsdecode(target)))

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(os, "replace", traced_replace)
    with git.batch() as batch:
        added: list[Operation] = [AddFile(path, batch.add(Blob.from_string(path.encode()))) for path in FILES]
        git.commit("main", added, batch=batch, message="m", author="a")

    def folder_synced_after(position: int, folder: Path) -> int:
        status = folder.stat()
        return steps.index(("sync", str((status.st_dev, status.st_ino))), position)

    moves = [(at, Path(name)) for at, (kind, name) in enumerate(steps) if kind == "moved to"]
    *objects, (branch_at, branch) = moves
    # 12 blobs, the tree of build/, the root tree, the commit.
    assert len(objects) == len(FILES) + 3
    assert branch == git.path / "refs/heads/main"
    for at, place in moves:
        assert ("sync", steps[at - 1][1]) in steps[:at], f"{place} was moved before it was synced"
    for at, place in objects:
        assert folder_synced_after(at, place.parent) < branch_at
    assert folder_synced_after(objects[-1][0], git.path / "objects") < branch_at
    assert folder_synced_after(branch_at, branch.parent) == len(steps) - 1


def test_a_lock_left_by_a_killed_hub_does_not_block_the_next(root: Path) -> None:
    with running_hub(root) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_repo("org/k", repo_type="kernel")
    (root / "repos/kernels/org/k.git/refs/heads/main.lock").touch()
    with running_hub(root) as hub:
        commit(HfApi(endpoint=hub.endpoint, token=False), "org/k", 1)


def test_of_two_commits_with_one_parent_exactly_one_lands(
    api: HfApi, hub: RunningHub, new_repo: Callable[..., str], tmp_path: Path
) -> None:
    repo = new_repo()
    for round_ in range(3):
        parent = api.kernel_info(repo).sha
        barrier = threading.Barrier(6)

        def publish(
            number: int, parent: str | None = parent, barrier: threading.Barrier = barrier
        ) -> str | int:
            barrier.wait()
            try:
                return commit(api, repo, number, parent_commit=str(parent))
            except HfHubHTTPError as error:
                return error.response.status_code

        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(publish, range(10 * round_, 10 * round_ + 6)))
        winners = [result for result in results if isinstance(result, str)]
        assert len(winners) == 1
        assert [result for result in results if isinstance(result, int)] == [412] * 5
        newest, before = api.list_repo_commits(repo, repo_type="kernel")[:2]
        assert (newest.commit_id, before.commit_id) == (winners[0], parent)
        assert generation_of(api, repo, tmp_path) == {newest.title}


_PUBLISHER = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi(endpoint=sys.argv[1], token=False)
for number in range(5):
    name = f"{sys.argv[3]}-{number}"
    api.create_commit(sys.argv[2], [CommitOperationAdd(f"f/{name}", name.encode())],
                      commit_message=name, repo_type="kernel")
"""


def test_commits_of_parallel_processes_without_a_parent_all_land(
    api: HfApi, hub: RunningHub, new_repo: Callable[..., str]
) -> None:
    repo = new_repo()
    publishers = [
        subprocess.Popen([sys.executable, "-c", _PUBLISHER, hub.endpoint, repo, str(number)])
        for number in range(4)
    ]
    assert [publisher.wait(600) for publisher in publishers] == [0] * 4
    expected = {f"{publisher}-{number}" for publisher in range(4) for number in range(5)}
    titles = [item.title for item in api.list_repo_commits(repo, repo_type="kernel")]
    assert len(titles) == 21
    assert set(titles) == {*expected, "initial commit"}
    listed = {path for path in api.list_repo_files(repo, repo_type="kernel") if path.startswith("f/")}
    assert listed == {f"f/{name}" for name in expected}


def test_readers_never_see_a_mixed_tree_while_a_publisher_commits(
    api: HfApi, new_repo: Callable[..., str], tmp_path: Path
) -> None:
    repo = new_repo()
    commit(api, repo, 0)
    finished = threading.Event()
    seen: list[set[str]] = []

    def read() -> None:
        while not finished.is_set():
            seen.append(generation_of(api, repo, tmp_path / "cache"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 9):
        commit(api, repo, number)
    finished.set()
    reader.join()
    assert seen
    assert all(len(generations) == 1 for generations in seen)


def test_creating_and_deleting_in_parallel_leaves_whole_repositories(api: HfApi, tmp_path: Path) -> None:
    def churn(number: int) -> None:
        for _ in range(6):
            try:
                api.create_repo("org/churned", repo_type="kernel", exist_ok=True)
                commit(api, "org/churned", number)
                api.delete_repo("org/churned", repo_type="kernel", missing_ok=True)
            except RepositoryNotFoundError:
                pass

    def browse(number: int) -> None:
        for _ in range(30):
            for path in (
                "",
                "/org/churned",
                "/org/churned/refs",
                "/org/churned/tree/main?recursive=1&expand=1",
            ):
                assert httpx2.get(f"{api.endpoint}/api/kernels{path}").status_code in (200, 404)

    with ThreadPoolExecutor(6) as pool:
        churners = [pool.submit(churn, number) for number in range(4)]
        browsers = [pool.submit(browse, number) for number in range(2)]
        for future in churners + browsers:
            future.result()
    api.create_repo("org/churned", repo_type="kernel", exist_ok=True)
    commit(api, "org/churned", 7)
    assert generation_of(api, "org/churned", tmp_path) == {"7"}


def test_a_second_hub_on_the_same_root_is_refused(root: Path) -> None:
    with running_hub(root) as hub:
        with (
            pytest.raises(HubError, match=rf"another Hub \(process {hub.pid}\) is using this root"),
            running_hub(root),
        ):
            pass
        assert HfApi(endpoint=hub.endpoint, token=False).create_repo("org/k", repo_type="kernel")


def test_a_taken_port_is_refused(hub: RunningHub, root: Path) -> None:
    port = int(hub.endpoint.rsplit(":", 1)[1])
    with (
        pytest.raises(HubError, match=rf"cannot listen on 127.0.0.1:{port}: .*choose another --port"),
        running_hub(root, port=port),
    ):
        pass


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(root: Path, port: int) -> None:
    with pytest.raises(HubError, match="ports go from 0 to 65535"), running_hub(root, port=port):
        pass


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HubError, match="cannot use it as the Hub's root"), running_hub(tmp_path / "file"):
        pass


def test_an_organization_that_cannot_be_one_is_refused(root: Path) -> None:
    with (
        pytest.raises(HubError, match="cannot be the name of an organization"),
        running_hub(root, trust=["a/b"]),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_hub_with_exit_code_zero_and_one_line_printed(root: Path, number: int) -> None:
    hub = subprocess.Popen(
        [sys.executable, "-m", "localhub", "--root", str(root), "--trust", "org"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert hub.stdout is not None
    line = hub.stdout.readline()
    assert line.startswith("kernelpress Hub at http://127.0.0.1:")
    assert line.endswith(f"  (root {root}; trusted: org)\n")
    hub.send_signal(number)
    assert hub.wait(60) == 0
    assert hub.stdout.read() == ""


def test_the_hub_is_gone_when_the_block_ends(root: Path) -> None:
    with running_hub(root) as hub:
        os.kill(hub.pid, 0)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(hub.pid, 0)
        except ProcessLookupError:
            return
    pytest.fail("the Hub's process is still alive")
