"""An encoder of the LLM's first layers: what it needs of them, and where its way back starts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.first_layers import first_config, first_params
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import bottleneck, cost
from latent_jax.systems.latentwire.config import ModelConfig
from latent_jax.systems.latentwire.model import Compressor

READER = byte_reader(3)
SOFT = {"segment": 8, "adapter": {"kind": "soft"}}
MEMORY = {"output": "hidden", "lora_rank": 2, "view": "text"}


def opened(encoder, **changes):
    shape = parse(ModelConfig, {"segment": 8, "encoder": encoder, **changes})
    model = Compressor(shape, READER.config, sink=1)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(3, 200, (16, 8)), jnp.int32)
    mask = jnp.arange(8) < jnp.where(jnp.arange(16) % 4 == 3, 5, 8)[:, None]
    params = jax.jit(model.init)(jax.random.key(1), READER.params, ids, mask)["params"]
    return model, params, ids, mask


def latents(model, params, frozen, ids, mask):
    return model.apply({"params": params}, frozen, ids, mask, method="compress").z


def test_all_layers_are_the_first_of_all():
    model, params, *texts = opened({**MEMORY, "layers": 3}, adapter={"kind": "soft"})
    whole = Compressor(
        dataclasses.replace(
            model.config, encoder=dataclasses.replace(model.config.encoder, layers=0)
        ),
        READER.config, sink=1,
    )  # fmt: skip
    np.testing.assert_array_equal(
        latents(model, params, READER.params, *texts),
        latents(whole, params, READER.params, *texts),
    )


@pytest.mark.parametrize("slots", ["memory", "states"])
def test_no_later_layer_is_looked_at(slots):
    encoder = {"slots": slots, **MEMORY, "layers": 2}
    model, params, *texts = opened(encoder, adapter={"kind": "soft"})

    def size(frozen):
        return jnp.square(latents(model, params, frozen, *texts)).sum()

    grads = jax.grad(size)(READER.params)["layers"]
    moved = [float(max(jnp.abs(g[i]).max() for g in jax.tree.leaves(grads))) for i in range(3)]
    if slots == "memory":  # the text itself is run without a gradient
        assert moved[1] > 0
    assert moved[2] == 0
    if "lora" in params:
        assert {x.shape[0] for x in jax.tree.leaves(params["lora"])} == {2}


def test_the_way_back_starts_at_what_all_layers_have():
    encoder = {"slots": "pooled", "layers": 2}
    model, params, *texts = opened(encoder, wire={"d_z": 60}, ratio=1)
    batch = dict(zip(("context", "context_mask"), texts, strict=True))
    fitted = bottleneck.fit(model, params, READER.params, [batch])
    whole = np.asarray(bottleneck._of_spans(model, READER.params, *texts))
    real = np.asarray(texts[1])
    spread = whole[real].std(0)

    def unexplained(params):
        z = latents(model, params, READER.params, *texts)
        shown = z @ params["up"] * params["out_scale"] + params["out_mean"]
        error = ((np.asarray(shown) - whole) / spread)[real]
        return np.square(error).mean(0).reshape(3, -1).mean(1)

    found = unexplained(fitted)
    # Layers that encode are nearly given back, the one that does not is in good part foretold.
    assert found[:2].max() < 0.2 and found[2] < 0.6
    assert unexplained(params).min() > 0.9


def test_less_of_the_llm_costs_less():
    half = first_config(READER.config, 1)
    assert cost.prefill_flops(half, 8) < cost.prefill_flops(READER.config, 8)
    assert first_config(READER.config, 0) is READER.config
    assert first_params(READER.params, 0) is READER.params


@pytest.mark.parametrize(
    "encoder, message",
    [
        ({"slots": "heads", "layers": 2}, "keeps entries of all layers"),
        ({"slots": "embedded", "output": "hidden", "layers": 2}, "runs no layer of the LLM"),
        ({"slots": "pooled", "layers": 2}, "the reader wants them of all: set wire.d_z"),
    ],
)
def test_what_has_no_first_layers_is_refused(encoder, message):
    with pytest.raises(ConfigError, match=message):
        parse(ModelConfig, {"encoder": encoder, **(SOFT if "output" in encoder else {})})
