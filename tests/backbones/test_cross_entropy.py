"""Cross-entropy through a frozen vocabulary: as the plain one, in a fraction of its memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_jax.backbones.cross_entropy import in_chunks, out_of_chunks, token_cross_entropy
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import tiny_config


def plain(body, frozen, hidden, targets):
    """Slow reference: all logits, kept by autodiff."""
    logits = body.apply({"params": frozen}, hidden, method="unembed")
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets), logits


def problem(vocab, b=3, t=7, tied=True, dtype=jnp.float32):
    config = tiny_config("llama" if tied else "llama3", vocab_size=vocab)
    d = config.hidden_size
    keys = jax.random.split(jax.random.key(0), 4)
    name, shape = ("embed", (vocab, d)) if tied else ("head", (d, vocab))
    frozen = {"embed": jnp.zeros((vocab, d)), name: jax.random.normal(keys[0], shape, dtype)}
    hidden = jax.random.normal(keys[1], (b, t, d), dtype)
    targets = jax.random.randint(keys[2], (b, t), 0, vocab)
    weight = jax.random.uniform(keys[3], (b, t)) * (jnp.arange(t) > 1)  # some are not supervised
    return Decoder(config), frozen, hidden, targets, weight


@pytest.mark.parametrize("chunk", [None, 4, 5, 21, 100])
@pytest.mark.parametrize("tied", [True, False])
def test_value_and_gradient_are_the_plain_ones(chunk, tied):
    body, frozen, hidden, targets, weight = problem(97, tied=tied)

    def ours(h):
        nll, guess = token_cross_entropy(body, frozen, h, targets, chunk)
        return (nll * weight).sum(), (nll, guess)

    def reference(h):
        nll, logits = plain(body, frozen, h, targets)
        return (nll * weight).sum(), (nll, jnp.argmax(logits, -1))

    (_, mine), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(hidden)
    (_, theirs), expected = jax.jit(jax.value_and_grad(reference, has_aux=True))(hidden)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mine[1], theirs[1])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_states_get_bfloat16_gradients():
    body, frozen, hidden, targets, weight = problem(97, dtype=jnp.bfloat16)
    ours = jax.grad(
        lambda h: (token_cross_entropy(body, frozen, h, targets, 8)[0] * weight).sum()
    )(hidden)
    exact = jax.grad(lambda h: (plain(body, frozen, h, targets)[0] * weight).sum())(
        hidden.astype(jnp.float32)
    )
    assert ours.dtype == jnp.bfloat16
    scale = np.abs(exact).max()
    np.testing.assert_allclose(ours.astype(np.float32), exact, atol=0.02 * scale)


def test_logits_are_neither_kept_nor_made_at_once():
    body, frozen, hidden, targets, _ = problem(4096, b=4, t=64)
    rows = 4 * 64

    def memory(fn):
        compiled = jax.jit(jax.grad(fn)).lower(hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = memory(lambda h: plain(body, frozen, h, targets)[0].sum())
    chunked = memory(lambda h: token_cross_entropy(body, frozen, h, targets, 16)[0].sum())
    assert whole >= rows * 4096 * 4
    assert chunked < 0.25 * whole


@pytest.mark.parametrize(("n", "chunk"), [(12, 4), (13, 4), (5, 4), (3, 2)])
def test_chunks_hold_every_row_once(n, chunk):
    x = np.arange(1, n + 1)
    parts = in_chunks(x, chunk)
    assert parts.shape[1] <= chunk
    np.testing.assert_array_equal(out_of_chunks(parts, n), x)
    assert (parts > 0).sum() == n
