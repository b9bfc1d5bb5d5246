"""Hugging Face directories (``config.json``, safetensors, ``tokenizer.json``), read and written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from latent_jax.backbones.config import DecoderConfig, RopeScaling
from latent_jax.backbones.readers import table
from latent_jax.backbones.readers.digest import files_sha256
from latent_jax.backbones.readers.table import Rule
from latent_jax.backbones.tokenizer import Tokenizer
from latent_jax.core.errors import BackboneError
from latent_jax.core.files import parse_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_FAMILY = {"gemma3_text": "gemma3"}  # where it is not the model_type


def rules(tied: bool, embed_scale: float = 1.0, gemma: bool = False) -> list[Rule]:
    """Load table: Hugging Face tensor name → parameter path."""
    one = 1.0 if gemma else 0.0  # Gemma stores its norms' scales less 1
    norms = {"input_layernorm": "attn", "post_attention_layernorm": "mlp"}
    if gemma:
        norms = {
            "input_layernorm": "attn", "post_attention_layernorm": "attn_post",
            "pre_feedforward_layernorm": "mlp", "post_feedforward_layernorm": "mlp_post",
        }  # fmt: skip
    layer = r"model\.layers\.(?P<layer>\d+)\."
    attention, mlp = layer + r"self_attn\.", layer + r"mlp\."
    return [
        Rule(r"model\.embed_tokens\.weight", "embed", scale=embed_scale),
        Rule(r"model\.norm\.weight", "final_norm/scale", offset=one),
        # Some tied checkpoints store the table a second time.
        Rule(r"lm_head\.weight", "" if tied else "head", transpose=True),
        Rule(r".*rotary_emb\.inv_freq", ""),
        *(
            Rule(layer + rf"{name}\.weight", f"layers/{ours}_norm/scale", offset=one)
            for name, ours in norms.items()
        ),
        *(Rule(attention + rf"{p}_proj\.weight", f"layers/{p}/kernel", True) for p in "qkvo"),
        *(Rule(attention + rf"{p}_proj\.bias", f"layers/{p}/bias") for p in "qkv"),
        *(
            Rule(attention + rf"{p}_norm\.weight", f"layers/{p}_norm/scale", offset=one)
            for p in "qk"
        ),
        *(
            Rule(mlp + rf"{p}_proj\.weight", f"layers/{p}/kernel", True)
            for p in ("gate", "up", "down")
        ),
    ]


class SafetensorsFiles:
    """The tensors of a directory's safetensors files, read lazily, whole or in slices.

    Raises:
      BackboneError: no such files, one is missing or truncated, or a tensor is stored twice.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        self.files = self._list_files()
        self._open: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = safetensors.safe_open(file, framework="numpy")
            except Exception as error:  # OSError, SafetensorError
                raise BackboneError(
                    f"{file}: cannot read it as safetensors ({error}); fetch or copy it again."
                ) from error
            for name in handle.keys():
                if name in self._open:
                    raise BackboneError(f"{self.path}: tensor '{name}' is stored twice.")
                self._open[name] = handle

    def _list_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise BackboneError(f"{index}: damaged index ({error}).") from error
            files = [self.path / name for name in sorted(names)]
        elif (self.path / "model.safetensors").is_file():
            files = [self.path / "model.safetensors"]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise BackboneError(f"{self.path}: no safetensors files (other formats are not read).")
        for file in files:
            if not file.is_file():
                raise BackboneError(f"{file}: missing, though the index lists it.")
        return files

    def names(self) -> list[str]:
        """Tensor names."""
        return list(self._open)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._open[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._open[name].get_tensor(name)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of one tensor; only that part is read."""
        shape = self.shape(name)
        full = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        return self._open[name].get_slice(name)[full]


def read(
    directory: str | Path, dtype: Any = np.float32, shardings: Any = None
) -> tuple[DecoderConfig, dict[str, Any], Tokenizer, str]:
    """Reads a Hugging Face model directory; see `gguf.read` for arguments and result.

    With `shardings`, each process reads only the slices that its devices hold.
    """
    directory = Path(directory)
    config = config_from(directory)
    source = SafetensorsFiles(directory)
    slots = table.plan(source, _rules(config), config)
    params = table.assemble(source, slots, config, dtype, shardings)
    return config, params, Tokenizer.from_directory(directory), _digest(source)


def _rules(config: DecoderConfig) -> list[Rule]:
    return rules(config.tie_embeddings, config.embed_scale, config.family == "gemma3")


def outline(directory: str | Path) -> tuple[DecoderConfig, Tokenizer, str]:
    """`read` without the parameters."""
    source = SafetensorsFiles(directory)
    return config_from(directory), Tokenizer.from_directory(directory), _digest(source)


def _digest(source: SafetensorsFiles) -> str:
    return files_sha256([source.path / "config.json", *source.files])


def config_from(directory: str | Path) -> DecoderConfig:
    """Architecture from ``config.json``.

    Raises:
      BackboneError: no or damaged file, another architecture, an option this decoder does not have.
    """
    path = Path(directory) / "config.json"
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BackboneError(
            f"{path.parent}: no readable config.json ({error.strerror})."
        ) from error
    except ValueError as error:
        raise BackboneError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise BackboneError(f"{path}: a JSON object is needed, found {type(raw).__name__}.")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BackboneError(f"{path}: model_type '{family}' is not supported; supported: {known}.")
    try:
        return _config(raw, family, path)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackboneError(f"{path}: missing or wrong field ({error!r}).") from error


def _config(raw: Mapping[str, Any], family: str, path: Path) -> DecoderConfig:
    heads = int(raw["num_attention_heads"])
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    gemma = family == "gemma3_text"
    wanted = "gelu_pytorch_tanh" if gemma else "silu"
    activation = raw.get("hidden_activation" if gemma else "hidden_act", wanted)
    if activation != wanted:
        raise BackboneError(f"{path}: activation '{activation}' is not supported ({wanted} is).")
    if raw.get("mlp_bias"):
        raise BackboneError(f"{path}: biases in the MLP are not supported.")
    if raw.get("attention_bias"):
        # These families put a bias on the output projection as well.
        raise BackboneError(f"{path}: attention_bias is not supported for {family}.")
    theta, scaling = _rope(_global_rope(raw) if gemma else raw, path)
    limit = int(raw.get("max_position_embeddings", 2048))
    window = raw.get("sliding_window")
    if window and raw.get("use_sliding_window", family == "mistral" or gemma):
        # Within the window, sliding attention is full attention.
        limit = min(limit, int(window))
    return DecoderConfig(
        family=_FAMILY.get(family, family),
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        intermediate_size=int(raw["intermediate_size"]),
        max_position=limit,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3" or gemma,
        **(_gemma3(raw, int(head_dim), path) if gemma else {}),
    )


def _global_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's rotary parameters of the global layers, where others have theirs."""
    rope = raw.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 1e6
    return {"rope_parameters": {**(rope or raw.get("rope_scaling") or {}), "rope_theta": theta}}


def _gemma3(raw: Mapping[str, Any], head_dim: int, path: Path) -> dict[str, Any]:
    """What only Gemma 3 has."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if raw.get(name):
            raise BackboneError(f"{path}: {name} is not supported.")
    layers, every = int(raw["num_hidden_layers"]), int(raw.get("sliding_window_pattern") or 6)
    kinds = raw.get("layer_types")
    if kinds is not None:
        found = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
        every = found[0] if found else layers + 1
        if found != list(range(every, layers + 1, every)):
            raise BackboneError(f"{path}: layer_types without a period are not supported.")
    rope = raw.get("rope_parameters") or {}
    local = rope.get("sliding_attention", {}).get("rope_theta") or raw.get("rope_local_base_freq")
    scalar = float(raw.get("query_pre_attn_scalar", head_dim))
    return {
        "post_norms": True, "activation": "gelu_tanh", "global_every": every,
        "embed_scale": float(raw["hidden_size"]) ** 0.5, "local_theta": float(local or 10_000.0),
        "query_scale": None if scalar == head_dim else scalar**-0.5,
    }  # fmt: skip


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes both into `rope_parameters`, earlier ones keep them apart.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise BackboneError(
            f"{path}: rope scaling '{kind}' is not supported (default and llama3 are)."
        )
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )


def to_hf_config(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """``config.json`` of a decoder, as transformers 5 reads it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position,
        }
    types = {family: kind for kind, family in _FAMILY.items()}
    kind = types.get(config.family, config.family)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "rope_parameters": rope,
        # Readers older than transformers 5 look here.
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "dtype": dtype,
        **(_to_gemma3(config) if config.family == "gemma3" else {}),
    }


