"""Invariants of the evaluation arms, on tiny random readers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.systems.latentwire import baselines, selection
from latent_jax.systems.latentwire import given as given_
from latent_jax.systems.latentwire.model import Wire

RATIO = 3.0
CONTEXTS = (11, 7, 12)


@functools.cache
def reader(family="llama"):
    config = tiny_config(family)
    return Decoder(config), random_params(config, jax.random.key(1))


def batch(width=12, prompt_width=5, vocab=97, lengths=CONTEXTS):
    """Random texts and prompts; the padding holds other random tokens, which must not matter."""
    rng = np.random.default_rng(0)
    real = [rng.integers(1, vocab, n) for n in lengths]
    prompts = [rng.integers(1, vocab, n) for n in (5, 3, 4)[: len(lengths)]]
    pad = np.random.default_rng(width + prompt_width)
    ids = pad.integers(1, vocab, (len(real), width)).astype(np.int32)
    mask = np.zeros(ids.shape, bool)
    prompt_ids = pad.integers(1, vocab, (len(real), prompt_width)).astype(np.int32)
    prompt_mask = np.zeros(prompt_ids.shape, bool)
    for i, (c, p) in enumerate(zip(real, prompts, strict=True)):
        ids[i, : len(c)], mask[i, : len(c)] = c, True
        prompt_ids[i, prompt_width - len(p) :], prompt_mask[i, prompt_width - len(p) :] = p, True
    return ids, mask, prompt_ids, prompt_mask, np.arange(len(real), dtype=np.int32)


def logits(arm, data, family="llama", **kwargs):
    """Next-token logits after the prompt, and after one more token."""
    decoder, params = reader(family)
    given = baselines.build(arm, decoder, params, *data, **kwargs)
    return np.asarray(_read(decoder, params, given, data[2], data[3]))


@functools.partial(jax.jit, static_argnums=0)
def _read(decoder, params, given, ids, mask):
    answers = jnp.full((len(ids), 2), 7, jnp.int32)
    hidden = given_.answer_hidden(
        decoder, params, given_.Asked(given, ids, mask), answers, jnp.ones(answers.shape, bool)
    )
    return decoder.apply({"params": params}, hidden, method="unembed")


@functools.cache
def reference(family="llama"):
    return plain_logits(batch(), family)


def plain_logits(data, family="llama"):
    """The same through one unpadded sequence per row: the definition of reading the full text."""
    decoder, params = reader(family)
    out = []
    for ids, mask, prompt, prompt_mask in zip(*data[:4], strict=True):
        tokens = np.concatenate([ids[mask], prompt[prompt_mask], [7]])[None]
        x = decoder.apply({"params": params}, tokens, method="embed")
        hidden = decoder.apply({"params": params}, x).hidden[:, -2:]
        out.append(decoder.apply({"params": params}, hidden, method="unembed")[0])
    return np.asarray(out)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("arm", ["full_text", "embedding_replay"])
def test_text_arms_equal_plain_reading(arm, family):
    data = batch()
    np.testing.assert_allclose(logits(arm, data, family), reference(family), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "arm",
    ["kv_stride", "kv_topk", "kv_question", "token_budget_head", "token_budget_tail",
     "stride_tokens", "random_tokens", "mean_pool"],
)  # fmt: skip
def test_ratio_one_is_the_full_text(arm):
    data = batch()
    np.testing.assert_allclose(logits(arm, data, ratio=1.0), reference(), rtol=2e-4, atol=2e-4)


def test_pca_at_full_rank_is_the_mean_pool():
    data = batch()
    np.testing.assert_allclose(logits("pca", data, ratio=1.0), reference(), rtol=1e-3, atol=1e-3)


ARMS = [a for a in baselines.ARMS if a not in baselines.LATENT_ARMS]


@pytest.mark.parametrize("arm", ARMS)
def test_neither_padding_nor_the_other_rows_matter(arm):
    anchor = jnp.array([3, 4], jnp.int32)
    together = logits(arm, batch(12, 5), ratio=RATIO, anchor_ids=anchor)
    alone = tuple(x[1:2] for x in batch(18, 8))
    alone = logits(arm, alone, ratio=RATIO, anchor_ids=anchor)
    np.testing.assert_allclose(together[1:2], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("arm", sorted(baselines.BUDGETED))
def test_budget_is_ceil_of_length_over_ratio(arm):
    decoder, params = reader()
    # The shapes and options of the test above, so that nothing is compiled again.
    given = baselines.build(
        arm, decoder, params, *batch(), ratio=RATIO, anchor_ids=jnp.array([3, 4], jnp.int32)
    )
    np.testing.assert_array_equal(given.kv.mask.sum(-1), [4, 3, 4])
    shorter = arm.startswith("token") or arm in ("stride_tokens", "random_tokens")
    np.testing.assert_array_equal(given.start, [4, 3, 4] if shorter else CONTEXTS)


def test_subset_positions():
    mask = np.arange(12)[None] < np.array([[11], [7]])
    index = lambda arm: [  # noqa: E731
        np.asarray(i)[np.asarray(v)].tolist()
        for i, v in zip(
            *baselines.subset_index(arm, mask, RATIO, jnp.arange(2), jax.random.key(0)), strict=True
        )
    ]
    assert index("token_budget_head") == [[0, 1, 2, 3], [0, 1, 2]]
    assert index("token_budget_tail") == [[7, 8, 9, 10], [4, 5, 6]]
    assert index("stride_tokens") == [[0, 3, 6, 9], [0, 3, 6]]
    drawn = index("random_tokens")
    assert all(sorted(set(row)) == row for row in drawn) and max(drawn[1]) < 7


def test_attention_mass_against_a_hand_computed_softmax():
    q = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 1, 2)
    k = jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]).reshape(1, 1, 3, 1, 2)
    mass = selection.attention_mass(q, k, jnp.array([[[True, True, False]]]))
    weights = np.exp([2**-0.5, 0.0])
    np.testing.assert_allclose(mass[0, 0, :, 0], [*(weights / weights.sum()), 0.0], rtol=1e-6)


def test_queries_reproduce_the_decoders_attention():
    """The first layer's queries follow from the embeddings by hand; the rest must not change."""
    decoder, params = reader("qwen3")
    ids, mask, *_ = batch()
    x = decoder.apply({"params": params}, ids, method="embed")
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    q, kv = selection.queries(decoder, params, x, positions, mask, positions)
    plain = decoder.apply({"params": params}, x, positions, mask).kv
    np.testing.assert_allclose(kv.k, plain.k, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kv.v, plain.v, rtol=1e-5, atol=1e-5)
    first = jax.tree.map(lambda a: a[0], params["layers"])
    rms = lambda h, s: h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * s  # noqa: E731
    raw = rms(x, first["attn_norm"]["scale"]) @ first["q"]["kernel"]
    raw = rms(raw.reshape(*ids.shape, 6, 16), first["q_norm"]["scale"])
    from latent_jax.backbones.decoder import inverse_frequencies
    from latent_jax.ops import rope

    expected = rope.rotate(raw, positions, jnp.asarray(inverse_frequencies(decoder.config)))
    np.testing.assert_allclose(q[0], expected, rtol=1e-4, atol=1e-4)


