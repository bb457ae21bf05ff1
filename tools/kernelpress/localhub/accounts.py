"""Who is who: the caller's own account, and organizations."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .context import Caller, Hub, hub_of
from .messages import AsciiJSONResponse, iso_time, segment
from .paths import printable
from .problems import Problem


def whoami(request: Request) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    if caller.token is None:
        raise Problem(401, "Invalid username or password.")
    organizations = sorted(hub.trust | _populated(hub, caller))
    return AsciiJSONResponse(
        {
            "type": "user",
            "id": caller.name,
            "name": caller.name,
            "fullname": caller.name,
            "orgs": [{"type": "org", "id": name, "name": name, "fullname": name} for name in organizations],
            "auth": {
                "type": "access_token",
                "accessToken": {
                    "displayName": caller.name,
                    "role": caller.token.scope,
                    "createdAt": iso_time(caller.token.created),
                },
            },
        }
    )


def organization(request: Request) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    name = segment(request, "name")
    repos = [repo for repo in hub.store.namespaces().get(name, []) if hub.visible(repo, caller)]
    if not repos and name not in hub.trust:
        raise Problem(404, f"organization {printable(name)!r} not found")
    return AsciiJSONResponse(
        {
            "name": name,
            "fullname": name,
            "avatarUrl": "",
            "trustedKernelPublisher": name in hub.trust,
            "numModels": sum(repo.kind == "model" for repo in repos),
            "numKernels": sum(repo.kind == "kernel" for repo in repos),
        }
    )


def user(request: Request) -> Response:
    # Users exist only as holders of tokens, and who holds one is nobody's business.
    hub_of(request).caller(request)
    raise Problem(404, f"user {printable(segment(request, 'name'))!r} not found")


def _populated(hub: Hub, caller: Caller) -> set[str]:
    return {
        namespace
        for namespace, repos in hub.store.namespaces().items()
        if any(hub.visible(repo, caller) for repo in repos)
    }


def routes() -> Iterable[Route]:
    """The routes of this module."""
    yield Route("/api/whoami-v2", whoami)
    yield Route("/api/organizations/{name}/overview", organization)
    yield Route("/api/users/{name}/overview", user)
