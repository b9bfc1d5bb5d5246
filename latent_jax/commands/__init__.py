"""The larger commands of `latent-jax`, one module each; `latent_jax.cli` joins them."""
