"""Configuration: frozen dataclasses beside the code they configure, filled strictly from YAML.

::

  @dataclasses.dataclass(frozen=True)
  class OptimizerConfig:
      lr: float = field(default=1e-3, gt=0, help="peak learning rate")
      kind: Literal["adamw", "lion"] = field(default="adamw", help="update rule")

  cfg = parse(OptimizerConfig, apply_overrides(read_yaml("c.yaml"), ["lr=3e-4"]))

Every mistake raises a `ConfigError` of one line that names the dotted path, the value, what is
allowed and, for a name, the nearest valid one. A dataclass may define ``validate(self)``, called
once its fields are filled, to reject impossible combinations (raise `ConfigError` or ValueError).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from latent_jax.core.errors import ConfigError
from latent_jax.core.fields import (
    NONE,
    allowed,
    describe,
    field,
    hints,
    is_config,
    join,
    required,
    to_dict,
    type_name,
)
from latent_jax.core.yamlio import (
    apply_overrides,
    deep_merge,
    dump_yaml,
    kind,
    parse_yaml,
    read_yaml,
    suggest,
)

__all__ = [
    "apply_overrides",
    "config_hash",
    "deep_merge",
    "describe",
    "dump_yaml",
    "field",
    "parse",
    "parse_yaml",
    "read_yaml",
    "to_dict",
]

C = TypeVar("C")


def parse(cls: type[C], tree: Mapping[str, Any] | None, where: str = "") -> C:
    """Fills the dataclass ``cls`` from nested plain data.

    Args:
      cls: a (frozen) dataclass.
      tree: what `read_yaml` and `apply_overrides` return; ``None`` means all defaults. Values may
        already be instances of the wanted dataclasses.
      where: dotted path put before every path in a message.

    Raises:
      ConfigError: unknown or missing key, wrong type, out of range, impossible combination.
    """
    return _Parser(cls, where).section(cls, {} if tree is None else tree, where)


class _Parser:
    """Carries the root class, so that a misplaced key can be told where it belongs."""

    def __init__(self, root: type, where: str):
        self.root, self.where = root, where

    def section(self, cls: type, tree: Any, path: str) -> Any:
        if isinstance(tree, cls):
            return tree
        if not isinstance(tree, Mapping):
            keys = ", ".join(f.name for f in dataclasses.fields(cls) if f.init)
            raise ConfigError(
                f"{path or 'config'} = {_show(tree)}: is {kind(tree)}; "
                f"allowed: a mapping with the keys {keys}"
            )
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        unknown = [key for key in tree if key not in known]
        if unknown:
            raise ConfigError(self._unknown(unknown, list(known), tree, path))
        values = {}
        for name, spec in known.items():
            at = join(path, name)
            if name in tree:
                values[name] = self.value(hints(cls)[name], tree[name], at, spec.metadata)
            elif required(spec):
                hint = spec.metadata.get("help", "")
                raise ConfigError(
                    f"{at}: missing; give it {type_name(hints(cls)[name])}"
                    + (f" ({hint})" if hint else "")
                )
        return self._build(cls, values, path)

    def _unknown(self, unknown: list[Any], known: list[str], tree: Any, path: str) -> str:
        key = unknown[0]
        hint = suggest(key, known)
        if not hint:
            places = [p for p, *_ in describe(self.root) if p.rpartition(".")[2] == key]
            hint = f"; did you mean {join(self.where, places[0])!r}?" if places else ""
        more = f" (and {', '.join(map(repr, unknown[1:]))})" if len(unknown) > 1 else ""
        return (
            f"{join(path, key)} = {_show(tree[key])}: unknown key{more}{hint}; "
            f"allowed: {', '.join(known)}"
        )

    def _build(self, cls: type, values: dict[str, Any], path: str) -> Any:
        try:
            config = cls(**values)
            if callable(getattr(config, "validate", None)):
                config.validate()
        except (ConfigError, ValueError) as error:
            text = " ".join(str(error).split())
            name = path or cls.__name__
            raise ConfigError(text if text.startswith(name) else f"{name}: {text}") from None
        return config

    def value(self, tp: Any, value: Any, path: str, meta: Mapping[str, Any]) -> Any:
        """Coerces one value to type ``tp`` or raises."""
        origin = typing.get_origin(tp)
        if tp is Any or tp is object:
            return value
        if origin in (Union, types.UnionType):
            return self._union(tp, value, path, meta)
        if is_config(tp):
            return self.section(tp, {} if value is None else value, path)
        if origin is Literal:
            return self._literal(tp, value, path)
        if origin in (tuple, list) or tp in (tuple, list):
            return self._sequence(tp, value, path, meta)
        if origin in (dict, Mapping) or tp is dict:
            if not isinstance(value, Mapping):
                raise self._wrong(tp, value, path)
            key_type, item = typing.get_args(tp) or (Any, Any)
            keys = [self.value(key_type, key, f"{path} (key)", {}) for key in value]
            items = [self.value(item, v, join(path, k), meta) for k, v in value.items()]
            return dict(zip(keys, items, strict=True))
        return _check(self._scalar(tp, value, path, meta), path, meta)

    def _scalar(self, tp: Any, value: Any, path: str, meta: Mapping[str, Any]) -> Any:
        if tp is bool and isinstance(value, bool):
            return value
        if tp is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if tp is int and isinstance(value, float) and value.is_integer():
            return int(value)  # 1e6 is how people write a million steps
        if tp is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isnan(value):
                raise ConfigError(f"{path} = nan: not a number; allowed: {allowed(tp, meta)}")
            return float(value)
        if tp is str and isinstance(value, str):
            return value
        if tp is Path and isinstance(value, str | Path) and str(value):
            return Path(value)
        if tp is NONE and value is None:
            return None
        if isinstance(tp, type) and tp not in (bool, int, float, str, Path, NONE):
            if isinstance(value, tp):
                return value
        raise self._wrong(tp, value, path, meta)

    def _wrong(self, tp: Any, value: Any, path: str, meta: Mapping[str, Any] = {}) -> ConfigError:  # noqa: B006
        tip = ""
        if tp is str and isinstance(value, int | float):
            tip = f"; put it in quotes: '{value}'"
        elif isinstance(value, str) and typing.get_origin(tp) in (tuple, list):
            tip = f"; write a list: [{value}]"
        return ConfigError(
            f"{path} = {_show(value)}: is {kind(value)}; allowed: {allowed(tp, meta)}{tip}"
        )

    def _literal(self, tp: Any, value: Any, path: str) -> Any:
        options = typing.get_args(tp)
        for option in options:
            if type(option) is type(value) and option == value:
                return option
        hint = suggest(value, options) if isinstance(value, str) else ""
        raise ConfigError(
            f"{path} = {_show(value)}: not a choice{hint}; allowed: {allowed(tp, {})}"
        )

    def _sequence(self, tp: Any, value: Any, path: str, meta: Mapping[str, Any]) -> Any:
        if not isinstance(value, list | tuple):
            raise self._wrong(tp, value, path, meta)
        container = typing.get_origin(tp) or tp
        args = typing.get_args(tp) or (Any, ...)
        if container is list or args[-1] is Ellipsis:
            item_types = [args[0]] * len(value)
        elif len(args) != len(value):
            raise ConfigError(
                f"{path} = {_show(value)}: has {len(value)} items; allowed: {allowed(tp, meta)}"
            )
        else:
            item_types = list(args)
        items = zip(item_types, value, strict=True)
        return container(self.value(t, v, f"{path}.{i}", meta) for i, (t, v) in enumerate(items))

    def _union(self, tp: Any, value: Any, path: str, meta: Mapping[str, Any]) -> Any:
        members = [m for m in typing.get_args(tp) if _accepts(m, value)]
        if value is None and NONE in typing.get_args(tp):
            return None
        if len(members) > 1 and isinstance(value, Mapping):
            members = _by_tag(members, value, path)
        errors = []
        for member in members:
            try:
                return self.value(member, value, path, meta)
            except ConfigError as error:
                errors.append(error)
        # Of several sections the likeliest comes first, and its complaint is the useful one.
        if len(errors) == 1 or (errors and isinstance(value, Mapping)):
            raise errors[0]
        raise self._wrong(tp, value, path, meta)


def _accepts(tp: Any, value: Any) -> bool:
    """Whether a union member can be meant by this kind of YAML value (its content aside)."""
    origin = typing.get_origin(tp) or tp
    if is_config(tp):
        return isinstance(value, Mapping | tp)
    if origin is Literal:
        return any(type(value) is type(option) for option in typing.get_args(tp))
    if origin in (tuple, list):
        return isinstance(value, list | tuple)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if tp is bool or isinstance(value, bool):
        return tp is bool and isinstance(value, bool)
    if tp is float:
        return isinstance(value, int | float)
    if tp is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if tp is Path:
        return isinstance(value, str | Path)
    return tp is Any or (isinstance(tp, type) and isinstance(value, tp))


def _by_tag(members: list[Any], value: Mapping[str, Any], path: str) -> list[Any]:
    """Among dataclasses, a Literal field such as ``kind`` decides, else who knows the keys."""
    options: dict[str, list[Any]] = {}
    for member in members:
        for name, hint in hints(member).items() if is_config(member) else ():
            if typing.get_origin(hint) is Literal and name in value:
                if value[name] in typing.get_args(hint):
                    return [member]
                options.setdefault(name, []).extend(typing.get_args(hint))
    for name, known in options.items():
        hint = suggest(value[name], known)
        raise ConfigError(
            f"{join(path, name)} = {_show(value[name])}: not a choice{hint}; "
            f"allowed: {', '.join(map(str, known))}"
        )

    def strangers(member: Any) -> int:
        return len(set(value) - set(hints(member))) if is_config(member) else 0

    return sorted(members, key=strangers)


def _check(value: Any, path: str, meta: Mapping[str, Any]) -> Any:
    choices = meta.get("choices")
    if choices is not None and value is not None and value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else ""
        options = ", ".join(map(str, choices))
        raise ConfigError(f"{path} = {_show(value)}: not a choice{hint}; allowed: {options}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        for name, bound in (meta.get("bounds") or {}).items():
            inside = {"ge": value >= bound, "le": value <= bound}
            inside |= {"gt": value > bound, "lt": value < bound}
            if not inside[name]:
                raise ConfigError(
                    f"{path} = {_show(value)}: out of range; allowed: {allowed(type(value), meta)}"
                )
    return value


def _show(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def config_hash(config: Any, exclude: tuple[str, ...] = ("out", "name")) -> str:
    """Returns 12 hex digits of the sha256 of the canonical JSON.

    Args:
      config: a config, or its plain data.
      exclude: dotted paths that do not change what is computed.
    """
    tree = to_dict(config)
    for path in exclude:
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
