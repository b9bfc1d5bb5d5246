"""What a config's fields are: their meaning, their range, and how a person is told about them."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

NONE = type(None)
_BOUNDS = {"ge": ">=", "le": "<=", "gt": ">", "lt": "<"}


def field(
    *,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    help: str = "",
    choices: tuple[Any, ...] | None = None,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field with its meaning and its range.

    Args:
      default: the default value; without one the key is required.
      default_factory: makes the default, as in `dataclasses.field`.
      help: one line on what the field means and in which unit.
      choices: the allowed values, where a Literal type would be unwieldy.
      ge, le, gt, lt: bounds on a number, or on every number in a tuple.
    """
    bounds = {"ge": ge, "le": le, "gt": gt, "lt": lt}
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices is not None else None,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
    }
    if default is not dataclasses.MISSING and dataclasses.is_dataclass(default):
        made = default
        default, default_factory = dataclasses.MISSING, lambda: made
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Resolved annotations of a dataclass, its bases included."""
    return typing.get_type_hints(cls)


def is_config(tp: Any) -> bool:
    """Whether a type is a dataclass."""
    return isinstance(tp, type) and dataclasses.is_dataclass(tp)


def join(path: str, key: Any) -> str:
    """Extends a dotted path."""
    return f"{path}.{key}" if path else str(key)


def required(spec: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    missing = dataclasses.MISSING
    return spec.default is missing and spec.default_factory is missing


def type_name(tp: Any) -> str:
    """Names a type as a person writes it in YAML."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (tuple, list):
        if len(args) == 1 or args[-1] is Ellipsis:
            return f"list of {type_name(args[0])}"
        return f"[{', '.join(type_name(a) for a in args)}]"
    if origin in (dict, Mapping):
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    if is_config(tp):
        return f"{{{', '.join(f.name for f in dataclasses.fields(tp) if f.init)}}}"
    names = {NONE: "null", str: "text", bool: "true | false", Path: "path"}
    return names.get(tp) or getattr(tp, "__name__", str(tp))


def allowed(tp: Any, meta: Mapping[str, Any]) -> str:
    """Says what a field accepts: its type, choices and bounds."""
    if meta.get("choices") is not None:
        return ", ".join(map(str, meta["choices"]))
    bounds = [f"{_BOUNDS[name]} {bound:g}" for name, bound in (meta.get("bounds") or {}).items()]
    return " ".join([type_name(tp), " and ".join(bounds)]).strip()


def to_dict(config: Any) -> Any:
    """Turns a config into plain data that YAML and JSON can hold and `parse` reads back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = (f for f in dataclasses.fields(config) if f.init)
        return {f.name: to_dict(getattr(config, f.name)) for f in fields}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def describe(config: Any, where: str = "") -> list[tuple[str, str, Any, str]]:
    """Lists every setting as (dotted path, type with its range, value, help).

    Args:
      config: a dataclass (values are its defaults, ``"required"`` without one) or an instance.
      where: dotted path put before every path.
    """
    cls = config if isinstance(config, type) else type(config)
    rows: list[tuple[str, str, Any, str]] = []
    for spec in dataclasses.fields(cls):
        if not spec.init:
            continue
        hint, path = hints(cls)[spec.name], join(where, spec.name)
        value = _default(spec) if isinstance(config, type) else getattr(config, spec.name)
        if is_config(hint) and value == "required":
            rows += describe(hint, path)
        elif dataclasses.is_dataclass(value):
            rows += describe(value, path)
        else:
            text = spec.metadata.get("help", "")
            rows.append((path, allowed(hint, spec.metadata), to_dict(value), text))
    return rows


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is dataclasses.MISSING:
        return "required"
    return spec.default_factory()
