"""The decoder against a plain numpy one, and its invariants."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.decoder import KV, Decoder, inverse_frequencies
from latent_jax.backbones.testing import param_shapes, random_params, tiny_config
from latent_jax.core.errors import BackboneError

FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"]
T = 7


@functools.cache
def model(family="llama"):
    config = tiny_config(family, num_layers=2)
    return Decoder(config), random_params(config, jax.random.key(2))


@functools.partial(jax.jit, static_argnames="decoder")
def run(decoder, params, x, positions=None, mask=None, attention_mask=None, prefix=None, lora=None):
    out = decoder.apply({"params": params}, x, positions, mask, attention_mask, prefix, lora)
    return out, decoder.apply({"params": params}, out.hidden, method="unembed")


def inputs(decoder, b=2, t=T, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((b, t, decoder.config.hidden_size)).astype(np.float32)


def norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def turn(x, positions, freq):
    """Rotation of (x1, x2) as a complex number: the definition, not the implementation."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None, None] * freq)
    return np.concatenate([z.real, z.imag], axis=-1)


def numpy_decoder(config, params, x):
    """One row [t, d] in float64, written with loops over heads and queries."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, c = x.astype(np.float64), config
    t, positions = x.shape[0], np.arange(x.shape[0])
    waves = np.broadcast_to(inverse_frequencies(c), (c.num_layers, c.head_dim // 2))
    scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
    for i in range(c.num_layers):
        freq = waves[i].astype(np.float64)
        w = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        h = norm(x, w["attn_norm"]["scale"], c.norm_eps)
        q, k, v = (h @ w[n]["kernel"] + w[n].get("bias", 0.0) for n in ("q", "k", "v"))
        q = q.reshape(t, c.num_heads, c.head_dim)
        k, v = (a.reshape(t, c.num_kv_heads, c.head_dim) for a in (k, v))
        if c.qk_norm:
            q = norm(q, w["q_norm"]["scale"], c.norm_eps)
            k = norm(k, w["k_norm"]["scale"], c.norm_eps)
        q, k = turn(q, positions, freq), turn(k, positions, freq)
        out = np.zeros((t, c.num_heads, c.head_dim))
        for head in range(c.num_heads):
            group = head // (c.num_heads // c.num_kv_heads)
            for at in range(t):
                s = k[: at + 1, group] @ q[at, head] * scale
                p = np.exp(s - s.max())
                out[at, head] = (p / p.sum()) @ v[: at + 1, group]
        out = out.reshape(t, -1) @ w["o"]["kernel"]
        if c.post_norms:
            out = norm(out, w["attn_post_norm"]["scale"], c.norm_eps)
        x = x + out
        h = norm(x, w["mlp_norm"]["scale"], c.norm_eps)
        gate = h @ w["gate"]["kernel"]
        if c.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        out = (gate * (h @ w["up"]["kernel"])) @ w["down"]["kernel"]
        if c.post_norms:
            out = norm(out, w["mlp_post_norm"]["scale"], c.norm_eps)
        x = x + out
    x = norm(x, params["final_norm"]["scale"], c.norm_eps)
    return x, x @ (params["embed"].T / c.embed_scale if c.tie_embeddings else params["head"])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_numpy(family):
    decoder, params = model(family)
    x = inputs(decoder)
    out, logits = run(decoder, params, x)
    for row in range(2):
        hidden, want = numpy_decoder(decoder.config, params, x[row])
        np.testing.assert_allclose(out.hidden[row], hidden, atol=2e-4)
        np.testing.assert_allclose(logits[row], want, atol=5e-4)


def test_llama3_frequencies_by_hand():
    """High frequencies are kept, low ones divided by the factor, the middle is between."""
    config = tiny_config("llama3", head_dim=16)
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    scaled = inverse_frequencies(config)
    turns = 64 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    middle = (turns >= 1) & (turns <= 4)
    assert np.all(scaled[middle] <= plain[middle]) and np.all(scaled[middle] >= plain[middle] / 8)
    assert (turns > 4).any() and (turns < 1).any()


def test_later_tokens_do_not_reach_earlier_ones():
    decoder, params = model()
    x = inputs(decoder)
    changed = x.copy()
    changed[:, 4:] += 1.0
    a, b = (run(decoder, params, v)[0].hidden for v in (x, changed))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(np.asarray(a - b)[:, 4:]).max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    decoder, params = model("qwen2")
    x, pad = inputs(decoder), 3
    junk = 100 * inputs(decoder, t=pad, seed=1)
    parts = [junk, x] if side == "left" else [x, junk]
    valid = [np.zeros((2, pad), bool), np.ones((2, T), bool)]
    mask = np.concatenate(valid if side == "left" else valid[::-1], axis=1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    padded = run(decoder, params, np.concatenate(parts, axis=1), positions, mask)[0].hidden
    padded = padded[:, pad:] if side == "left" else padded[:, :T]
    np.testing.assert_allclose(padded, run(decoder, params, x)[0].hidden, atol=2e-5)
    assert np.isfinite(np.asarray(padded)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_own_kv_as_prefix_equals_one_pass(family):
    decoder, params = model(family)
    x = inputs(decoder)
    whole = run(decoder, params, x)[0]
    first = run(decoder, params, x[:, :4])[0]
    positions = np.tile(np.arange(4, T), (2, 1))
    rest = run(decoder, params, x[:, 4:], positions, prefix=first.kv)[0]
    np.testing.assert_allclose(rest.hidden, whole.hidden[:, 4:], atol=2e-5)
    np.testing.assert_allclose(rest.kv.k, whole.kv.k[:, :, 4:], atol=2e-5)


def test_masked_prefix_entries_are_not_seen():
    decoder, params = model()
    x = inputs(decoder)
    kv = run(decoder, params, inputs(decoder, t=5, seed=3))[0].kv
    mask = jnp.array([[True, False, True, False, False]] * 2)
    junk = KV(kv.k.at[:, :, 1].add(50.0), kv.v.at[:, :, 3:].add(50.0), mask)
    a = run(decoder, params, x, prefix=KV(kv.k, kv.v, mask))[0].hidden
    b = run(decoder, params, x, prefix=junk)[0].hidden
    np.testing.assert_array_equal(a, b)
    nothing = run(decoder, params, x, prefix=KV(kv.k, kv.v, jnp.zeros((2, 5), bool)))[0].hidden
    np.testing.assert_allclose(nothing, run(decoder, params, x)[0].hidden, atol=2e-5)


def test_only_relative_positions_matter():
    decoder, params = model("llama3")
    x = inputs(decoder)
    shifted = run(decoder, params, x, np.tile(np.arange(T) + 37, (2, 1)))[0].hidden
    np.testing.assert_allclose(shifted, run(decoder, params, x)[0].hidden, atol=2e-4)


def test_attention_mask_replaces_the_causal_one():
    decoder, params = model()
    x = inputs(decoder)
    causal = np.tril(np.ones((2, T, T), bool))
    a = run(decoder, params, x, attention_mask=causal)[0].hidden
    np.testing.assert_array_equal(a, run(decoder, params, x)[0].hidden)
    alone = run(decoder, params, x, attention_mask=np.tile(np.eye(T, dtype=bool), (2, 1, 1)))[0]
    for at in (0, 3):
        one = run(decoder, params, x[:, at : at + 1], np.full((2, 1), at))[0]
        np.testing.assert_allclose(alone.hidden[:, at], one.hidden[:, 0], atol=2e-5)


def test_lora_equals_merged_weights():
    decoder, params = model("qwen2")
    layers = decoder.config.num_layers
    rng = np.random.default_rng(4)
    merged, lora = jax.tree.map(lambda a: a, params), {}
    for name, (n, m) in decoder.config.projection_shapes.items():
        a = 0.2 * rng.standard_normal((layers, n, 2)).astype(np.float32)
        b = 0.2 * rng.standard_normal((layers, 2, m)).astype(np.float32)
        lora[name] = {"a": a, "b": b}
        merged["layers"][name] = dict(merged["layers"][name])
        merged["layers"][name]["kernel"] = merged["layers"][name]["kernel"] + a @ b
    x = inputs(decoder)
    got = run(decoder, params, x, lora=lora)[0].hidden
    np.testing.assert_allclose(got, run(decoder, merged, x)[0].hidden, atol=1e-4)
    assert np.abs(np.asarray(got - run(decoder, params, x)[0].hidden)).max() > 0.1


def test_remat_changes_neither_values_nor_gradients():
    decoder, params = model()
    x = jnp.asarray(inputs(decoder))

    def loss(decoder):
        f = jax.jit(lambda v: jnp.sum(jnp.sin(decoder.apply({"params": params}, v).hidden)))
        return jax.value_and_grad(f)(x)

    (a, da), (b, db) = loss(decoder), loss(Decoder(decoder.config, remat=True))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(da, db, atol=1e-5)


def test_bf16_is_close_and_stays_bf16():
    decoder, params = model()
    x = inputs(decoder)
    out, logits = run(decoder, params, jnp.asarray(x, jnp.bfloat16))
    assert out.hidden.dtype == out.kv.k.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact = np.asarray(run(decoder, params, x)[0].hidden)
    assert np.abs(np.asarray(out.hidden, np.float32) - exact).max() < 0.15


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_params_have_the_configs_size(family):
    config = tiny_config(family)
    assert config.num_params() == sum(a.size for a in jax.tree.leaves(param_shapes(config)))


def test_tiny_config_of_an_unknown_family():
    with pytest.raises(BackboneError, match="choose from llama"):
        tiny_config("gpt2")
