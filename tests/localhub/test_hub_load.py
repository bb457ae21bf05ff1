"""Many readers and many publishers at once: nothing fails, nothing mixes, nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from localhub import RunningHub, fsck

NewRepo = Callable[..., str]
READERS, PROCESSES = 200, 4
FILES = [f"build/torch-cpu/f{number}.py" for number in range(6)]

READ = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
endpoint, repo, cache, count = sys.argv[1:]
api = HfApi(endpoint=endpoint, token=False)
def read(number):
    folder = Path(api.snapshot_download(repo, repo_type="kernel", revision="v1", max_workers=1,
                                        cache_dir=f"{cache}/{number}"))
    return len({path.read_text() for path in folder.glob("build/*/*")}), len(list(folder.glob("build/*/*")))
with ThreadPoolExecutor(int(count)) as pool:
    print(sorted(set(pool.map(read, range(int(count))))))
"""


def put(api: HfApi, repo: str, text: str, **options: str) -> str:
    operations = [CommitOperationAdd(path, text.encode()) for path in FILES]
    info = api.create_commit(repo, operations, commit_message=text, repo_type="kernel", **options)
    return str(info.oid)


def test_two_hundred_readers_at_once_while_the_version_changes_each_get_one_whole_tree(
    hub: RunningHub, api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    put(api, repo, "0")
    api.create_branch(repo, branch="v1", repo_type="kernel")
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ, hub.endpoint, repo, str(tmp_path / str(n)), str(READERS // PROCESSES)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in range(PROCESSES)
    ]  # fmt: skip
    number = 0
    while any(reader.poll() is None for reader in readers):
        number += 1
        put(api, repo, str(number), revision="v1")
        time.sleep(0.2)
    for reader in readers:
        output, errors = reader.communicate()
        assert (reader.returncode, output) == (0, f"[(1, {len(FILES)})]\n"), errors[-2000:]
    with open(f"/proc/{hub.pid}/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak < 600 << 10


def test_fifty_publishers_to_their_own_and_ten_to_one_repository_lose_nothing(
    hub: RunningHub, api: HfApi, new_repo: NewRepo
) -> None:
    shared, own = new_repo(), [f"org/own-{number}" for number in range(50)]

    def publish_own(repo: str) -> str:
        api.create_repo(repo, repo_type="kernel")
        return put(api, repo, repo)

    def publish_shared(number: int) -> str:
        while True:
            head = api.kernel_info(shared).sha
            try:
                return put(api, shared, str(number), parent_commit=str(head))
            except HfHubHTTPError as error:
                if error.response.status_code != 412:
                    raise

    with ThreadPoolExecutor(60) as pool:
        to_shared = [pool.submit(publish_shared, number) for number in range(10)]
        published = dict(zip(own, pool.map(publish_own, own), strict=True))
        acknowledged = {future.result() for future in to_shared}
    assert {repo: api.kernel_info(repo).sha for repo in own} == published
    history = [item.commit_id for item in api.list_repo_commits(shared, repo_type="kernel")]
    assert acknowledged == set(history[:10])
    for oid in acknowledged:
        infos = api.get_paths_info(shared, FILES, repo_type="kernel", revision=oid)
        assert len({info.blob_id for info in infos}) == 1  # type: ignore[union-attr]
    assert fsck(hub.root).faults == ()
