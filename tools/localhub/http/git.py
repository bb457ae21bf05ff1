"""Routes of ``git clone`` and ``git fetch`` over smart HTTP, read-only."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import IO

import anyio
from anyio.to_thread import run_sync
from dulwich.errors import GitProtocolError, HangupException, NotGitRepository
from dulwich.protocol import CAPABILITY_THIN_PACK, Protocol, ReceivableProtocol, pkt_line
from dulwich.repo import Repo
from dulwich.server import DictBackend, UploadPackHandler
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from .context import WEB_REPOS, hub_of, require_readable
from .messages import whole_body
from .problems import Problem, bad_request, too_large

_MAX_REQUEST = 2 << 20
# Of one request, each once; git sends half as many commits that it has at a time.
_MAX_OBJECTS = 1 << 15
# Negotiation and packing keep a processor busy; beyond these threads they wait, and all else goes on.
_threads = anyio.CapacityLimiter(2)
# The advertisement is made again where a branch went while it was being made.
_ATTEMPTS = 20
_CHUNK = 256 << 10
_NO_PUSH = "This Hub takes no git push. Publish with 'kernelpress publish', or upload with huggingface_hub.\n"


class _Handler(UploadPackHandler):
    """dulwich's, without its demand for thin packs, which it never makes."""

    @classmethod
    def required_capabilities(cls) -> tuple[bytes, ...]:
        return tuple(name for name in super().required_capabilities() if name != CAPABILITY_THIN_PACK)


async def advertise(request: Request) -> Response:
    return await run_sync(_advertise, request, limiter=_threads)


def _advertise(request: Request) -> Response:
    service = request.query_params.get("service")
    if service == "git-receive-pack":
        return no_push(request)
    if service != "git-upload-pack":
        raise bad_request("use a git client that speaks the smart HTTP protocol (git 1.6.6 or later)")
    for attempt in range(1, _ATTEMPTS + 1):
        output = BytesIO()
        # A packet: its length in four hex digits, itself included, and its content.
        output.write(b"001e# service=git-upload-pack\n0000")
        try:
            _upload_pack(request, BytesIO(), output, advertise_refs=True)
            break
        except Problem as problem:
            if attempt == _ATTEMPTS or not isinstance(problem.__cause__, LookupError):
                raise
    return Response(
        output.getvalue(),
        media_type="application/x-git-upload-pack-advertisement",
        headers={"Cache-Control": "no-cache"},
    )


async def upload_pack(request: Request) -> Response:
    await run_in_threadpool(require_readable, request)
    body = await whole_body(request, _MAX_REQUEST)
    return await run_sync(_upload_pack_response, request, body, limiter=_threads)


def _upload_pack_response(request: Request, body: bytes) -> Response:
    if request.headers.get("content-encoding") in ("gzip", "x-gzip"):
        body = _gunzip(body)
    # A pack can be large; past the first MiB it goes through a file.
    output: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
    try:
        _upload_pack(request, BytesIO(without_repeats(body)), output, advertise_refs=False)
    except BaseException:
        output.close()
        raise
    output.seek(0)
    return StreamingResponse(
        _drain(output),
        media_type="application/x-git-upload-pack-result",
        headers={"Cache-Control": "no-cache"},
    )


def without_repeats(body: bytes) -> bytes:
    """A fetch request that names every object once: dulwich walks from each as often as it is named.

    Raises:
        Problem: 413 when it names too many; 400 when it is no such request.
    """
    packets: list[bytes] = []
    named: set[tuple[bytes, ...]] = set()
    protocol = Protocol(BytesIO(body).read, lambda data: None)
    try:
        while True:
            line = protocol.read_pkt_line()
            # What follows the object's id is what the client can do, in the first line only.
            fields = tuple((line or b"").split()[:2])
            if fields[:1] in ((b"want",), (b"have",), (b"shallow",)):
                if fields in named:
                    continue
                named.add(fields)
            packets.append(pkt_line(line))
            if len(packets) > 2 * _MAX_OBJECTS or len(named) > _MAX_OBJECTS:
                raise too_large(f"a fetch request names at most {_MAX_OBJECTS} objects")
    except HangupException:
        return b"".join(packets)
    except (GitProtocolError, AssertionError, ValueError) as error:
        raise bad_request(f"not a valid git-upload-pack request: {error}") from error


def no_push(request: Request) -> Response:
    hub_of(request).readable(request)
    return PlainTextResponse(_NO_PUSH, status_code=403)


def _upload_pack(request: Request, source: IO[bytes], sink: IO[bytes], *, advertise_refs: bool) -> None:
    target = hub_of(request).readable(request, content=True)
    protocol = ReceivableProtocol(source.read, sink.write)
    try:
        # A handle of its own: dulwich's are not made for several threads.
        with Repo(str(target.git.path)) as git:
            handler = _Handler(
                DictBackend({"/": git}), ["/"], protocol, stateless_rpc=True, advertise_refs=advertise_refs
            )
            handler.handle()
    except NotGitRepository:
        raise hub_of(request).repo_not_found(target.caller) from None
    # The errors that dulwich raises for requests that no git client would send.
    except (GitProtocolError, HangupException, AssertionError, ValueError, LookupError, TypeError) as error:
        raise bad_request(f"not a valid git-upload-pack request: {error}") from error


def _gunzip(body: bytes) -> bytes:
    unzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        data = unzip.decompress(body, _MAX_REQUEST)
    except zlib.error:
        raise bad_request("the request's body is not valid gzip") from None
    if unzip.unconsumed_tail:
        raise too_large(f"the request is larger than the {_MAX_REQUEST >> 20} MiB this Hub takes")
    return data


def _drain(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


routes = [
    route
    for repo in (f"{repo}{suffix}" for repo in WEB_REPOS for suffix in (".git", ""))
    for route in (
        Route(repo + "/info/refs", advertise),
        Route(repo + "/git-upload-pack", upload_pack, methods=["POST"]),
        Route(repo + "/git-receive-pack", no_push, methods=["POST"]),
    )
]