def test_topk_keeps_the_sink_and_the_most_attended():
    decoder, params = reader()
    ids, mask, *_ = batch()
    kv = given_.prefill(decoder, params, ids, mask)
    score = jnp.zeros(kv.k.shape[:4]).at[:, :, 5].set(2.0).at[:, :, 2].set(1.0)
    kept = selection.keep_best(kv, score, jnp.array([3, 3, 2]), 3)
    np.testing.assert_array_equal(kept.k, kv.k[:, :, jnp.array([0, 5, 2])])
    np.testing.assert_array_equal(kept.mask, [[1, 1, 1], [1, 1, 1], [1, 1, 0]])


def test_scramble_permutes_valid_latents_only():
    mask = jnp.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool)
    z = jnp.arange(10.0).reshape(2, 5, 1)
    wire = Wire(z, mask, jnp.zeros((2, 5), jnp.int32), jnp.array([8, 6]))
    moved = baselines.scramble(wire, jnp.array([0, 1]), jax.random.key(2)).z[..., 0]
    assert sorted(moved[0].tolist()) == [0, 1, 2, 3, 4] and moved[0, 4] == 4
    assert sorted(moved[1].tolist()) == [5, 6, 7, 8, 9] and moved[1, 3:].tolist() == [8, 9]
    assert (moved != z[..., 0]).any()


def test_latent_arms_need_a_compressor():
    decoder, params = reader()
    with pytest.raises(ValueError, match="needs a compressor"):
        baselines.build("latent", decoder, params, *batch())
    with pytest.raises(ValueError, match="unknown arm"):
        baselines.build("nonsense", decoder, params, *batch())


@pytest.mark.parametrize("arm", ["full_text", "token_budget_head", "embedding_replay"])
def test_sink_is_a_first_token_that_shifts_nothing(arm):
    """Behind the sink an arm reads as its text does after BOS."""
    data = batch()
    ids, mask, *rest = data
    behind = logits(arm, data, ratio=RATIO, sink=jnp.int32(3))
    decoder, params = reader()
    first = np.full((len(ids), 1), 3, np.int32)
    if arm == "token_budget_head":
        kept, real = baselines.token_subset(arm, ids, mask, RATIO, rest[2], jax.random.key(0))
        ids, mask = np.asarray(kept), np.asarray(real)
    longer = np.concatenate([first, ids], 1), np.concatenate([first > 0, mask], 1)
    np.testing.assert_allclose(behind, logits("full_text", (*longer, *rest)), atol=2e-4)


@pytest.mark.parametrize("arm", [a for a in baselines.ARMS if a not in baselines.LATENT_ARMS])
def test_sink_reaches_every_arm(arm):
    data = batch()
    with_sink = logits(arm, data, ratio=RATIO, sink=jnp.int32(3))
    assert np.abs(with_sink - logits(arm, data, ratio=RATIO)).max() > 1e-3
    assert np.isfinite(with_sink).all()
