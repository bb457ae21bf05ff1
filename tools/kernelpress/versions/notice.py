"""Notices to the readers of a published version, through the code that they load.

The loader shows its users nothing but what a kernel itself does: today's does not read ``kernel-status.toml``.
So a notice becomes a Python warning at the end of every variant's ``__init__.py``, with the digest brought up to
date, and a line on top of the card. Whoever is locked to an earlier commit keeps the files as they were.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from kernelpress.conventions import CARD, METADATA, SIGNATURE
from kernelpress.errors import PublishError
from kernelpress.hub.repository import fetch, tree

_MARK = b"\n# Added after publishing.\n"
_FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
_CARD_MARK = "> **Notice:** "

Operation = CommitOperationAdd | CommitOperationDelete


def notice(api: HfApi, repo_id: str, revision: str, text: str) -> list[Operation]:
    """The changes that make every variant of a revision warn with ``text``, in place of an earlier notice.

    A signature does not survive this: it is over the metadata, which has a new digest.
    """
    files = tree(api, repo_id, revision)
    operations: list[Operation] = []
    for variant in sorted({path.split("/")[1] for path in files if path.startswith("build/")}):
        root = f"build/{variant}/"
        inits = [path for path in files if path.startswith(root) and path.endswith("/__init__.py")]
        if not inits or f"{root}{METADATA}" not in files:
            continue
        path = min(inits, key=lambda path: (path.count("/"), path))
        data = fetch(api, repo_id, revision, path).partition(_MARK)[0] + _warning(text)
        metadata = _metadata(fetch(api, repo_id, revision, f"{root}{METADATA}"), repo_id, root)
        digest = metadata.get("digest")
        # Builds of other tools, and older ones, have none.
        if isinstance(digest, dict) and isinstance(digest.get("files"), dict):
            sha256 = base64.b64encode(hashlib.sha256(data).digest()).decode("ascii")
            digest["files"][path.removeprefix(root)] = sha256
        operations.append(CommitOperationAdd(path, data))
        rendered = json.dumps(metadata, indent=2, sort_keys=True).encode("ascii") + b"\n"
        operations.append(CommitOperationAdd(f"{root}{METADATA}", rendered))
        if f"{root}{SIGNATURE}" in files:
            operations.append(CommitOperationDelete(f"{root}{SIGNATURE}", is_folder=False))
    if CARD in files:
        card = fetch(api, repo_id, revision, CARD).decode("utf-8", "replace")
        operations.append(CommitOperationAdd(CARD, "".join(_with_notice(card, text)).encode("utf-8")))
    return operations


def _metadata(data: bytes, repo_id: str, root: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise PublishError(f"{root}{METADATA} of {repo_id} is no JSON object; publish this version anew")
    return fields


def _warning(text: str) -> bytes:
    # ascii() keeps the text a literal whatever it holds.
    return _MARK + f"__import__('warnings').warn({text!a}, UserWarning, stacklevel=2)\n".encode("ascii")


def _with_notice(card: str, text: str) -> Iterator[str]:
    front = _FRONT_MATTER.match(card)
    head, body = (front.group(), card[front.end() :]) if front else ("", card)
    if body.startswith(_CARD_MARK):
        body = body.partition("\n\n")[2]
    yield from (head, _CARD_MARK, text, "\n\n", body)
