"""The git commit that a kernel's inputs come from, and if they still agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dulwich.config import ConfigFile
from dulwich.errors import NotGitRepository
from dulwich.object_store import iter_tree_contents
from dulwich.objects import Blob, Commit
from dulwich.repo import Repo, UnsupportedExtension, UnsupportedVersion

from kernelpress.errors import SourceError


class _Repo(Repo):
    """A repository that may be a partial clone: the trees of what is checked out are there, and no more is read."""

    def get_config(self) -> ConfigFile:
        config = super().get_config()
        for name, _ in list(config.items((b"extensions",))):
            if name.lower() == b"partialclone":
                config.remove((b"extensions",), name)
        return config


@dataclass(frozen=True)
class GitState:
    """The commit checked out, and ``dirty`` where the kernel's inputs differ from it."""

    commit: str
    dirty: bool


def git_state(
    root: Path, inputs: Mapping[Path, bytes], removed: tuple[Path, tuple[str, ...]]
) -> GitState | None:
    """Compare what is about to be built with the commit that is checked out.

    Only the inputs count: an edited test does not make a kernel dirty. A file that ships counts even where
    git ignores it, because the commit alone would not bring it back.

    Args:
        root: A directory inside the repository.
        inputs: Every file the build reads, and its content as read.
        removed: A directory and suffixes: files there with those suffixes that the commit has and ``inputs``
            has not are changes too.

    Returns:
        ``None`` where there is no repository, or one without a commit.

    Raises:
        SourceError: The repository is of a kind that cannot be read.
    """
    try:
        repo = _Repo.discover(root.resolve())
    except NotGitRepository:
        return None
    except (UnsupportedExtension, UnsupportedVersion) as error:
        raise SourceError(
            f"the git repository cannot be read ({error}); build from an ordinary clone of it", path=root
        ) from error
    with repo:
        try:
            head = repo.head()
        except KeyError:
            return None
        commit = repo[head]
        if not isinstance(commit, Commit):
            return None
        top = Path(repo.path).resolve()
        committed = {entry.path: entry.sha for entry in iter_tree_contents(repo.object_store, commit.tree)}
        normalizer = repo.get_blob_normalizer()
        blobs: dict[bytes, bytes] = {}
        outside = False
        for path, data in inputs.items():
            if not path.resolve().is_relative_to(top):
                outside = True
                continue
            name = _within(top, path)
            # Line endings may differ between the working tree and the object, as git is configured.
            blobs[name] = normalizer.checkin_normalize(Blob.from_string(data), name).id
        folder, suffixes = removed
        prefix = _within(top, folder) + b"/"
        removed_files = any(
            name not in blobs
            for name in committed
            if name.startswith(prefix) and name.decode("utf-8", "replace").endswith(suffixes)
        )
        dirty = removed_files or outside or any(committed.get(name) != sha for name, sha in blobs.items())
        return GitState(head.decode("ascii"), dirty)


def _within(top: Path, path: Path) -> bytes:
    return path.resolve().relative_to(top).as_posix().encode("utf-8")
