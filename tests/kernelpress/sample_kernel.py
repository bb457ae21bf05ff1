"""A kernel as tests build, check and publish it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from kernelpress.builder.build import build
from kernelpress.builder.model import Build
from kernelpress.check.kernel import check_sources
from kernelpress.findings.model import Finding
from kernelpress.spec.load import KernelOptions, load_spec

PACKAGE = "torch-ext/demo_kernel"


def make(root: Path) -> Build:
    return build(load_spec(root))


def source_findings(root: Path) -> list[Finding]:
    """The findings in the description and the sources of a kernel."""
    return check_sources(KernelOptions(root))[0]


def edit(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))


def heads(api: HfApi, repo: str) -> dict[str, str]:
    return {
        branch.name: branch.target_commit for branch in api.list_repo_refs(repo, repo_type="kernel").branches
    }


def files(api: HfApi, repo: str, revision: str) -> set[str]:
    tree = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type="kernel")
    return {entry.path for entry in tree if isinstance(entry, RepoFile)}


def content(api: HfApi, repo: str, path: str, revision: str, where: Path) -> str:
    return Path(
        api.hf_hub_download(repo, path, repo_type="kernel", revision=revision, local_dir=where / revision)
    ).read_text()


def commits(api: HfApi, repo: str, branch: str) -> int:
    return len(api.list_repo_commits(repo, repo_type="kernel", revision=branch))
