"""What help() and editors show of a function that takes the fields of a dataclass as keywords."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any


def show_fields(function: Callable[..., Any], of: type, *further: str) -> None:
    """Shows a method (self, **keywords) with the fields of a dataclass, and their defaults, for its keywords.

    Named parameters keep their place; `further` are keywords without a default of their own.
    """
    kept = [p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {parameter.name for parameter in kept}
    added = [_keyword(f.name, _default(f)) for f in dataclasses.fields(of) if f.name not in taken]
    added += [_keyword(name, None) for name in further]
    kept.sort(key=lambda parameter: parameter.kind)
    shown = inspect.Signature([*kept, *added])
    function.__signature__ = shown  # type: ignore[attr-defined]


def _keyword(name: str, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
