"""From the wire to cross-attention blocks in front of chosen layers of the frozen reader."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.cross_blocks import CrossBlocks
from latent_jax.backbones.decoder import KV, inverse_frequencies
from latent_jax.core.errors import ConfigError
from latent_jax.ops import rope
from latent_jax.systems.latentwire.adapter_config import AdapterConfig
from latent_jax.systems.latentwire.latents import Wire


class CrossAdapter(nn.Module):
    """Blocks that read latents as they are; nothing of them is in the reader's cache.

    Attributes:
      config: with ``depths``, ``gate`` and the width of the blocks' MLP.
      reader: architecture of the LLM; blocks have as many heads as it has key/value heads.
    """

    config: AdapterConfig
    reader: DecoderConfig

    @nn.compact
    def __call__(self, wire: Wire, dtype=jnp.float32) -> KV:
        """A prefix without entries, with the blocks.

        Raises:
          ConfigError: a depth that the reader does not have.
        """
        c, r = self.config, self.reader
        if max(c.depths) >= r.num_layers:
            raise ConfigError(
                f"adapter.depths={list(c.depths)}: the reader has layers 0 to {r.num_layers - 1}"
            )
        n, size, d = len(c.depths), r.num_kv_heads * r.head_dim, r.hidden_size
        fan_in = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        ones, start = nn.initializers.ones, nn.initializers.constant(c.gate)

        def made(name: str, init, *shape: int) -> Array:
            return self.param(name, init, (n, *shape))

        weights = {
            "norm": made("norm", ones, d), "q": made("q", fan_in, d, size),
            "out": made("out", fan_in, size, d), "gate": made("gate", start),
            "mlp_norm": made("mlp_norm", ones, d), "up": made("up", fan_in, d, c.hidden),
            "down": made("down", fan_in, c.hidden, d), "mlp_gate": made("mlp_gate", start),
        }  # fmt: skip
        memory = nn.LayerNorm(name="memory_norm")(wire.z.astype(jnp.float32))
        b, m, width = memory.shape

        def entries(name: str) -> Array:
            flat = jnp.einsum("bmz,nze->nbme", memory, made(name, fan_in, width, size))
            return flat.reshape(n, b, m, r.num_kv_heads, r.head_dim)

        waves = jnp.asarray(inverse_frequencies(r))
        waves = waves if waves.ndim == 1 else waves[jnp.array(c.depths)]
        k = rope.rotate_layers(entries("k"), wire.positions, waves)
        at = jnp.array(c.depths)

        def of_all(x: Array) -> Array:
            return jnp.zeros((r.num_layers, *x.shape[1:]), x.dtype).at[at].set(x)

        on = jnp.zeros(r.num_layers, bool).at[at].set(True)
        k, v = (of_all(x.astype(dtype)) for x in (k, entries("v")))
        blocks = CrossBlocks(on, jax.tree.map(of_all, weights), k, v, wire.mask)
        none = jnp.zeros((r.num_layers, b, 0, r.num_kv_heads, r.head_dim), dtype)
        return KV(none, none, jnp.zeros((b, 0), bool), None, blocks)
