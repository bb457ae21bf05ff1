"""Removing what nothing refers to any more: objects of deleted branches, large files of commits that never came."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernelpress.errors import HubError

from .fsck import Reached, examine, repositories_below
from .large import LargeFiles
from .server import locked


@dataclass(frozen=True)
class Cleaned:
    """What was removed; ``faults`` name the repositories that are damaged and were left alone."""

    objects: int
    large_files: int
    bytes: int
    faults: tuple[str, ...]


def clean(root: Path) -> Cleaned:
    """Remove what no branch, tag or pull request of any repository leads to.

    A commit whose branch is deleted can be fetched by its id until then. Objects in packs, which the Hub itself never
    writes, stay.

    Raises:
        HubError: There is no Hub at ``root``, or it is running: a commit in the making has no branch yet.
    """
    if not (root / "repos").is_dir():
        raise HubError("there is no Hub here; name its directory with --root", path=root)
    objects = large = freed = 0
    faults = []
    with locked(root):
        for name, place in repositories_below(root):
            reached = examine(place)
            if reached.faults:
                # What is damaged may lead to more than can be seen.
                faults.append(f"{name}: {reached.faults[0]}")
                continue
            for path in _unreached(place, reached):
                freed += path.stat().st_size
                objects += path.parent.parent.name == "objects"
                large += path.parent.parent.name != "objects"
                path.unlink()
    return Cleaned(objects, large, freed, tuple(faults))


def _unreached(place: Path, reached: Reached) -> Iterator[Path]:
    for path in sorted((place / "objects").glob("[0-9a-f][0-9a-f]/*")):
        if len(path.name) == 38 and f"{path.parent.name}{path.name}".encode("ascii") not in reached.objects:
            yield path
    for digest, path in LargeFiles(place / "lfs").all():
        if digest not in reached.large_files:
            yield path
