"""Finds a pull request that holds a build already, so that the same command twice opens one."""

from __future__ import annotations

from huggingface_hub import HfApi

from kernelpress.builder.model import Build
from kernelpress.conventions import MAIN, REPO_TYPE
from kernelpress.hub.client import explained
from kernelpress.publish.plan import branch_files, plan_branch

# Each costs a request; who has so many open at once will not miss an older one.
_LATEST = 20


def find_pull_request(build: Build, repo_id: str, api: HfApi) -> str | None:
    """The address of the latest pull request with exactly this build, whether open or closed.

    Raises:
        PublishError: The Hub cannot be reached or refuses.
    """
    files = branch_files(build, repo_id)
    with explained(api, repo_id):
        refs = (
            api.list_repo_refs(repo_id, repo_type=REPO_TYPE, include_pull_requests=True).pull_requests or []
        )
        commits = {int(ref.ref.rpartition("/")[2]): ref.target_commit for ref in refs}
        for number in sorted(commits, reverse=True)[:_LATEST]:
            if plan_branch(api, repo_id, MAIN, {MAIN: commits[number]}, files).unchanged:
                return f"{api.endpoint}/kernels/{repo_id}/discussions/{number}"
    return None
