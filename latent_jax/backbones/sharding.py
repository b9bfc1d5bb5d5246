"""How a decoder's arrays lie on a mesh; see `latent_jax.sharding.rules` for how a rule is read."""

from __future__ import annotations

DECODER_RULES = (
    (r"embed$", ("vocab", "embed")),
    (r"head$", ("embed", "vocab")),
    (r"layers/(q|k|v)/kernel$", ("layers", "embed", "heads")),
    (r"layers/o/kernel$", ("layers", "heads", "embed")),
    (r"layers/(gate|up)/kernel$", ("layers", "embed", "mlp")),
    (r"layers/down/kernel$", ("layers", "mlp", "embed")),
    (r"layers/(q|k|v)/bias$", ("layers", "heads")),
)
