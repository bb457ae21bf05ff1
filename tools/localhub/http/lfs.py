"""Routes of the git-lfs batch API and its transfers: large files in and out, streamed to and from the disk.

A transfer's address carries its own permission, signed and short-lived: the Hub's client sends no token there.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from math import ceil

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ..git.lfs_objects import LargeFile
from ..names import RepoId
from .context import (
    API_REPO,
    WEB_REPOS,
    Caller,
    Hub,
    Target,
    hub_of,
    named_repo,
    require_admission,
    require_readable,
)
from .messages import (
    MAX_QUESTION_BYTES,
    AsciiJSONResponse,
    Body,
    body_chunks,
    endpoint,
    whole_body,
    with_json,
)
from .problems import Problem, bad_request, too_large
from .resolve import large_response

MAX_LARGE_BYTES = 1 << 40
PART_BYTES = 64 << 20
MULTIPART_FROM = 256 << 20
_VALID_SECONDS = 6 * 3600
_MAX_OBJECTS = 1000
_MEDIA_TYPE = "application/vnd.git-lfs+json"
_XET_HINT = "set-HF_HUB_DISABLE_XET=1-and-upload-again"
_XET = (
    "this Hub stores large files through git-lfs, not Xet: set HF_HUB_DISABLE_XET=1 and upload again "
    "(files below 64 MiB need neither)"
)


@with_json(require_readable, MAX_QUESTION_BYTES)
def batch(request: Request, body: Body) -> Response:
    hub = hub_of(request)
    operation = body.get("operation")
    if operation not in ("upload", "download"):
        raise bad_request('"operation" must be "upload" or "download"')
    target = hub.writable(request) if operation == "upload" else hub.readable(request, content=True)
    if body.get("hash_algo", "sha256") != "sha256":
        raise bad_request("this Hub knows sha256 only")
    objects, transfers = body.get("objects"), body.get("transfers") or ["basic"]
    if not isinstance(objects, list) or len(objects) > _MAX_OBJECTS or not isinstance(transfers, list):
        raise bad_request(f'"objects" must be a list of at most {_MAX_OBJECTS}, and "transfers" a list')
    answers = [_answer(request, hub, target, operation, transfers, _announced(item)) for item in objects]
    return AsciiJSONResponse(
        {"transfer": "basic", "objects": answers, "hash_algo": "sha256"},
        headers={"Content-Type": _MEDIA_TYPE},
    )


def _announced(item: object) -> LargeFile:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or len(oid) != 64 or not set(oid) <= set("0123456789abcdef"):
        raise bad_request('each object needs an "oid" of 64 lower-case hex digits')
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise bad_request('each object needs a "size" in bytes')
    return LargeFile(oid, size)


def _answer(
    request: Request, hub: Hub, target: Target, operation: str, transfers: list[object], file: LargeFile
) -> dict[str, object]:
    """The batch API's answer for one file: an error, nothing to do, or the addresses to use."""

    def address(verb: str, part: int = 0) -> str:
        return _address(request, hub, target, verb, file, part)

    here = target.git.large.has(file)
    answer: dict[str, object] = {"oid": file.sha256, "size": file.size}
    action: dict[str, object]
    if operation == "download":
        if not here:
            return answer | {"error": {"code": 404, "message": "this repository has no such file"}}
        action = {"href": address("get")}
    elif file.size > MAX_LARGE_BYTES:
        return answer | {"error": {"code": 413, "message": f"larger than {MAX_LARGE_BYTES} bytes"}}
    elif here:
        return answer
    elif file.size < MULTIPART_FROM or "multipart" not in transfers:
        action = {"href": address("put")}
    else:
        parts = {str(part): address("part", part) for part in range(1, ceil(file.size / PART_BYTES) + 1)}
        action = {"href": address("done"), "header": {"chunk_size": str(PART_BYTES)} | parts}
    return answer | {"authenticated": True, "actions": {operation: action}}


async def put(request: Request) -> Response:
    target, file, _ = await run_in_threadpool(_permitted, request, "put")
    digest = hashlib.sha256()
    with await run_in_threadpool(target.git.large.incoming) as received:
        async for chunk in body_chunks(request, file.size):
            digest.update(chunk)
            await run_in_threadpool(received.write, chunk)
        await run_in_threadpool(target.git.large.keep, received, digest.hexdigest(), file)
    return Response()


