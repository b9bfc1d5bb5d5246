"""Attention against a loop over queries, with every kind of prefix mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.ops import attention

B, T, M, HEADS, GROUPS, D = 2, 4, 3, 4, 2, 8


def slow(q, k, v, mask, prefix_k, prefix_v, prefix_mask):
    """One query and head at a time, only over what it may see."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, HEADS):
        g = h // (HEADS // GROUPS)
        keys = np.concatenate([prefix_k[b, prefix_mask[b, t], g], k[b, mask[b, t], g]])
        values = np.concatenate([prefix_v[b, prefix_mask[b, t], g], v[b, mask[b, t], g]])
        score = keys @ q[b, t, h] / np.sqrt(D)
        weight = np.exp(score - score.max())
        out[b, t, h] = weight @ values / weight.sum()
    return out


@pytest.mark.parametrize("per_query", [False, True])
def test_prefix_mask(per_query):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q, k, v = draw(B, T, HEADS, D), draw(B, T, GROUPS, D), draw(B, T, GROUPS, D)
    prefix_k, prefix_v = draw(B, M, GROUPS, D), draw(B, M, GROUPS, D)
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    seen = rng.random((B, T, M) if per_query else (B, M)) < 0.5
    each = seen if per_query else np.broadcast_to(seen[:, None], (B, T, M))
    got = attention.attend(*map(jnp.asarray, (q, k, v, mask, prefix_k, prefix_v, seen)))
    want = slow(q, k, v, mask, prefix_k, prefix_v, each)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_hidden_prefix_has_no_gradient():
    key = jax.random.key(0)
    q = jax.random.normal(key, (1, T, HEADS, D))
    k = v = jax.random.normal(key, (1, T, GROUPS, D))
    seen = jnp.zeros((1, T, M), bool).at[0, 0, 0].set(True)
    mask = jnp.tril(jnp.ones((1, T, T), bool))

    def total(prefix):
        return attention.attend(q, k, v, mask, prefix, prefix, seen).sum()

    gradient = np.asarray(jax.grad(total)(jnp.ones((1, M, GROUPS, D))))
    assert np.abs(gradient[0, 0]).max() > 0
    assert np.abs(gradient[0, 1:]).max() == 0
