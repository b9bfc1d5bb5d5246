"""GGUF files: llama-family, Qwen and Gemma 3 language models, dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latent_jax.backbones.config import DecoderConfig, RopeScaling
from latent_jax.backbones.readers import table
from latent_jax.backbones.readers.digest import file_sha256
from latent_jax.backbones.readers.gguf_file import GGUFFile
from latent_jax.backbones.readers.table import Rule
from latent_jax.backbones.tokenizer import Tokenizer
from latent_jax.core.errors import BackboneError

FAMILIES = {name: name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3")}

# What Gemma 3's converter leaves out, as llama.cpp has it: every sixth layer is global, the others
# turn by this base.
_GEMMA3_EVERY, _GEMMA3_LOCAL_THETA = 6, 10_000.0

# Families whose converter stores Q and K rows in interleaved rotary order.
_INTERLEAVED = ("llama", "mistral")


def rules(family: str, embed_scale: float = 1.0) -> list[Rule]:
    """Load table: GGUF tensor name → parameter path."""
    layer = r"blk\.(?P<layer>\d+)\."
    q_heads, k_heads = ("num_heads", "num_kv_heads") if family in _INTERLEAVED else ("", "")
    return [
        Rule(r"token_embd\.weight", "embed", scale=embed_scale),
        Rule(r"output_norm\.weight", "final_norm/scale"),
        Rule(r"output\.weight", "head", transpose=True),
        Rule(r"rope_freqs\.weight", ""),
        Rule(layer + r"attn_norm\.weight", "layers/attn_norm/scale"),
        Rule(layer + r"ffn_norm\.weight", "layers/mlp_norm/scale"),
        # Gemma's converter has added the 1 that its norms carry.
        Rule(layer + r"post_attention_norm\.weight", "layers/attn_post_norm/scale"),
        Rule(layer + r"post_ffw_norm\.weight", "layers/mlp_post_norm/scale"),
        Rule(layer + r"attn_q\.weight", "layers/q/kernel", True, q_heads),
        Rule(layer + r"attn_k\.weight", "layers/k/kernel", True, k_heads),
        Rule(layer + r"attn_v\.weight", "layers/v/kernel", True),
        Rule(layer + r"attn_output\.weight", "layers/o/kernel", True),
        Rule(layer + r"attn_q\.bias", "layers/q/bias", False, q_heads),
        Rule(layer + r"attn_k\.bias", "layers/k/bias", False, k_heads),
        Rule(layer + r"attn_v\.bias", "layers/v/bias"),
        Rule(layer + r"attn_q_norm\.weight", "layers/q_norm/scale"),
        Rule(layer + r"attn_k_norm\.weight", "layers/k_norm/scale"),
        Rule(layer + r"ffn_gate\.weight", "layers/gate/kernel", True),
        Rule(layer + r"ffn_up\.weight", "layers/up/kernel", True),
        Rule(layer + r"ffn_down\.weight", "layers/down/kernel", True),
    ]


def read(
    path: str | Path, dtype: Any = np.float32, shardings: Any = None
) -> tuple[DecoderConfig, dict[str, Any], Tokenizer, str]:
    """Reads a GGUF language model.

    Args:
      path: the ``.gguf`` file.
      dtype: of the parameters.
      shardings: see `table.assemble`.

    Returns:
      (config, parameter tree, tokenizer, sha256 of the file).

    Raises:
      BackboneError: unreadable or truncated file, unsupported architecture, wrong tensors.
    """
    file = GGUFFile(path)
    config, tokenizer, sha256 = _outline(file)
    slots = table.plan(file, rules(config.family, config.embed_scale), config)
    params = table.assemble(file, slots, config, dtype, shardings)
    return config, params, tokenizer, sha256


def outline(path: str | Path) -> tuple[DecoderConfig, Tokenizer, str]:
    """`read` without the parameters."""
    return _outline(GGUFFile(path))


def _outline(file: GGUFFile) -> tuple[DecoderConfig, Tokenizer, str]:
    path = file.path
    try:
        config = config_from(file)
        tokenizer = Tokenizer.from_gguf(file.metadata, str(path))
    except BackboneError:
        raise
    except Exception as error:  # fields of any type; `tokenizers` raises bare Exception
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise BackboneError(f"{path}: a field of the GGUF header is wrong ({reason}).") from error
    return config, tokenizer, file_sha256(path)


def config_from(file: GGUFFile) -> DecoderConfig:
    """Architecture from the metadata and the tensors' presence."""
    meta = file.metadata
    arch = meta.get("general.architecture", "(none)")
    if not isinstance(arch, str) or arch not in FAMILIES:
        raise BackboneError(
            f"{file.path}: architecture '{arch}' is not supported in GGUF; supported: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    prefix = arch + "."

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(prefix + key, default)
        if value is None:
            raise BackboneError(f"{file.path}: GGUF field '{prefix}{key}' is missing.")
        return value

    if int(get("expert_count", 0)):
        raise BackboneError(f"{file.path}: mixture-of-experts models are not supported.")
    if meta.get(prefix + "rope.scaling.type", "none") not in ("none", ""):
        raise BackboneError(
            f"{file.path}: rope scaling '{meta[prefix + 'rope.scaling.type']}' is not supported."
        )
    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", hidden // heads))
    if int(get("rope.dimension_count", head_dim)) != head_dim:
        raise BackboneError(f"{file.path}: partial rotary embeddings are not supported.")
    if "token_embd.weight" not in file.tensors:
        raise BackboneError(f"{file.path}: missing tensor 'token_embd.weight'.")
    theta = float(get("rope.freq_base", 10_000.0))
    limit, gemma = int(get("context_length", 2048)), {}
    if arch == "gemma3":
        # Within the window of the local layers, local attention is full attention.
        limit = min(limit, int(get("attention.sliding_window")))
        gemma = {
            "post_norms": True, "activation": "gelu_tanh", "embed_scale": hidden**0.5,
            "local_theta": _GEMMA3_LOCAL_THETA, "global_every": _GEMMA3_EVERY,
        }  # fmt: skip
        if int(get("block_count")) == 62:  # 27B alone scales queries by hidden / heads
            gemma["query_scale"] = (hidden / heads) ** -0.5
    return DecoderConfig(
        family=FAMILIES[arch],
        vocab_size=file.shape("token_embd.weight")[0],
        hidden_size=hidden,
        num_layers=int(get("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate_size=int(get("feed_forward_length")),
        max_position=limit,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, head_dim),
        norm_eps=float(get("attention.layer_norm_rms_epsilon", 1e-5)),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        **gemma,
    )


def _rope_scaling(file: GGUFFile, head_dim: int) -> RopeScaling | None:
    """Llama 3 scaling, which GGUF keeps only as one divisor per rotary plane.

    The released models all use the same band (1, 4, 8192), so that the factor alone is free; the
    divisors that follow from it are compared with the stored ones.
    """
    if "rope_freqs.weight" not in file.tensors:
        return None
    stored = file.read("rope_freqs.weight").astype(np.float64)
    factor = float(stored.max())
    if np.allclose(stored, 1.0):
        return None
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    arch = file.metadata["general.architecture"]
    theta = float(file.metadata.get(f"{arch}.rope.freq_base", 10_000.0))
    turns = 8192 * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    blend = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    if stored.shape != blend.shape or not np.allclose(
        stored, 1 / (blend + (1 - blend) / factor), rtol=1e-3
    ):
        raise BackboneError(
            f"{file.path}: 'rope_freqs.weight' is not Llama 3 scaling; load the Hugging Face "
            f"directory instead."
        )
    return scaling
