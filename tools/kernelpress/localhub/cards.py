"""Check the metadata block of a ``README.md``, which the client asks for before it uploads one."""

from __future__ import annotations

import re
from collections.abc import Iterable

import yaml  # type: ignore[import-untyped]
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .context import hub_of
from .messages import AsciiJSONResponse, json_object, string

_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


def metadata_fault(card: str) -> str | None:
    """What is wrong with the YAML block at the top of ``card``, or None; a card without one is fine."""
    block = _BLOCK.match(card)
    if block is None:
        return None
    try:
        metadata = yaml.safe_load(block.group(1))
    # PyYAML lets the errors of a bad date or number through, and follows nesting by recursion.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return f"the metadata block is not valid YAML: {error or type(error).__name__}"
    if metadata is not None and not isinstance(metadata, dict):
        return "the metadata block must be a YAML mapping"
    return None


async def validate_yaml(request: Request) -> Response:
    body = await json_object(request)
    hub_of(request).caller(request)
    fault = await run_in_threadpool(metadata_fault, string(body, "content"))
    errors = [] if fault is None else [{"message": fault}]
    return AsciiJSONResponse({"errors": errors, "warnings": []}, status_code=400 if errors else 200)


def routes() -> Iterable[Route]:
    """The routes of this module."""
    yield Route("/api/validate-yaml", validate_yaml, methods=["POST"])
