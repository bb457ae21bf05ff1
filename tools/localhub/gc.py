"""Garbage collection: removing objects of deleted branches, and large files of commits that never came."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .fsck import ReachableObjects, examine, repositories_below
from .git.lfs_objects import LargeFiles
from .store import locked


@dataclass(frozen=True)
class CleanReport:
    """Counts of what was removed; ``faults`` name the repositories that are damaged and were left alone."""

    objects: int
    large_files: int
    bytes: int
    faults: tuple[str, ...]


def clean(root: Path) -> CleanReport:
    """Remove every object and large file that no branch, tag or pull request leads to.

    A commit whose branch is deleted can be fetched by its id until then. Objects in packs, which the Hub itself never
    writes, stay.

    Raises:
        HubError: There is no Hub at ``root``, or it is running: a commit in the making has no branch yet.
    """
    # Refuses before the lock makes a directory.
    repositories_below(root)
    objects = large = freed = 0
    faults = []
    with locked(root):
        for name, folder in repositories_below(root):
            reachable = examine(folder)
            if reachable.faults:
                # A damaged repository may lead to more than can be seen.
                faults.append(f"{name}: {reachable.faults[0]}")
                continue
            for path in _unreachable(folder, reachable):
                freed += path.stat().st_size
                objects += path.parent.parent.name == "objects"
                large += path.parent.parent.name != "objects"
                path.unlink()
    return CleanReport(objects, large, freed, tuple(faults))


def _unreachable(folder: Path, reachable: ReachableObjects) -> Iterator[Path]:
    for path in sorted((folder / "objects").glob("[0-9a-f][0-9a-f]/*")):
        if len(path.name) == 38 and f"{path.parent.name}{path.name}".encode("ascii") not in reachable.objects:
            yield path
    for digest, path in LargeFiles(folder / "lfs").all():
        if digest not in reachable.large_files:
            yield path
