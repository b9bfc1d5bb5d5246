"""Thin Linen modules around `latent_jax.ops`."""
