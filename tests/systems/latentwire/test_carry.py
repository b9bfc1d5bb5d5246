"""Summary vectors carried from segment to segment: who sees what of whom."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.decoder import inverse_frequencies
from latent_jax.backbones.sink import sink_kv
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.config import ModelConfig
from latent_jax.systems.latentwire.model import Compressor, flatten_kv

READER = byte_reader(3)
SHAPES = {
    "pooled": {"encoder": {"slots": "pooled"}},
    "memory": {"encoder": {"lora_rank": 2, "view": "text"}, "wire": {"d_z": 6}},
    "span": {"encoder": {"lora_rank": 2}, "private": 1, "wire": {"d_z": 6}},
    "adapted": {"encoder": {"lora_rank": 2, "view": "text", "lora_on": "all"}},
    "first": {"encoder": {"slots": "pooled", "layers": 2}, "wire": {"d_z": 6}},
    "soft": {"encoder": {"output": "hidden", "lora_rank": 2, "view": "text"},
             "wire": {"d_z": 6}, "adapter": {"kind": "soft", "entries": 2}},
    "states": {"encoder": {"slots": "states", "output": "hidden", "pooler": "attention"},
               "adapter": {"kind": "soft"}},
}  # fmt: skip
SEGMENT, RATIO = 8, 4


@pytest.fixture(scope="module")
def texts():
    ids = np.random.default_rng(0).integers(3, 200, (3, 24)).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(np.arange(24) < np.array([24, 13, 8])[:, None])


def opened(shape, **changes):
    tree = {"segment": SEGMENT, "ratio": RATIO, **shape, **changes}
    tree["encoder"] = {**shape["encoder"], "carry": 2}
    return Compressor(parse(ModelConfig, tree), READER.config, sink=1)


def alone(model):
    encoder = dataclasses.replace(model.config.encoder, carry=0)
    return model.clone(config=dataclasses.replace(model.config, encoder=encoder))


#: What the fast tests look at.
FAST = ("memory", "soft")


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in SHAPES],
)
def made(request, texts):
    model = opened(SHAPES[request.param])
    params = jax.jit(model.init)(jax.random.key(1), READER.params, *texts)["params"]
    # LoRA and poolers start as the identity or as a mean.
    params = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), params)
    return model, params


@functools.partial(jax.jit, static_argnums=0)
def _compressed(model, params, frozen, ids, mask):
    return model.apply({"params": params}, frozen, ids, mask, method="compress")


def compressed(model, params, ids, mask):
    return _compressed(model, params, READER.params, ids, mask)


def test_the_first_segment_is_compressed_as_ever_and_the_others_are_not(made, texts):
    model, params = made
    ours, theirs = (compressed(m, params, *texts) for m in (model, alone(model)))
    for name in ("mask", "positions", "length"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    each = ours.z.shape[1] // 3
    np.testing.assert_allclose(ours.z[:, :each], theirs.z[:, :each], atol=1e-5)
    moved = jnp.abs(ours.z - theirs.z).max(-1)
    assert float(moved[0, each:].min()) > 1e-4
    assert float(moved[1, each : 2 * each].max()) > 1e-4


def test_a_segment_knows_what_came_before_and_not_what_comes_after(made, texts):
    model, params = made
    ids, mask = texts
    base = compressed(model, params, ids, mask).z
    each = base.shape[1] // 3
    earlier = compressed(model, params, ids.at[0, 2].add(1), mask).z
    later = compressed(model, params, ids.at[0, 18].add(1), mask).z
    assert float(jnp.abs(earlier - base)[0, each : 2 * each].max()) > 1e-5
    assert float(jnp.abs(earlier - base)[0, 2 * each :].max()) > 1e-5
    np.testing.assert_allclose(later[0, : 2 * each], base[0, : 2 * each], atol=1e-6)
    assert float(jnp.abs(later - base)[0, 2 * each :].max()) > 1e-5


def test_padding_and_empty_segments_do_not_matter(made, texts):
    model, params = made
    ids, mask = texts
    base = compressed(model, params, ids, mask)
    other = compressed(model, params, jnp.where(mask, ids, 7), mask)
    real = base.mask[..., None]
    assert np.isfinite(np.asarray(base.z)).all()
    np.testing.assert_allclose(base.z * real, other.z * real, atol=1e-5)
    short = compressed(model, params, ids[1:, :16], mask[1:, :16])
    n = short.z.shape[1]
    real = short.mask[..., None]
    np.testing.assert_allclose(base.z[1:, :n] * real, short.z * real, atol=1e-5)


def test_gradient_goes_back_through_what_was_carried(made, texts):
    model, params = made
    if "up" not in params:
        pytest.skip("nothing of this shape stands between a latent and who reads it")

    def size(params, model):
        z = compressed(model, params, *texts).z
        return jnp.square(z[:, z.shape[1] // 3 :]).mean()

    up = jax.grad(size)(params, model)["up"]
    assert np.isfinite(np.asarray(up)).all() and float(jnp.abs(up).max()) > 0
    assert float(jnp.abs(jax.grad(size)(params, alone(model))["up"]).max()) == 0


def test_without_compression_segments_are_one_text(texts):
    """A slot per token that is its token: what is carried is the whole of what came before."""
    model = opened(SHAPES["pooled"], ratio=1)
    params = model.init(jax.random.key(1), READER.params, *texts)["params"]
    wire = compressed(model, params, *texts)
    body, frozen = READER.decoder, {"params": READER.params}
    first = sink_kv(body, READER.params, jnp.int32(1), 3)
    whole = body.apply(
        frozen, body.apply(frozen, texts[0], method="embed"), None, texts[1], prefix=first
    ).kv
    where = jnp.broadcast_to(jnp.arange(24), (3, 24))
    expected = flatten_kv(whole, inverse_frequencies(READER.config), where)
    real = np.asarray(wire.mask)
    np.testing.assert_array_equal(real, texts[1])
    np.testing.assert_allclose(wire.z[real], expected[real], atol=2e-4)


@pytest.mark.parametrize("slots", ["heads", "embedded"])
def test_what_reads_no_text_in_order_carries_nothing(slots):
    output = {"output": "hidden"} if slots == "embedded" else {}
    with pytest.raises(ConfigError, match="encoder.carry=1: encoder.slots="):
        parse(ModelConfig, {"encoder": {"slots": slots, "carry": 1, **output}})
