"""Whether a pull request holds a build already, so that the same command twice opens one."""

from __future__ import annotations

from huggingface_hub import HfApi

from kernelpress.hubs import MAIN, TYPE, explained
from kernelpress.plan import plan_branch, wanted_files
from kernelpress.variant import Build

# Each costs a request; who has so many open at once will not miss an older one.
_LATEST = 20


def proposed(build: Build, repo_id: str, api: HfApi) -> str | None:
    """The address of the latest pull request with exactly this build, whether open or closed.

    Raises:
        PublishError: The Hub cannot be reached or refuses.
    """
    wanted = wanted_files(build, repo_id)
    with explained(api, repo_id):
        refs = api.list_repo_refs(repo_id, repo_type=TYPE, include_pull_requests=True).pull_requests or []
        numbered = {int(ref.ref.rpartition("/")[2]): ref.target_commit for ref in refs}
        for number in sorted(numbered, reverse=True)[:_LATEST]:
            if plan_branch(api, repo_id, MAIN, {MAIN: numbered[number]}, wanted).unchanged:
                return f"{api.endpoint}/kernels/{repo_id}/discussions/{number}"
    return None
