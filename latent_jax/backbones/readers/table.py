"""From a file's tensor names to the decoder's parameter tree.

A reader gives a list of `Rule`s (regex on the tensor's name → path in the tree) and a source of
tensors. `plan` matches every name once and checks the result against the decoder's own shapes:
unknown, duplicate, missing and mis-shaped tensors all raise, naming them. `assemble` then fills the
stacked arrays, whole or only the shards that this process holds.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder
from latent_jax.core.errors import BackboneError

TreePath = tuple[str, ...]

_LARGEST = 1 << 24  # of any size: far above every model's


class TensorSource(Protocol):
    """A container of named tensors that can be read one at a time."""

    path: Path

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a load table.

    Attributes:
      pattern: full-match regex; a group named ``layer`` makes the parameter stacked over layers.
      path: place in the tree, e.g. ``'layers/q/kernel'``; empty: the tensor is known and not
        needed.
      transpose: stored as [out, in], kept as [in, out].
      interleaved: rows are stored in the interleaved rotary order of GGUF's llama family and of
        llama2.c; names the config field with the number of heads.
      scale: the parameter is the stored tensor times this, plus
      offset: this.
    """

    pattern: str
    path: str
    transpose: bool = False
    interleaved: str = ""
    scale: float = 1.0
    offset: float = 0.0

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """The parameter's values."""
        if self.scale == 1 and self.offset == 0:
            return stored
        return stored.astype(np.float32) * np.float32(self.scale) + np.float32(self.offset)

    def undo(self, values: np.ndarray) -> np.ndarray:
        """Inverse of `apply`."""
        if self.scale == 1 and self.offset == 0:
            return values
        changed = (values.astype(np.float32) - np.float32(self.offset)) / np.float32(self.scale)
        return changed.astype(values.dtype)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one parameter comes from: a tensor per layer, or a single one."""

    names: tuple[str, ...]
    rule: Rule
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.rule.path.startswith("layers/")


@functools.lru_cache(maxsize=32)
def expected_shapes(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """Path → shape of every parameter that a decoder of this config has."""
    token = jax.ShapeDtypeStruct((1, 1), np.int32)
    decoder = Decoder(config)
    abstract = jax.eval_shape(
        lambda key, ids: decoder.init(key, ids, method=_touch_all), jax.random.key(0), token
    )
    return types.MappingProxyType(
        {path: tuple(leaf.shape) for path, leaf in flatten(abstract["params"]).items()}
    )


def _touch_all(decoder: Decoder, ids: jax.Array) -> jax.Array:
    return decoder.unembed(decoder(decoder.embed(ids)).hidden)


def _listed(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{n}'" for n in names[:limit]) + more


def plan(source: TensorSource, rules: Iterable[Rule], config: DecoderConfig) -> dict[str, Slot]:
    """Matches every tensor of `source` to a parameter of a decoder with this config.

    Returns:
      path → `Slot`, for exactly the paths of `expected_shapes(config)`.

    Raises:
      BackboneError: unknown, duplicate, missing or mis-shaped tensors, each named.
    """
    _check_sizes(config, source.path)
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    shapes = expected_shapes(config)
    found: dict[str, dict[int, str]] = {path: {} for path in shapes}
    by_path: dict[str, Rule] = {}
    unknown = []
    for name in source.names():
        for regex, candidate in compiled:
            if match := regex.fullmatch(name):
                rule = candidate
                break
        else:
            unknown.append(name)
            continue
        if not rule.path:
            continue
        layer = int(match.groupdict().get("layer") or 0)
        if rule.path not in shapes or layer >= _depth(rule.path, shapes):
            unknown.append(name)
            continue
        if layer in found[rule.path]:
            of_layer = f" of layer {layer}" if rule.path.startswith("layers/") else ""
            raise BackboneError(
                f"{source.path}: tensors '{found[rule.path][layer]}' and '{name}' are duplicates: "
                f"both are '{rule.path}'{of_layer}."
            )
        found[rule.path][layer] = name
        by_path[rule.path] = rule
    if unknown:
        raise BackboneError(
            f"{source.path}: unknown tensors for a {config.num_layers}-layer {config.family} "
            f"decoder: "
            f"{_listed(unknown)}."
        )
    # Every layer has tensors of its own: millions of missing ones are told before they are listed.
    if config.num_layers > (held := len(list(source.names()))):
        raise BackboneError(
            f"{source.path}: missing tensors: num_layers is {config.num_layers}, the file holds "
            f"{held} tensors."
        )
    missing = [
        path + (f" (layer {layer})" if path.startswith("layers/") else "")
        for path in shapes
        for layer in range(_depth(path, shapes))
        if layer not in found[path]
    ]
    if missing:
        raise BackboneError(
            f"{source.path}: missing tensors for a {config.num_layers}-layer {config.family} "
            f"decoder: "
            f"{_listed(missing)}."
        )
    slots = {}
    for path, shape in shapes.items():
        rule = by_path[path]
        names = tuple(found[path][layer] for layer in range(len(found[path])))
        one = shape[1:] if path.startswith("layers/") else shape
        want = one[::-1] if rule.transpose else one
        for name in names:
            if tuple(source.shape(name)) != want:
                raise BackboneError(
                    f"{source.path}: tensor '{name}' has shape {tuple(source.shape(name))}, "
                    f"the config implies {want}."
                )
        slots[path] = Slot(names, rule, shape)
    return slots


def _check_sizes(config: DecoderConfig, where: Path) -> None:
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "intermediate_size", "max_position"):
        if not 0 < (value := getattr(config, name)) <= _LARGEST:
            raise BackboneError(
                f"{where}: {name} is {value}; it must be positive, and at most {_LARGEST}."
            )
    for name in ("rope_theta", "norm_eps"):
        if not 0 < (value := getattr(config, name)) < math.inf:
            raise BackboneError(f"{where}: {name} is {value}; it must be positive and finite.")
    if config.num_heads % config.num_kv_heads:
        raise BackboneError(
            f"{where}: {config.num_heads} query heads do not divide over "
            f"{config.num_kv_heads} key-value heads."
        )
    if config.head_dim % 2:
        raise BackboneError(f"{where}: head_dim is {config.head_dim}; rotary needs an even one.")


def _depth(path: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return shapes[path][0] if path.startswith("layers/") else 1


def to_half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a Q or K matrix (or bias) from interleaved to half-split rotary pairs.

    Interleaved storage pairs rows (2i, 2i+1) of a head, half-split pairs (i, i + head_dim/2).
    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.swapaxes(split, 1, 2).reshape(rows.shape)


def _read_one(source: TensorSource, slot: Slot, layer: int, config: DecoderConfig) -> np.ndarray:
    array = slot.rule.apply(source.read(slot.names[layer]))
    if slot.rule.interleaved:
        array = to_half_split(array, getattr(config, slot.rule.interleaved))
    return array.T if slot.rule.transpose else array


def _read_block(
    source: TensorSource,
    slot: Slot,
    index: tuple[slice, ...],
    config: DecoderConfig,
    dtype: np.dtype,
) -> np.ndarray:
    """The part of one parameter that `index` selects, reading no more of the file than it must."""
    full = [range(*s.indices(n)) for s, n in zip(index, slot.shape, strict=True)]
    out = np.empty([len(r) for r in full], dtype)
    layers = full[0] if slot.stacked else [0]
    inner = index[1:] if slot.stacked else index
    read_slice = getattr(source, "read_slice", None)
    for at, layer in enumerate(layers):
        if read_slice is not None and not slot.rule.interleaved:
            stored = inner[::-1] if slot.rule.transpose else inner
            part = slot.rule.apply(read_slice(slot.names[layer], stored))
            part = part.T if slot.rule.transpose else part
        else:
            part = _read_one(source, slot, layer, config)[inner]
        out[at if slot.stacked else ...] = part
    return out


def assemble(
    source: TensorSource,
    slots: Mapping[str, Slot],
    config: DecoderConfig,
    dtype: Any = np.float32,
    shardings: Any = None,
) -> dict[str, Any]:
    """Builds the parameter tree.

    Args:
      source: where tensors are read from.
      slots: result of `plan`.
      config: the decoder's config.
      dtype: of the result.
      shardings: optional tree of `jax.sharding.Sharding`, like the parameter tree (or one for all,
        or a function from path and shape to one). With it, only the blocks of this process's
        devices are read.

    Returns:
      Nested dict of numpy arrays, or of sharded `jax.Array`s when `shardings` is given.
    """
    dtype = np.dtype(dtype)
    flat: dict[str, Any] = {}
    if shardings is None:
        flat = {path: _empty(slot.shape, dtype) for path, slot in slots.items()}
        jobs = [(path, layer) for path, slot in slots.items() for layer in range(len(slot.names))]

        def fill(job: tuple[str, int]) -> None:
            path, layer = job
            out = flat[path][layer] if slots[path].stacked else flat[path]
            array = _read_one(source, slots[path], layer, config)
            # A transposed copy in strips of rows keeps to the cache: half the time.
            width = array.shape[-1] if array.flags.c_contiguous else 64
            for at in range(0, array.shape[-1], width):
                out[..., at : at + width] = array[..., at : at + width]

        # numpy's dequantisation and casts release the interpreter lock.
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(fill, jobs))
    else:
        pick = _sharding_lookup(shardings)
        for path, slot in slots.items():
            flat[path] = jax.make_array_from_callback(
                slot.shape,
                pick(path, slot.shape),
                lambda index, slot=slot: _read_block(source, slot, index, config, dtype),
            )
    return nest(flat)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that `jax.device_put` takes over without a copy on CPU: 64-byte aligned."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _sharding_lookup(shardings: Any) -> Callable[[str, tuple[int, ...]], jax.sharding.Sharding]:
    if isinstance(shardings, jax.sharding.Sharding):
        return lambda path, shape: shardings
    if callable(shardings):
        return shardings
    flat = flatten(shardings)
    return lambda path, shape: flat[path]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{'a/b': x}`` → ``{'a': {'b': x}}``."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{'a': {'b': x}}`` → ``{'a/b': x}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat
