"""The Hub's own description of its HTTP surface, made from the routes that it serves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .messages import AsciiJSONResponse

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_BODIES = {
    "commit": "application/x-ndjson",
    "paths_info": "application/x-www-form-urlencoded",
    "put": "application/octet-stream",
    "put_part": "application/octet-stream",
    "upload_pack": "application/x-git-upload-pack-request",
}


def describe(served: Sequence[BaseRoute]) -> dict[str, object]:
    """An OpenAPI 3.1 document of these routes: addresses, methods, parameters and kinds of bodies."""
    paths: dict[str, dict[str, object]] = {}
    for route in served:
        if not isinstance(route, Route):
            continue
        names = _PARAMETER.findall(route.path)
        item = paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})
        for method in sorted(route.methods or ()):
            operation: dict[str, object] = {
                "operationId": f"{route.endpoint.__module__.rpartition('.')[2]}.{route.endpoint.__name__}",
                "parameters": [
                    {"name": name, "in": "path", "required": True, "schema": _schema(name)} for name in names
                ],
                "responses": {"2XX": {"description": "done"}, "4XX": {"description": "says what is wrong"}},
            }
            if method in ("POST", "PUT", "DELETE"):
                kind = _BODIES.get(route.endpoint.__name__, "application/json")
                operation["requestBody"] = {"content": {kind: {"schema": {}}}}
            item[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "kernelpress embedded Hub", "version": "1"},
        "paths": paths,
    }


def _schema(name: str) -> dict[str, object]:
    return {"type": "string"} | ({"enum": ["kernels", "models"]} if name == "kind" else {})


def openapi(request: Request) -> Response:
    return AsciiJSONResponse(describe(request.app.routes))


routes = [Route("/api/openapi.json", openapi)]
