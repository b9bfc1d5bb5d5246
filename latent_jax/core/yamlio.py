"""YAML in and out: strict, with ``extends`` and dotted overrides, before any type is known.

Differences from plain PyYAML, each of which has cost somebody a run: a repeated key is an error
(PyYAML keeps the last one silently), ``1e-3`` is a number (YAML 1.1 reads a string), and only
``true`` and ``false`` are booleans (``on``, ``no`` and ``y`` stay words).
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from latent_jax.core.errors import ConfigError

_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key != "<<":
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    dropped = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    return {
        first: [(tag, regex) for tag, regex in rows if tag not in dropped]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML text.

    Raises:
      ConfigError: naming ``where``, the line and the problem.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = error.problem or error.context
        raise ConfigError(f"{where}{at}: not valid YAML: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def dump_yaml(tree: Any) -> str:
    """Writes plain data as block YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a person reads this file: no &id001 anchors


# Text that looks like a number to `parse_yaml` is quoted, like what looks like one to YAML 1.1.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_multi_representer(tuple, lambda d, x: d.represent_list(list(x)))
_Dumper.add_multi_representer(Path, lambda d, x: d.represent_str(str(x)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a config file, resolving ``extends: other.yaml`` (relative to the file, deep-merged).

    ``extends`` takes one path or a list, later ones over earlier ones, the file itself over all.

    Raises:
      ConfigError: missing or unreadable file, bad YAML, a top level that is no mapping, or a circle
        of ``extends``.
    """
    return _read(Path(path), ())


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(str(p.name) for p in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: extends goes in a circle: {circle}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_nearest_file(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file (a config is UTF-8 YAML)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level is {kind(tree)}; a config is a mapping of keys")
    parents = tree.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: extends = {parents!r}: give a path or a list of paths")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = deep_merge(merged, _read(path.parent / parent, (*chain, resolved)))
    return deep_merge(merged, tree)


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder} either)"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    return suggest(path.name, names) or (f"; {folder} has {', '.join(names[:8])}" if names else "")


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merges ``over`` into ``base``: mappings merge key by key, anything else replaces.

    A mapping whose ``kind`` differs from the base's replaces it whole: the other kind's settings
    would not be valid for it.

    Example:
      >>> deep_merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
      {'a': {'b': 1, 'c': 3}}
    """
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other_kind = "kind" in value and "kind" in old and value["kind"] != old["kind"]
            merged[key] = copy.deepcopy(dict(value)) if other_kind else deep_merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_overrides(
    tree: Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any] = ()
) -> dict[str, Any]:
    """Sets dotted paths, later ones over earlier ones; returns a new tree.

    Args:
      tree: nested plain data, as from `read_yaml`.
      overrides: ``["train.steps=200", ...]`` with YAML values, or ``{"train.steps": 200}``. A part
        that is a whole number indexes into a list.

    Raises:
      ConfigError: for an override without ``=`` or with an impossible path.

    Example:
      >>> apply_overrides({"train": {"steps": 1}}, ["train.steps=200", "train.lr=1e-3"])
      {'train': {'steps': 200, 'lr': 0.001}}
    """
    result = copy.deepcopy(dict(tree))
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        pairs = [(str(path), copy.deepcopy(value)) for path, value in overrides.items()]
    else:
        pairs = [_split_override(item) for item in overrides]
    for path, value in pairs:
        _set(result, path, value)
    return result


def _split_override(item: str) -> tuple[str, Any]:
    path, equals, text = item.partition("=")
    path = path.strip()
    if not equals:
        raise ConfigError(f"override {item!r}: write it as path=value, e.g. train.steps=200")
    if not path or any(not part.strip() for part in path.split(".")):
        raise ConfigError(f"override {item!r}: {path!r} is not a dotted path such as train.steps")
    return path, parse_yaml(text, f"override {item!r}")


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, path)]
            continue
        child = node.get(part)
        if not isinstance(child, dict | list):
            child = node[part] = {}  # a scalar on the way, e.g. a schedule given as a number
        if isinstance(child, list):
            _index(child, [*parents, last][depth + 1], path)
        node = child
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        allowed = f"0 to {len(items) - 1}" if items else "nothing, it is empty"
        raise ConfigError(f"override {path}: {part!r} does not index that list; allowed: {allowed}")
    return int(part)


def kind(value: Any) -> str:
    """Names a value's YAML kind for a message."""
    if value is None:
        return "empty"
    for types, name in (
        (bool, "true/false"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "text"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
    ):
        if isinstance(value, types):
            return name
    return type(value).__name__


def suggest(name: Any, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
