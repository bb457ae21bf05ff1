"""Branches, tags and pull requests' refs over HTTP."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .context import hub_of
from .messages import AsciiJSONResponse, flag, json_object, segment, string
from .paths import ref_name
from .problems import bad_request
from .refs import BRANCHES, PULLS, TAGS
from .repository import DEFAULT_BRANCH


def list_refs(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    return AsciiJSONResponse(
        {
            "branches": _ref_list(git.branches(), BRANCHES),
            "tags": _ref_list(git.tags(), TAGS),
            "converts": [],
            "pullRequests": _ref_list(git.pulls(), PULLS) if flag(request, "include_prs") else [],
        }
    )


async def create_branch(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_create_branch, request, body)


def _create_branch(request: Request, body: dict[str, object]) -> Response:
    git = hub_of(request).writable(request).git
    name = ref_name(segment(request, "ref"), "branch")
    git.create_branch(name, git.resolve(string(body, "startingPoint", DEFAULT_BRANCH)))
    return AsciiJSONResponse({})


def delete_branch(request: Request) -> Response:
    hub_of(request).writable(request).git.delete_branch(segment(request, "ref"))
    return AsciiJSONResponse({})


async def create_tag(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_create_tag, request, body)


def _create_tag(request: Request, body: dict[str, object]) -> Response:
    target = hub_of(request).writable(request)
    name = ref_name(string(body, "tag"), "tag")
    message = string(body, "message", "")
    try:
        message.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request('"message" is not valid Unicode') from None
    commit = target.git.resolve(segment(request, "ref"))
    target.git.create_tag(name, commit, message, target.caller.name)
    return AsciiJSONResponse({})


def delete_tag(request: Request) -> Response:
    hub_of(request).writable(request).git.delete_tag(segment(request, "ref"))
    return AsciiJSONResponse({})


def _ref_list(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]


def routes() -> Iterable[Route]:
    """The routes of this module."""
    repo = "/api/{kind}/{namespace}/{name}"
    yield Route(repo + "/refs", list_refs)
    yield Route(repo + "/branch/{ref}", create_branch, methods=["POST"])
    yield Route(repo + "/branch/{ref}", delete_branch, methods=["DELETE"])
    yield Route(repo + "/tag/{ref}", create_tag, methods=["POST"])
    yield Route(repo + "/tag/{ref}", delete_tag, methods=["DELETE"])
