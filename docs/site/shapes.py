"""For the reference: the shapes that stand in a comment on a `def` are shown below its signature."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

SHAPES = re.compile(r"#\s*(.*(?:->|\().*)")


class Shapes(griffe.Extension):
    """Adds the comment of a function's head to its docstring."""

    def on_function_instance(self, *, node: ast.AST | griffe.ObjectNode, func: griffe.Function, **_: Any) -> None:
        """Reads the lines from `def` to the first line of the body."""
        if not isinstance(node, ast.FunctionDef) or func.docstring is None:
            return
        head = func.source.splitlines()[: node.body[0].lineno - node.lineno]
        notes = [match[1].strip() for line in head if (match := SHAPES.search(line)) and "noqa" not in line]
        if notes:
            func.docstring.value = "Shapes: `" + "`, `".join(notes) + "`\n\n" + func.docstring.value