async def put_part(request: Request) -> Response:
    target, file, part = await run_in_threadpool(_permitted, request, "part")
    start = (part - 1) * PART_BYTES
    length = min(PART_BYTES, file.size - start)
    if length <= 0:
        raise bad_request("there is no such part")
    digest, received = hashlib.sha256(), 0
    descriptor = os.open(target.git.large.parts(file), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        async for chunk in body_chunks(request, length):
            digest.update(chunk)
            await run_in_threadpool(os.pwrite, descriptor, chunk, start + received)
            received += len(chunk)
    except OSError:
        # A disk that is full stays so if what was started stays on it.
        target.git.large.parts(file).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    if received != length:
        raise bad_request(f"this part has {length} bytes, and {received} arrived")
    return Response(headers={"ETag": f'"{digest.hexdigest()}"'})


async def put_done(request: Request) -> Response:
    target, file, _ = await run_in_threadpool(_permitted, request, "done")
    await whole_body(request)
    await run_in_threadpool(target.git.large.keep_parts, file)
    return AsciiJSONResponse({"success": True})


def get(request: Request) -> Response:
    target, file, _ = _permitted(request, "get")
    if not target.git.large.has(file):
        raise Problem(404, "this repository has no such file")
    return large_response(request, target.git, file, {})


def xet_token(request: Request) -> Response:
    hub_of(request).readable(request)
    # hf_xet shows its user nothing of an answer but the address that it came from.
    return RedirectResponse(f"{endpoint(request)}{request.scope['path']}/{_XET_HINT}", 307)


def xet_refused(request: Request) -> Response:
    raise bad_request(_XET)


def _address(request: Request, hub: Hub, target: Target, verb: str, file: LargeFile, part: int = 0) -> str:
    until = int(time.time()) + _VALID_SECONDS
    claim = f"{verb}/{file.sha256}/{file.size}/{part}/{until}"
    signature = _signature(hub, target.id, claim, target.caller)
    return f"{endpoint(request)}/lfs/{target.id.kind}s/{target.id}/{claim}/{signature}"


def _signature(hub: Hub, repo: RepoId, claim: str, caller: Caller) -> str:
    holder = "" if caller.token is None else caller.token.sha256
    return hmac.new(hub.secret, f"{repo.kind}/{repo}/{claim}/{holder}".encode(), "sha256").hexdigest()


def _permitted(request: Request, verb: str) -> tuple[Target, LargeFile, int]:
    """The purpose of a signed address, if whoever got it still has the permission.

    Raises:
        Problem: 4xx for an address that is none, or was given to somebody who may not do this any more.
    """
    hub, segments = hub_of(request), request.path_params
    repo = named_repo(request)
    claim = f"{verb}/{segments['oid']}/{segments['size']}/{segments['part']}/{segments['until']}"
    callers = [Caller(None), *(Caller(token, bearer=True) for token in hub.tokens.all())]
    sent = segments["signature"].encode("latin-1")
    # Nothing of the address is believed, not even that its numbers are some, until the signature holds.
    signed = [
        caller
        for caller in callers
        if hmac.compare_digest(_signature(hub, repo, claim, caller).encode(), sent)
    ]
    if not signed:
        raise Problem(403, "this address was not given out by this Hub, or its token is revoked; ask again")
    if int(segments["until"]) < time.time():
        raise Problem(403, "this address has expired; ask again")
    file = LargeFile(segments["oid"], int(segments["size"]))
    if file.size > MAX_LARGE_BYTES:
        raise too_large(f"larger than {MAX_LARGE_BYTES} bytes")
    target = hub.visible_target(repo, signed[0])
    if target is None:
        raise hub.repo_not_found(signed[0])
    if verb == "get":
        require_admission(target)
    else:
        hub.require_write(request, signed[0], repo.namespace)
    return target, file, int(segments["part"])


_CLAIM = "/lfs/{kind}/{namespace}/{name}/%s/{oid}/{size}/{part}/{until}/{signature}"
_XET_TOKENS = [f"{API_REPO}/xet-{verb}-token/{{ref}}" for verb in ("write", "read")]

routes = [
    *(Route(f"{repo}.git/info/lfs/objects/batch", batch, methods=["POST"]) for repo in WEB_REPOS),
    Route(_CLAIM % "put", put, methods=["PUT"]),
    Route(_CLAIM % "part", put_part, methods=["PUT"]),
    Route(_CLAIM % "done", put_done, methods=["POST"]),
    Route(_CLAIM % "get", get),
    *(Route(token, xet_token) for token in _XET_TOKENS),
    *(Route(f"{token}/{_XET_HINT}", xet_refused) for token in _XET_TOKENS),
]
