"""Validation of the metadata block of a ``README.md``, which the client asks for before it uploads one."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .context import hub_of
from .messages import MAX_QUESTION_BYTES, AsciiJSONResponse, Body, string, with_json

_MAX_BLOCK = 64 << 10
_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


class _PlainLoader(yaml.SafeLoader):
    """YAML without references: what a few lines refer to can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not taken here", event.start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys are not taken here", key.start_mark
                )
        super().flatten_mapping(node)


def metadata_fault(card: str) -> str | None:
    """Name the fault in the YAML block at the top of ``card``; None if there is no fault, or no block."""
    block = _BLOCK.match(card)
    if block is None:
        return None
    if len(block.group(1)) > _MAX_BLOCK:
        return f"the metadata block is longer than {_MAX_BLOCK >> 10} KiB"
    try:
        metadata = yaml.load(block.group(1), _PlainLoader)
    # PyYAML lets the errors of a bad date or number through, and follows nesting by recursion.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return f"the metadata block is not valid YAML: {error or type(error).__name__}"
    if metadata is not None and not isinstance(metadata, dict):
        return "the metadata block must be a YAML mapping"
    return None


def identify(request: Request) -> None:
    # Anybody may ask, as on the Hugging Face Hub: its client checks a card before there is a repository for it.
    hub_of(request).caller(request)


@with_json(identify, MAX_QUESTION_BYTES)
def validate_yaml(request: Request, body: Body) -> Response:
    fault = metadata_fault(string(body, "content"))
    errors = [] if fault is None else [{"message": fault}]
    return AsciiJSONResponse({"errors": errors, "warnings": []}, status_code=400 if errors else 200)


routes = [Route("/api/validate-yaml", validate_yaml, methods=["POST"])]
