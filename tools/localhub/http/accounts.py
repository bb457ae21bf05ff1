"""Routes of the caller's own account and of organizations."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..names import printable
from .context import hub_of
from .messages import AsciiJSONResponse, iso_time, segment
from .problems import Problem


def whoami(request: Request) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    if caller.token is None:
        raise Problem(401, "Invalid username or password.")
    visible = {repo.namespace for repo in hub.store.repositories() if hub.visible(repo, caller)}
    organizations = sorted(hub.trust | visible)
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
    caller, name = hub.caller(request), segment(request, "name")
    repos = (repo for repo in hub.store.repositories() if repo.namespace == name)
    kinds = [repo.kind for repo in repos if hub.visible(repo, caller)]
    if not kinds and name not in hub.trust:
        raise Problem(404, f"organization {printable(name)!r} not found")
    return AsciiJSONResponse(
        {
            "name": name,
            "fullname": name,
            "avatarUrl": "",
            "trustedKernelPublisher": name in hub.trust,
            "numModels": kinds.count("model"),
            "numKernels": kinds.count("kernel"),
        }
    )


def user(request: Request) -> Response:
    # Users exist only as holders of tokens, and who holds one is nobody's business.
    hub_of(request).caller(request)
    raise Problem(404, f"user {printable(segment(request, 'name'))!r} not found")


routes = [
    Route("/api/whoami-v2", whoami),
    Route("/api/organizations/{name}/overview", organization),
    Route("/api/users/{name}/overview", user),
]
