"""Where the parameters of a compressor begin: drawn, taken over, measured or fitted to texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from latent_jax.systems.latentwire import asking, bottleneck, heads, onto_soft, reader_start
from latent_jax.systems.latentwire.adapters import fit_colour
from latent_jax.systems.latentwire.assets import load_compressor
from latent_jax.systems.latentwire.codes import as_params, as_variables
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.separate_encoder import check_weights
from latent_jax.systems.latentwire.tuned import init_prompt
from latent_jax.systems.latentwire.vectors import spelling


def fresh(
    system: Any, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]
) -> dict[str, Any]:
    """Variables of a `LatentWireSystem` at step 0.

    Args:
      system: with its data, from which is fitted what needs any.
      rngs: with ``params``.
      batch: for shapes.
    """
    reader = system.frozen["reader"]
    make = jax.jit(lambda r, i, m: as_params(system.model.init(rngs["params"], r, i, m)))
    ids = jnp.zeros(batch["context"].shape, jnp.int32)
    params = make(reader, ids, jnp.ones(ids.shape, bool))
    model = system.config.model
    if model.prompt_tokens:
        tokenizer = system.backbone.tokenizer
        params |= init_prompt(reader["embed"], tokenizer, model.prompt_tokens)
    start, theirs = {}, {}
    if model.start is not None:
        stored = load_compressor(model.start, system.backbone)
        if system.separate is not None:
            check_weights(model.encoder.backbone, system.separate.backbone.sha256, stored.encoder)
        reader_start.check_layout(model.start, stored.config, model)
        start = dict(stored.params)
        theirs = start.pop("readers", {})
        params = bottleneck.adopt(params, start, model.start)
    if "profile" in params and "profile" not in start:
        params |= heads.calibrate(
            system.body, reader, system.train_data("main", None), system.sink,
            system.config.data.calibration,
        )._asdict()  # fmt: skip
    if "spelling" in params and "spelling" not in start:
        spelt = spelling(system.backbone.tokenizer, system.backbone.config.vocab_size)
        params["spelling"] = jnp.asarray(spelt, jnp.float32)
    if model.rebuild_entries and "asking" not in start:
        texts = next(system.train_data("main", None))
        params |= asking.start(system.model, params, reader, system.backbone.tokenizer, texts)
    if model.wire.d_z is not None and "down" not in start:
        params = bottleneck.fit(system.model, params, reader, system.train_data("main", None))
    if model.adapter.onto_soft and "soft" not in start:
        params = onto_soft.fit(system.model, params, reader, system.train_data("main", None))
    if model.adapter.calibration == "colour" and "adapter" not in start:
        params = fit_colour(system.model, params, reader, system.train_data("main", None))
    if system.readers:
        encoder = Latents(system.model, params, reader)
        adapters = reader_start.fresh(system.readers, rngs["params"])
        params["readers"] = reader_start.start(
            system.readers, encoder, system.backbone.tokenizer, adapters, theirs,
            lambda: system.train_data("main", None),
        )  # fmt: skip
    return as_variables(params)
