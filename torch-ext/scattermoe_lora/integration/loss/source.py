"""What a class's forward does with its logits, read from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

_TANH = {"torch.tanh", "nn.functional.tanh", "F.tanh"}


@functools.cache
def obstacle(forward: Callable[..., Any], head: str) -> str | None:
    """The reason why a forward needs the logits themselves; None where it hands them to its loss and result alone.

    On the way they may be multiplied or divided by numbers, go through ``tanh``, be cast by ``float()`` and made
    ``contiguous()``.

    Args:
        forward: Of a model's class.
        head: The attribute of the model that it calls for its logits.
    """
    function = inspect.unwrap(forward)
    if "labels" not in inspect.signature(function).parameters:
        return "its forward takes no labels"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return "the source of its forward is not at hand"
    return _Uses(tree, head).obstacle()


class _Uses:
    """The uses of the logits in a function."""

    def __init__(self, tree: ast.Module, head: str) -> None:
        self._head = head
        self._nodes = list(ast.walk(tree))
        self._parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self._names: set[str] = set()
        self._reaches_loss = False

    def obstacle(self) -> str | None:
        heads = [
            node for node in self._nodes if isinstance(node, ast.Call) and _is_own(node.func, self._head)
        ]
        if len(heads) != 1:
            return f"its forward calls self.{self._head} {len(heads)} times, not once"
        pending: list[ast.expr] = [*heads]
        while pending:
            before = set(self._names)
            for node in pending:
                if not self._is_harmless(node):
                    return f"its forward computes something else with the logits: {self._statement(node)}"
            new = self._names - before
            pending = [
                node
                for node in self._nodes
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in new
            ]
        return None if self._reaches_loss else "its forward does not compute its loss by self.loss_function"

    def _is_harmless(self, node: ast.expr) -> bool:
        """Follow an expression that is the logits to where it ends; True if that is one of the known places."""
        parent = self._parents[node]
        match parent:
            case ast.Attribute(attr="device"):
                return True
            case ast.Attribute(attr="float" | "contiguous"):
                call = self._parents[parent]
                return isinstance(call, ast.Call) and call.func is parent and self._is_harmless(call)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div()) if left is node:
                return self._is_harmless(parent)
            case ast.Call(func=function) if ast.unparse(function) in _TANH:
                return self._is_harmless(parent)
            case ast.Assign(targets=[ast.Name(id=name)]):
                self._names.add(name)
                return True
            case ast.Call(func=function) if _is_own(function, "loss_function"):
                self._reaches_loss = True
                return True
            case ast.keyword(arg=name):
                call = self._parents[parent]
                if isinstance(call, ast.Call) and _is_own(call.func, "loss_function"):
                    self._reaches_loss = True
                    return True
                return name == "logits" and isinstance(self._parents[call], ast.Return)
            case ast.Tuple(elts=[first, *_]):
                return first is node
        return False

    def _statement(self, node: ast.AST) -> str:
        while not isinstance(node, ast.stmt):
            node = self._parents[node]
        return ast.unparse(node).partition("\n")[0]


def _is_own(function: ast.expr, name: str) -> bool:
    """True for ``self.<name>``."""
    match function:
        case ast.Attribute(value=ast.Name(id="self"), attr=attribute):
            return attribute == name
    return False
