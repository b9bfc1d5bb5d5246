"""The compressor: invariants of encoder, wire and adapter on a tiny random reader."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.systems.latentwire import bottleneck
from latent_jax.systems.latentwire.config import (
    AdapterConfig,
    EncoderConfig,
    ModelConfig,
    WireConfig,
)
from latent_jax.systems.latentwire.corrupt import corrupt_tokens
from latent_jax.systems.latentwire.model import (
    Compressor,
    flatten_kv,
    num_latents,
    read,
    unflatten_kv,
)
from latent_jax.systems.latentwire.pool import KVPool

READER = tiny_config("llama")
VARIANTS = {
    "kv": ModelConfig(segment=8, encoder=EncoderConfig(lora_rank=2)),
    "kv_all": ModelConfig(
        segment=8, encoder=EncoderConfig(lora_rank=2, lora_on="all", view="text")
    ),
    "kv_bidirectional": ModelConfig(
        segment=8, encoder=EncoderConfig(lora_rank=2, lora_on="all", view="text", causal=False)
    ),
    "kv_narrow": ModelConfig(segment=8, encoder=EncoderConfig(lora_rank=2), wire=WireConfig(d_z=6)),
    "kv_whole_view": ModelConfig(segment=8, encoder=EncoderConfig(lora_rank=2, view="text")),
    "pooled": ModelConfig(segment=8, encoder=EncoderConfig(slots="pooled")),
    "heads": ModelConfig(segment=8, encoder=EncoderConfig(slots="heads")),
    "both": ModelConfig(segment=8, encoder=EncoderConfig(slots="both", lora_rank=2)),
    "soft": ModelConfig(
        segment=8,
        encoder=EncoderConfig(output="hidden", lora_rank=2),
        wire=WireConfig(d_z=6),
        adapter=AdapterConfig(kind="soft"),
    ),
    "kv_first_layers": ModelConfig(
        segment=8, encoder=EncoderConfig(slots="both", lora_rank=2, layers=2),
        wire=WireConfig(d_z=6),
    ),
    "soft_first_layers": ModelConfig(
        segment=8, encoder=EncoderConfig(output="hidden", lora_rank=2, layers=1),
        adapter=AdapterConfig(kind="soft"),
    ),
    "hidden_to_kv": ModelConfig(
        segment=8, encoder=EncoderConfig(output="hidden", lora_rank=2), wire=WireConfig(d_z=6)
    ),
}  # fmt: skip


def _soft(slots: str, *, d_z=None, levels=0, refiner=0, pooler="mean", **adapter):
    encoder = EncoderConfig(slots=slots, output="hidden", pooler=pooler, refiner=refiner)
    wire, adapter = WireConfig(d_z=d_z, levels=levels), AdapterConfig("soft", **adapter)
    return ModelConfig(segment=8, encoder=encoder, wire=wire, adapter=adapter)


VARIANTS |= {
    "states": _soft("states", pooler="attention"),
    "states_lora": ModelConfig(
        segment=8, adapter=AdapterConfig("soft"), encoder=EncoderConfig(
            slots="states", output="hidden", lora_rank=2, lora_on="all", causal=False),
    ),
    "full": ModelConfig(segment=8, encoder=EncoderConfig(train="full")),
    "full_states": ModelConfig(
        segment=8, adapter=AdapterConfig("soft"), encoder=EncoderConfig(
            slots="states", output="hidden", train="full", lora_on="all", causal=False),
    ),
    "queries": _soft("embedded", d_z=6, levels=5, refiner=1, pooler="queries"),
    "hierarchical": _soft("embedded", d_z=6, pooler="hierarchical", entries=2),
    "convolution": _soft(
        "embedded", pooler="convolution", residual="film", calibration="embed_rms"
    ),
    "bytes": _soft("bytes", residual="mlp", calibration="colour"),
    "codebook": _soft("embedded", residual="affine", transform="codebook", codes=5),
    "nearest": _soft(
        "embedded", residual="affine", calibration="distribution", transform="nearest"
    ),
}  # fmt: skip
#: Measured once, never trained.
MEASURED = ("spelling", "level_scale")


@pytest.fixture(scope="module")
def reader():
    return random_params(READER, jax.random.key(0))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, READER.vocab_size, (3, 16)).astype(np.int32)
    mask = np.arange(16) < np.array([16, 8, 5])[:, None]
    return jnp.asarray(ids), jnp.asarray(mask)


@pytest.fixture(scope="module", params=VARIANTS)
def compressor(request, reader, texts):
    model = Compressor(VARIANTS[request.param], READER, sink=1)
    params = jax.jit(model.init)(jax.random.key(1), reader, *texts)["params"]
    # LoRA starts as the identity; move it so that the tests see its effect.
    params = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), params)
    if "spelling" in params:  # tokens of one to four bytes
        token, place = jnp.ogrid[: READER.vocab_size, : params["spelling"].shape[1]]
        params["spelling"] = jnp.where(place <= token % 4, (7 * token + place) % 256, -1.0)

    @jax.jit
    def prefix(params, ids, mask):
        wire = model.apply({"params": params}, reader, ids, mask, method="compress")
        return wire, model.apply({"params": params}, wire, frozen=reader, method="prefix")

    return request.param, params, prefix


@pytest.mark.parametrize(
    "tokens,ratio,expected", [(16, 4, 4), (17, 4, 5), (3, 4, 1), (12, 1.2, 10)]
)
def test_number_of_latents_is_exact(tokens, ratio, expected):
    assert num_latents(tokens, ratio) == expected


def test_wire_has_one_latent_per_span_at_its_middle(compressor, texts):
    _, params, prefix = compressor
    wire, _ = prefix(params, *texts)
    chex.assert_equal(wire.mask.sum(1).tolist(), [4, 2, 2])
    # floor(4 i + 1.5): integer positions, the second segment continues the first.
    assert wire.positions[0].tolist() == [1, 5, 9, 13]
    assert wire.length.tolist() == [16, 8, 5]


def test_padding_does_not_matter(compressor, texts):
    _, params, prefix = compressor
    ids, mask = texts
    wire, _ = prefix(params, ids, mask)
    other, _ = prefix(params, jnp.where(mask, ids, 7), mask)
    np.testing.assert_allclose(
        wire.z * wire.mask[..., None], other.z * other.mask[..., None], atol=1e-5
    )


def test_segments_are_compressed_independently(compressor, texts):
    _, params, prefix = compressor
    ids, mask = texts
    wire, _ = prefix(params, ids, mask)
    alone, _ = prefix(params, ids[:, :8], mask[:, :8])
    seen = alone.mask[..., None]
    np.testing.assert_allclose(wire.z[:, :2] * seen, alone.z * seen, atol=1e-5)


def test_gradient_reaches_every_trainable_part_and_no_frozen_one(compressor, reader, texts):
    name, params, prefix = compressor
    model, body = Compressor(VARIANTS[name], READER, sink=1), Decoder(READER)
    if "gate" in params:  # closed at first, with nothing behind it moving
        params = {**params, "gate": params["gate"] + 0.5}

    def loss(params):
        _, shown = prefix(params, *texts)
        lead = model.apply({"params": params}, jnp.arange(3), method="lead")
        hidden = read(body, reader, shown, lead, jnp.ones((3, 1), bool)).hidden
        nll, _ = token_cross_entropy(body, reader, hidden, texts[0][:, :1])
        return nll.sum()

    grads = jax.jit(jax.grad(loss))(params)
    chex.assert_tree_all_finite(grads)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if name == "heads" and "tasks" not in jax.tree_util.keystr(path):
            # Measured, or trained by what `softened` gives and not by what is kept.
            assert jnp.abs(g).max() == 0
            continue
        if path[0].key in MEASURED:
            assert jnp.abs(g).max() == 0
            continue
        # The last layer's projections after K/V cannot matter to a KV wire; whole tensors must.
        assert jnp.abs(g).max() > 0, f"no gradient in {jax.tree_util.keystr(path)}"


def test_kv_round_trip_and_move(reader, texts):
    body = Decoder(READER)
    ids, mask = texts
    out = body.apply(
        {"params": reader}, body.apply({"params": reader}, ids, method="embed"), mask=mask
    )
    inv = inverse_frequencies(READER)
    positions = jnp.broadcast_to(jnp.arange(16), ids.shape)
    z = flatten_kv(out.kv, inv, positions)
    assert z.shape == (3, 16, READER.kv_floats_per_token)
    back = unflatten_kv(z, READER, inv, positions, mask)
    chex.assert_trees_all_close(back, KV(out.kv.k, out.kv.v, mask), atol=1e-5)


def test_full_width_bottleneck_is_lossless(reader, texts):
    config = VARIANTS["kv"]
    model = Compressor(config, READER)
    params = jax.jit(model.init)(jax.random.key(1), reader, *texts)["params"]
    wide = jax.jit(lambda *a: model.apply({"params": params}, *a, method="compress"))(
        reader, *texts
    )
    rows = np.asarray(wide.z.reshape(-1, wide.z.shape[-1]))
    fitted = bottleneck.principal_map(rows, width=len(rows) - 1)
    z = ((rows - fitted["in_mean"]) * fitted["in_scale"]) @ fitted["down"]
    back = (z @ fitted["up"]) * fitted["out_scale"] + fitted["out_mean"]
    np.testing.assert_allclose(back, rows, atol=1e-4)


def test_principal_map_fills_missing_directions_orthonormally():
    x = np.random.default_rng(0).standard_normal((5, 20)).astype(np.float32)
    fitted = bottleneck.principal_map(x, 12)
    np.testing.assert_allclose(fitted["down"].T @ fitted["down"], np.eye(12), atol=1e-5)


def test_chunked_cross_entropy_equals_whole(reader, texts):
    body = Decoder(READER)
    hidden = jax.random.normal(jax.random.key(3), (3, 16, READER.hidden_size))

    def run(h, chunk):
        nll, guess = token_cross_entropy(body, reader, h, texts[0], chunk)
        return nll.sum(), (nll, guess)

    whole = jax.value_and_grad(run, has_aux=True)(hidden, None)
    parts = jax.value_and_grad(run, has_aux=True)(hidden, 7)
    chex.assert_trees_all_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_corruption_hits_the_stated_share():
    ids = jnp.zeros((64, 64), jnp.int32)
    noisy = corrupt_tokens(jax.random.key(0), ids, 0.25, 1000)
    assert abs(float((noisy != 0).mean()) - 0.25) < 0.03
    chex.assert_trees_all_equal(corrupt_tokens(jax.random.key(0), ids, 0.0, 1000), ids)


def test_pooling_one_token_per_slot_is_the_cache_itself(reader, texts):
    """At ratio 1 the start (a mean over one token) loses nothing: latents = full text."""
    config = ModelConfig(ratio=1, segment=16, encoder=EncoderConfig(slots="pooled"))
    model, body = Compressor(config, READER, sink=1), Decoder(READER)
    ids, mask = texts
    params = jax.jit(model.init)(jax.random.key(1), reader, ids, mask)["params"]
    wire = model.apply({"params": params}, reader, ids, mask, method="compress")
    prefix = model.apply({"params": params}, wire, method="prefix")
    prompt = jax.random.normal(jax.random.key(2), (3, 2, READER.hidden_size))
    ours = read(body, reader, prefix, prompt, jnp.ones((3, 2), bool)).hidden
    embed = functools.partial(body.apply, {"params": reader}, method="embed")
    for i, n in enumerate(mask.sum(1).tolist()):
        tokens = jnp.concatenate([jnp.array([1]), ids[i, :n]])[None]
        whole = jnp.concatenate([embed(tokens), prompt[i : i + 1]], axis=1)
        # The prompt stands at the segment's end, however short the text.
        where = jnp.concatenate([jnp.arange(-1, n), jnp.array([16, 17])])[None]
        theirs = body.apply({"params": reader}, whole, where).hidden[:, -2:]
        np.testing.assert_allclose(ours[i : i + 1], theirs, atol=2e-4)


def test_pooled_slots_keep_spans_apart(reader, texts):
    """A slot starts as the mean of its span's values, whatever the ratio."""
    ids, mask = texts
    kv = Decoder(READER).apply(
        {"params": reader}, jax.random.normal(jax.random.key(0), (3, 16, READER.hidden_size)),
        mask=mask,
    ).kv  # fmt: skip
    for ratio, spans in ((4.0, [(0, 4), (4, 8), (8, 12), (12, 16)]), (6.4, [(0, 7), (7, 13)])):
        pool = KVPool(READER, ratio)
        m = num_latents(16, ratio)
        args = kv, jnp.ones((3, m), bool), jnp.broadcast_to(jnp.arange(m) * 5, (3, m))
        out, _ = jax.jit(pool.init_with_output)(jax.random.key(0), *args)
        for slot, (begin, end) in enumerate(spans):
            expected = kv.v[:, 0, begin:end].sum(1) / np.ceil(ratio)
            np.testing.assert_allclose(out.v[:, 0, slot], expected, atol=1e-5)


def test_staggered_slots_keep_one_token_per_head(reader, texts):
    """Keys as well: they keep their token's rotation, wherever the slot stands."""
    kv = Decoder(READER).apply(
        {"params": reader}, jax.random.normal(jax.random.key(0), (3, 16, READER.hidden_size))
    ).kv
    args = kv, jnp.ones((3, 4), bool), jnp.broadcast_to(jnp.arange(4) * 4 + 1, (3, 4))
    pool = KVPool(READER, 4.0, "stagger")
    out, _ = jax.jit(pool.init_with_output)(jax.random.key(0), *args)
    for layer in range(READER.num_layers):
        for head in range(READER.num_kv_heads):
            kept = slice((layer + head) % 4, None, 4)
            for mine, text in ((out.k, kv.k), (out.v, kv.v)):
                np.testing.assert_allclose(
                    mine[layer, :, :, head], text[layer, :, kept, head], atol=1e-5
                )
