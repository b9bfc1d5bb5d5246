"""Finding a language model by name, path or hub id, and loading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.readers import gguf, hf, llama2c
from latent_jax.backbones.tokenizer import Tokenizer
from latent_jax.core.errors import BackboneError

_ASSETS = Path(__file__).resolve().parent.parent / "assets"

# Models that come with the package.
PACKAGED = {"tiny": _ASSETS / "tiny_reader", "tiny_qwen3": _ASSETS / "tiny_qwen3"}

# Models that `latent-jax fetch` knows.
FETCHED = ("smollm2", "gemma3")


def load(
    name_or_path: str | Path,
    dtype: Any = jnp.float32,
    *,
    shardings: Any = None,
    remat: bool = False,
) -> Backbone:
    """Loads a frozen language model.

    Args:
      name_or_path: ``'smollm2'`` or ``'gemma3'`` (fetched once into the cache), ``'tiny'`` or
        ``'tiny_qwen3'`` (in the package), a Hugging Face directory, a ``.gguf`` file, a llama2.c
        ``.bin``, or a hub id such as ``'Qwen/Qwen2.5-0.5B'``. ``$VARIABLES`` in a path are filled
        in.
      dtype: of the weights and of the computation.
      shardings: where each weight goes: a tree like the parameters, one sharding for all, or a
        function ``(path, shape) -> Sharding``. Each process then reads only what its devices hold.
        The default device holds everything otherwise.
      remat: recompute each layer's activations in the backward pass.

    Returns:
      The model.

    Raises:
      BackboneError: not found, unreadable, or of an unsupported architecture; the message says
        which.
    """
    path = locate(name_or_path)
    config, params, tokenizer, sha256 = _reader(path).read(path, dtype, shardings)
    _check_vocabulary(path, config, tokenizer)
    if shardings is None:
        params = jax.device_put(params)
    return Backbone(
        str(name_or_path), config, params, tokenizer, sha256, Decoder(config, remat=remat)
    )


class Outline(NamedTuple):
    """What a model is, without its weights; `sha256` is that of the loaded `Backbone`."""

    config: DecoderConfig
    tokenizer: Tokenizer
    sha256: str


def outline(name_or_path: str | Path) -> Outline:
    """Reads what `load` reads, except the weights: enough to tokenise for a model.

    Raises:
      BackboneError: as `load`.
    """
    path = locate(name_or_path)
    found = Outline(*_reader(path).outline(path))
    _check_vocabulary(path, found.config, found.tokenizer)
    return found


def _reader(path: Path) -> Any:
    if path.is_dir():
        return hf
    if path.suffix == ".gguf":
        return gguf
    if path.suffix == ".bin":
        return llama2c
    raise BackboneError(
        f"{path}: unknown model format; give a Hugging Face directory, a .gguf or a llama2.c .bin."
    )


def _check_vocabulary(path: Path, config: DecoderConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise BackboneError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
            f"{config.vocab_size} rows; tokenizer and weights do not belong together."
        )


def locate(name_or_path: str | Path) -> Path:
    """File or directory of a model; fetches or downloads it if need be.

    Raises:
      BackboneError: there is no such model.
    """
    name = os.path.expandvars(str(name_or_path))
    if "$" in name:
        raise BackboneError(f"{name_or_path}: {name} is not set; set it, or give the path itself.")
    if name in PACKAGED:
        return PACKAGED[name]
    if name in FETCHED:
        from latent_jax.core import fetch  # only named models need the network code

        found = fetch.cached(name) or fetch.fetch(name)
        if not fetch.accepted(name):
            raise BackboneError(
                f"{name}: comes under use terms that were not accepted here; latent-jax fetch "
                f"{name} shows them and asks"
            )
        return _gguf_in(Path(found))
    path = Path(name).expanduser()
    if path.exists():
        return path
    if is_path(name):
        known = ", ".join([*PACKAGED, *FETCHED])
        raise BackboneError(
            f"{name}: no such model; known names: {known}; otherwise give a directory, a "
            ".gguf, a .bin or a hub id."
        )
    return _download(name)


def is_path(name: str) -> bool:
    """Whether a name is that of a file or directory, and not a hub id (which may have dots)."""
    path = Path(name).expanduser()
    return (
        path.exists()
        or path.suffix in (".gguf", ".bin", ".safetensors", ".json")
        or name.count("/") != 1
        or name.startswith((".", "~", "/", "$"))
    )


def _gguf_in(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.rglob("*.gguf"))
        if len(files) != 1:
            raise BackboneError(f"{path}: expected one .gguf in the cache, found {len(files)}.")
        return files[0]
    return path


def _download(hub_id: str) -> Path:
    import huggingface_hub  # slow to import, and only hub ids need it

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                ignore_patterns=["original/*", "onnx/*"],
            )
        )
    except Exception as error:  # offline, no such id, gated: many classes, the HTTP client's too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"{hub_id}: no such path, and the hub gave no model ({reason}); check the id and "
            "the network, or give a local path."
        ) from error
