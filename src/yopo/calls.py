"""How a call is written down, so that a report can tell what made it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Given = TypeVar("Given")


class Verbatim(str):
    """Mark text that stands in a call as it is: the name of a variable, or another call."""

    __slots__ = ()


def written_call(function: str, *positional: object, **named: object) -> str:
    """Return a call as Python writes it; what is None is left out.

    Args:
        function: The function.
        *positional: What it gets by position.
        **named: What it gets by name.
    """
    arguments = [_written(value) for value in positional if value is not None]
    arguments += [f"{key}={_written(value)}" for key, value in named.items() if value is not None]
    return f"{function}({', '.join(arguments)})"


def lasting(given: Given) -> Given | list[Any]:
    """Return a list in the place of what can be gone through but once, so that it can be told."""
    if isinstance(given, Iterable) and not isinstance(given, str):
        return list(given)
    return given


def changed_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that `function` takes and that are not its defaults."""
    return {
        name: values[name]
        for name, parameter in inspect.signature(function).parameters.items()
        if name in values and values[name] != parameter.default
    }


def _written(value: object) -> str:
    return str(value) if isinstance(value, Verbatim) else repr(value)
