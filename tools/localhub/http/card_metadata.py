"""Validation of the metadata block of a ``README.md``, which the client asks for before it uploads one."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub.repocard_data import model_index_to_eval_results
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..names import printable
from .context import hub_of
from .messages import MAX_QUESTION_BYTES, AsciiJSONResponse, Body, string, with_json

_MAX_BLOCK = 64 << 10
_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


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
    return _model_index_fault((metadata or {}).get("model-index"))


def _model_index_fault(index: object) -> str | None:
    """The fault in a ``model-index``, which the client could not read back."""
    if index is None:
        return None
    if not isinstance(index, list):
        return '"model-index" must be an array'
    for model in index:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            return '"model-index": each model needs a "name"'
        try:
            model_index_to_eval_results([model | {"results": model.get("results") or []}])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            return f'"model-index": the results of {printable(model["name"])!r} lack something: {error}'
    return None


def identify(request: Request) -> None:
    # Anybody may ask, as on the Hugging Face Hub: its client checks a card before there is a repository for it.
    hub_of(request).caller(request)


@with_json(identify, MAX_QUESTION_BYTES)
def validate_yaml(request: Request, body: Body) -> Response:
    fault = metadata_fault(string(body, "content"))
    errors = [] if fault is None else [{"message": fault}]
    bare = _BLOCK.match(string(body, "content")) is None
    warnings = (
        [{"message": "the card has no metadata: a YAML block between two lines of ---"}] if bare else []
    )
    return AsciiJSONResponse({"errors": errors, "warnings": warnings}, status_code=400 if errors else 200)


routes = [Route("/api/validate-yaml", validate_yaml, methods=["POST"])]
