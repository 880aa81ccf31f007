"""Configurations to and from plain nested dictionaries, so that they can be saved beside a run and read back identical.

A configuration is a frozen dataclass whose fields are ``bool``, ``int``, ``float``, ``str``, ``Literal[...]``,
``tuple[X, ...]``, unions of these with ``None``, and further such dataclasses. ``model.top_k`` is the dotted name of a
field inside one.
"""

import json
import os
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mom_jax.config import require


def to_dict(config: Any) -> dict[str, Any]:
    """``config`` as nested dictionaries of JSON's types; tuples become lists."""
    return {field.name: _to_json(getattr(config, field.name)) for field in fields(config)}


def _to_json(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def from_dict[Config](cls: type[Config], values: dict[str, Any]) -> Config:
    """The ``cls`` that ``to_dict`` turned into ``values``.

    Raises ``ValueError`` naming the dotted field on an unknown or missing one, on a value of the wrong type, and
    whatever the validation of ``cls`` raises.
    """
    return _build(cls, checked_values(cls, values), "")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    missing = [prefix + name for name in hints if name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing; {cls.__name__} needs all its fields")
    return cls(
        **{
            name: _build(hints[name], value, f"{prefix}{name}.") if is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


def save_config(path: str | os.PathLike, config: Any) -> None:
    """Write ``config`` as JSON that ``from_dict`` and the experiments' ``--config`` read back to an equal object."""
    Path(path).write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def checked_values(cls: type, values: Any, name: str = "") -> dict[str, Any]:
    """``values`` for some fields of ``cls``, with the types that ``cls`` declares: lists as tuples, integers as floats.

    Nested dataclasses stay dictionaries, and what holds between fields is not looked at, so that values can be merged
    with others before the object is made. Raises ``ValueError`` naming the dotted field (after ``name``), its value and
    what is allowed.
    """
    hints = get_type_hints(cls)
    field_names = ", ".join(hints)
    require(isinstance(values, dict), name or cls.__name__, values, f"it must be a table with keys among {field_names}")
    result = {}
    for key, value in values.items():
        dotted = f"{name}.{key}" if name else key
        require(key in hints, dotted, value, f"there is no such field; choose among {field_names}")
        if is_dataclass(hints[key]):
            result[key] = checked_values(hints[key], value, dotted)
        else:
            try:
                result[key] = _as_type(hints[key], value)
            except TypeError:
                require(False, dotted, value, f"it must be {_describe(hints[key])}")
    return result


def _as_type(hint: Any, value: Any) -> Any:
    """``value`` as ``hint`` wants it; ``TypeError`` if it is nothing of the kind (1 is a number, True is not)."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        for alternative in arguments:
            with suppress(TypeError):
                return _as_type(alternative, value)
    elif get_origin(hint) is Literal:
        if value in arguments:
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_as_type(arguments[0], item) for item in value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _describe(hint: Any) -> str:
    """``hint`` in words for error messages."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe, arguments))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, arguments))
    if get_origin(hint) is tuple:
        return f"a list whose items are each {_describe(arguments[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string", NoneType: "null"}[hint]
