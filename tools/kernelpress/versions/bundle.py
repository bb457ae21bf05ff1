"""Archives that hold versions of a kernel, for machines that reach no Hub.

The archive is a plain tar: ``manifest.json``, then ``<branch>/<path>`` for every file of every version and of
``main``. The manifest holds the sha256 of each; nothing that it does not name is ever unpacked.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi
from kernels._rust import Digest, DigestValidationError, Metadata  # type: ignore[import-untyped]

from kernelpress.conventions import MAIN, METADATA, REPO_TYPE, VERSION_BRANCH
from kernelpress.errors import PublishError
from kernelpress.hub.client import checked_repo_id, explained
from kernelpress.hub.repository import branch_heads, versions_of
from kernelpress.new_directory import new_directory
from kernelpress.spec.model import is_repo_id

_MANIFEST = "manifest.json"
_FORMAT = 1
_MAX_MANIFEST = 64 << 20


@dataclass(frozen=True)
class Bundled:
    """An archive: where its content is from, and the commit of each of its branches."""

    repo_id: str
    commits: Mapping[str, str]
    path: Path


def bundle(api: HfApi, repo_id: str, archive: Path, versions: Sequence[int] = ()) -> Bundled:
    """Write versions of a kernel, and ``main``, into an archive; the same content gives the same bytes.

    Args:
        api: The Hub.
        repo_id: The kernel.
        archive: File to write; what stands there is replaced once the new one is complete.
        versions: Which; all by default.

    Raises:
        PublishError: A version is not there, a digest does not hold, or the file cannot be written.
    """
    checked_repo_id(repo_id)
    with explained(api, repo_id), tempfile.TemporaryDirectory(prefix="kernelpress-") as scratch:
        branches = branch_heads(api, repo_id)
        published = versions_of(branches)
        missing = sorted(set(versions) - set(published))
        if missing or not published:
            raise PublishError(
                f"{repo_id} has no version {', '.join(map(str, missing)) or 'at all'}; "
                f"it has {published or 'none'}"
            )
        names = [f"v{number}" for number in (sorted(set(versions)) or published)] + [MAIN]
        folders = {}
        for name in names:
            folders[name] = Path(scratch, name)
            api.snapshot_download(
                repo_id, repo_type=REPO_TYPE, revision=branches[name], local_dir=folders[name]
            )
            shutil.rmtree(folders[name] / ".cache", ignore_errors=True)
            _check_digests(folders[name])
        commits = {name: branches[name] for name in names}
        try:
            _write(archive, repo_id, commits, folders)
        except OSError as error:
            raise PublishError(f"the archive cannot be written: {error.strerror}", path=archive) from error
        return Bundled(repo_id, commits, archive)


def unbundle(archive: Path, directory: Path) -> Bundled:
    """Unpack an archive into ``directory/<branch>``, all of it or nothing.

    ``LOCAL_KERNELS=<repo id>=<directory>/v1`` makes the loader take version 1 from there.

    Raises:
        PublishError: The archive is damaged or cannot be read, or something stands at ``directory``.
    """
    if directory.exists():
        raise PublishError("there is something here already; name a directory that is new", path=directory)
    with opened(archive) as (manifest, commits, folder):
        with new_directory(directory, PublishError) as fresh:
            shutil.copytree(folder, fresh, dirs_exist_ok=True)
        return Bundled(manifest["repo-id"], commits, directory)


def _write(archive: Path, repo_id: str, commits: Mapping[str, str], folders: Mapping[str, Path]) -> None:
    files = {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in folders.items()
        for path in files_below(folder)
    }
    manifest = {
        "format": _FORMAT,
        "repo-id": repo_id,
        "commits": commits,
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
    }
    unfinished = archive.with_name(f"{archive.name}.tmp-{os.getpid()}")
    try:
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as out:
            _add(out, _MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")
            for name, path in sorted(files.items()):
                _add(out, name, path.read_bytes())
        unfinished.replace(archive)
    finally:
        unfinished.unlink(missing_ok=True)


def _add(out: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    out.addfile(member, io.BytesIO(data))


@contextmanager
def opened(archive: Path) -> Iterator[tuple[dict[str, Any], dict[str, str], Path]]:
    """An archive's manifest, its commits, and a folder with all files, checked.

    Raises:
        PublishError: The archive is damaged or cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="kernelpress-") as scratch:
        try:
            with tarfile.open(archive) as source:
                manifest = _manifest(source, archive)
                _extract(source, manifest["sha256"], Path(scratch), archive)
        except (tarfile.TarError, EOFError) as error:
            # What is no tar gets a line for each compression that was tried.
            reason = str(error).partition("\n")[0].rstrip(":")
            raise PublishError(f"this is no archive that bundle wrote: {reason}", path=archive) from error
        except OSError as error:
            raise PublishError(f"cannot be read: {error.strerror or error}", path=archive) from error
        for name in manifest["commits"]:
            _check_digests(Path(scratch, name))
        yield manifest, dict(manifest["commits"]), Path(scratch)


def _manifest(source: tarfile.TarFile, archive: Path) -> dict[str, Any]:
    member = source.next()
    if member is None or member.name != _MANIFEST or not member.isreg() or member.size > _MAX_MANIFEST:
        raise PublishError("this is no archive that bundle wrote: it has no manifest", path=archive)
    file = source.extractfile(member)
    assert file is not None
    try:
        manifest = json.loads(file.read())
        repo_id, commits, digests = manifest["repo-id"], manifest["commits"], manifest["sha256"]
        sound = (
            manifest["format"] == _FORMAT
            and is_repo_id(repo_id)
            and all(name == MAIN or VERSION_BRANCH.fullmatch(name) for name in commits)
            and all(isinstance(commit, str) for commit in commits.values())
            and all(_is_inside(path, commits) and isinstance(digest, str) for path, digest in digests.items())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise PublishError("the archive's manifest is damaged; make it again", path=archive)
    return dict(manifest)


def _is_inside(path: str, commits: Mapping[str, str]) -> bool:
    parts = PurePosixPath(path).parts
    return (
        len(parts) > 1
        and parts[0] in commits
        and "\\" not in path
        and not any(part in ("..", "/") or part == ".git" for part in parts)
        and PurePosixPath(*parts).as_posix() == path
    )


def _extract(source: tarfile.TarFile, digests: Mapping[str, str], folder: Path, archive: Path) -> None:
    missing = dict(digests)
    for member in source:
        if member.name == _MANIFEST:
            continue
        expected = missing.pop(member.name, None)
        file = source.extractfile(member) if expected is not None and member.isreg() else None
        if file is None:
            raise PublishError(
                f"the archive holds {member.name!r}, which its manifest does not", path=archive
            )
        path = folder / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("xb") as out:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != expected:
            raise PublishError(f"{member.name} is damaged: its content is not what was bundled", path=archive)
    if missing:
        raise PublishError(f"the archive lacks {min(missing)}; it was cut off", path=archive)


def _check_digests(folder: Path) -> None:
    for metadata_file in sorted(folder.glob(f"build/*/{METADATA}")):
        variant = metadata_file.parent
        try:
            digest = Metadata.read_from_file(metadata_file).digest
            if digest is not None:
                digest.validate(Digest.hash_variant(digest.algorithm, variant))
        except (OSError, ValueError) as error:
            raise PublishError(f"{variant.name} has unreadable metadata: {error}") from error
        except DigestValidationError as error:
            violations = "; ".join(str(violation) for violation in error.violations)
            raise PublishError(f"{variant.name} is not what its metadata says: {violations}") from error


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder, in order of paths."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
