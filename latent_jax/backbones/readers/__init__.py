"""Readers: (config, parameter tree, tokenizer, sha256) from the formats that models come in."""

from latent_jax.backbones.readers.hf import save_hf

__all__ = ["save_hf"]
