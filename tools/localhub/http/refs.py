"""Routes of branches, tags and pull requests' refs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..git.refs import BRANCHES, PULLS, TAGS
from ..git.repository import DEFAULT_BRANCH
from ..names import ref_name
from .context import API_REPO, hub_of, require_writable
from .messages import AsciiJSONResponse, Body, check_parameters, flag, segment, string, with_json
from .problems import bad_request


def list_refs(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    check_parameters(request, "include_prs")
    return AsciiJSONResponse(
        {
            "branches": _ref_list(git.branches(), BRANCHES),
            "tags": _ref_list(git.tags(), TAGS),
            "converts": [],
            "pullRequests": _ref_list(git.pulls(), PULLS) if flag(request, "include_prs") else [],
        }
    )


@with_json(require_writable)
def create_branch(request: Request, body: Body) -> Response:
    git = hub_of(request).writable(request).git
    name = ref_name(segment(request, "ref"), "branch")
    git.create_branch(name, git.resolve(string(body, "startingPoint", DEFAULT_BRANCH)))
    return AsciiJSONResponse({})


def delete_branch(request: Request) -> Response:
    hub_of(request).writable(request).git.delete_branch(segment(request, "ref"))
    return AsciiJSONResponse({})


@with_json(require_writable)
def create_tag(request: Request, body: Body) -> Response:
    target = hub_of(request).writable(request)
    commit = target.git.resolve(segment(request, "ref"))
    name = ref_name(string(body, "tag"), "tag")
    message = string(body, "message", "")
    try:
        message.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request('"message" is not valid Unicode') from None
    target.git.create_tag(name, commit, message, target.caller.name)
    return AsciiJSONResponse({})


def delete_tag(request: Request) -> Response:
    hub_of(request).writable(request).git.delete_tag(segment(request, "ref"))
    return AsciiJSONResponse({})


def _ref_list(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]


routes = [
    Route(API_REPO + "/refs", list_refs),
    Route(API_REPO + "/branch/{ref}", create_branch, methods=["POST"]),
    Route(API_REPO + "/branch/{ref}", delete_branch, methods=["DELETE"]),
    Route(API_REPO + "/tag/{ref}", create_tag, methods=["POST"]),
    Route(API_REPO + "/tag/{ref}", delete_tag, methods=["DELETE"]),
]