def _to_gemma3(config: DecoderConfig) -> dict[str, Any]:
    """What only Gemma 3 has, and its own names of what all have."""
    scalar = config.head_dim if config.query_scale is None else config.query_scale**-2
    default = {"rope_type": "default"}
    layers = range(1, config.num_layers + 1)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": config.max_position,
        "sliding_window_pattern": config.global_every,
        "layer_types": [
            "sliding_attention" if i % config.global_every else "full_attention" for i in layers
        ],
        "rope_local_base_freq": config.local_theta,
        "rope_parameters": {
            "full_attention": {**default, "rope_theta": config.rope_theta},
            "sliding_attention": {**default, "rope_theta": config.local_theta},
        },
    }


def save_hf(
    directory: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    dtype: Any = None,
) -> Path:
    """Writes a model as a Hugging Face directory that `read` and transformers both load.

    The files are written aside and moved into place, ``config.json`` last.

    Args:
      directory: created if needed; files of these names in it are replaced.
      config: the architecture.
      params: the decoder's parameter tree.
      tokenizer: saved beside it.
      dtype: of the stored weights; the parameters' own by default.

    Returns:
      The directory.
    """
    directory = Path(directory)
    flat = {path: np.asarray(leaf) for path, leaf in table.flatten(params).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, rule, layer in _tensor_names(config):
        array = flat[rule.path] if layer is None else flat[rule.path][layer]
        array = rule.undo(array.T if rule.transpose else array)
        tensors[name] = np.ascontiguousarray(array if dtype is None else array.astype(dtype))
    directory.mkdir(parents=True, exist_ok=True)
    stored = str(tensors["model.embed_tokens.weight"].dtype)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as aside:
        safetensors.numpy.save_file(tensors, Path(aside) / "model.safetensors", {"format": "pt"})
        tokenizer.save(aside)
        text = json.dumps(to_hf_config(config, stored) | _special_ids(tokenizer), indent=1) + "\n"
        (Path(aside) / "config.json").write_text(text, encoding="utf-8")
        last = ("config.json",)
        names = sorted(os.listdir(aside), key=lambda n: (n in last, n))
        for name in names:
            shutil.move(Path(aside) / name, directory / name)
    return directory


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _tensor_names(config: DecoderConfig):
    """(name, rule, layer or None) of every tensor of an exported model."""
    for rule in _rules(config):
        if not rule.path or rule.path not in table.expected_shapes(config):
            continue
        stacked = rule.path.startswith("layers/")
        for layer in range(config.num_layers) if stacked else (None,):
            name = rule.pattern.replace(r"(?P<layer>\d+)", str(layer)).replace("\\", "")
            yield name, rule, layer
