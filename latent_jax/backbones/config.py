"""Architecture of a frozen decoder, independent of where its weights come from, and which one a
run reads with.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from latent_jax.core.config import field

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3 frequency scaling (``rope_type: llama3`` in Hugging Face configs)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a pre-norm decoder with rotary positions and a gated MLP.

    One spec covers Llama, Mistral, Qwen2 (``qkv_bias``), Qwen3 (``qk_norm``) and Gemma 3, whose
    attention and MLP also norm what they add (``post_norms``), whose embeddings are multiplied by
    ``embed_scale`` (the parameter ``embed`` is, and tied logits are divided by it again), and of
    whose layers only every ``global_every``-th turns by ``rope_theta``, the others by
    ``local_theta``. Its local layers see a window; contexts are held within it, where that is the
    same as full attention.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float | None = None
    local_theta: float | None = None
    global_every: int = 1

    @property
    def kv_floats_per_token(self) -> int:
        """Numbers that one token's keys and values take over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """``{projection: (in, out)}`` of one layer's matrices."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
        return dict(zip(PROJECTIONS, shapes, strict=True))

    def num_params(self, embedding: bool = True) -> int:
        """Parameter count from the shapes; ``embedding=False`` leaves out the token tables."""
        d = self.hidden_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = sum(a * b for a, b in self.projection_shapes.values()) + 2 * d
        layer += (q + 2 * kv) if self.qkv_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        layer += 2 * d if self.post_norms else 0
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2) if embedding else 0
        return self.num_layers * layer + d + tables


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The frozen LLM of a run: it reads, and its own layers encode."""

    name: str = field(
        default="smollm2",
        help="smollm2, gemma3, tiny, tiny_qwen3, a directory, a .gguf or .bin file, or a hub id",
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", help="dtype of the frozen weights and of the computation"
    )
