"""Generation: cached = uncached, padded = unpadded, rows independent, stops, draws, few
compilations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones import decode_cpu, decode_loop, generate, sampling
from latent_jax.backbones.decoder import KV, Decoder
from latent_jax.backbones.generate import generate_ids
from latent_jax.backbones.generate_text import generate_text
from latent_jax.backbones.padding import bucket, left_pad
from latent_jax.backbones.sampling import Sampling
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core.errors import BackboneError, ConfigError

FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3"]
NEW = 7


def model(family="llama"):
    config = tiny_config(family, num_layers=2)
    return Decoder(config), random_params(config, jax.random.key(1))


def embed(decoder, params, ids):
    return decoder.apply({"params": params}, jnp.asarray(ids), method="embed")


@functools.partial(jax.jit, static_argnames="decoder")
def next_token(decoder, params, ids, prefix, start):
    """The greedy token after each place of one row: one pass, no cache, no padding before it."""
    positions = start + jnp.arange(ids.shape[1])[None]
    x = decoder.apply({"params": params}, ids, method="embed")
    hidden = decoder.apply({"params": params}, x, positions, prefix=prefix).hidden
    return jnp.argmax(decoder.apply({"params": params}, hidden, method="unembed")[0], axis=-1)


def naive_greedy(decoder, params, row, n, prefix=None, start=0):
    """No cache: recompute everything for each token (zeros after the row are not seen)."""
    ids = np.zeros((1, 16), np.int32)
    ids[0, : len(row)] = row
    for at in range(len(row), len(row) + n):
        ids[0, at] = next_token(decoder, params, ids, prefix, start)[at - 1]
    return ids[0, len(row) : len(row) + n].tolist()


def prompts(vocab, lengths=(3, 9, 5), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_equals_uncached_single_rows(family):
    decoder, params = model(family)
    rows = prompts(decoder.config.vocab_size)
    ids, mask = left_pad(rows)
    out = generate_ids(decoder, params, embed(decoder, params, ids), mask, max_new_tokens=NEW)
    for i, row in enumerate(rows):
        want = naive_greedy(decoder, params, row, NEW)
        assert out.tokens[i].tolist() == want
    assert out.lengths.tolist() == [NEW] * 3 and not out.stopped.any()


def test_prefix_and_start_equal_uncached():
    decoder, params = model("qwen2")
    rows = prompts(decoder.config.vocab_size)
    given = prompts(decoder.config.vocab_size, (4, 4, 4), seed=5)
    prefix = decoder.apply({"params": params}, embed(decoder, params, given)).kv
    mask = prefix.mask.at[1, 2:].set(False)
    prefix = KV(prefix.k, prefix.v, mask)
    start = jnp.array([4, 2, 11])
    ids, valid = left_pad(rows)
    out = generate_ids(
        decoder, params, embed(decoder, params, ids), valid,
        max_new_tokens=NEW, prefix=prefix, start=start,
    )  # fmt: skip
    for i, row in enumerate(rows):
        own = KV(prefix.k[:, i : i + 1], prefix.v[:, i : i + 1], mask[i : i + 1])
        want = naive_greedy(decoder, params, row, NEW, own, int(start[i]))
        assert out.tokens[i].tolist() == want


def test_prefix_of_own_context_equals_one_prompt():
    """Splitting a prompt into a KV prefix and the rest changes nothing."""
    decoder, params = model()
    row = prompts(decoder.config.vocab_size, (12,))[0]
    whole = generate_ids(decoder, params, embed(decoder, params, [row]), max_new_tokens=NEW)
    prefix = decoder.apply({"params": params}, embed(decoder, params, [row[:8]])).kv
    rest = generate_ids(
        decoder,
        params,
        embed(decoder, params, [row[8:]]),
        max_new_tokens=NEW,
        prefix=prefix,
        start=8,
    )
    assert rest.tokens.tolist() == whole.tokens.tolist()


def test_decode_logits_match_prefill_logits():
    """Teacher-forced through the cache token by token = one pass over the whole text."""
    decoder, params = model("llama3")
    ids = jnp.asarray(prompts(decoder.config.vocab_size, (11, 11)))
    full = decoder.apply({"params": params}, embed(decoder, params, ids)).hidden
    hidden, cache, position = generate.prefill(
        decoder,
        params,
        embed(decoder, params, ids[:, :6]),
        jnp.ones((2, 6), bool),
        jnp.zeros(2, int),
        None,
        5,
    )
    np.testing.assert_allclose(hidden, full[:, 5], atol=1e-5)
    step = jax.jit(decode_loop.decode_step, static_argnums=(0, 6))
    for i in range(5):
        slot = jnp.int32(6 + i)
        hidden, cache = step(decoder, params, ids[:, 6 + i], position + i, cache, slot, jnp.float32)
        np.testing.assert_allclose(hidden, full[:, 6 + i], atol=1e-5)


def test_rows_do_not_depend_on_the_batch():
    decoder, params = model()
    rows = prompts(decoder.config.vocab_size, (6, 2, 9, 6))
    ids, mask = left_pad(rows)
    args = dict(max_new_tokens=NEW, sampling=Sampling(1.3, top_k=20, top_p=0.9), rng=3)
    out = generate_ids(decoder, params, embed(decoder, params, ids), mask, **args)
    alone = generate_ids(
        decoder, params, embed(decoder, params, ids[2:3]), mask[2:3], rows=jnp.array([2]), **args
    )
    assert alone.tokens[0].tolist() == out.tokens[2].tolist()
    # Row 3 with row 0's content draws differently from row 0.
    same = generate_ids(decoder, params, embed(decoder, params, ids[[0, 0]]), mask[[0, 0]], **args)
    assert same.tokens[0].tolist() != same.tokens[1].tolist()


def test_right_padding_is_accepted():
    decoder, params = model()
    rows = prompts(decoder.config.vocab_size, (3, 5))
    right = np.zeros((2, 7), np.int32)
    mask = np.zeros((2, 7), bool)
    for i, row in enumerate(rows):
        right[i, : len(row)], mask[i, : len(row)] = row, True
    ids, left_mask = left_pad(rows)
    a = generate_ids(decoder, params, embed(decoder, params, right), mask, max_new_tokens=NEW)
    b = generate_ids(decoder, params, embed(decoder, params, ids), left_mask, max_new_tokens=NEW)
    assert a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_cpu_layout_equals_the_general_step(family, monkeypatch):
    """The CPU decode layout gives the same tokens, with a prefix and low-rank deltas too."""
    decoder, params = model(family)
    ids, mask = left_pad(prompts(decoder.config.vocab_size))
    x = embed(decoder, params, ids)
    args = dict(max_new_tokens=9)
    if family == "qwen2":
        prefix = decoder.apply({"params": params}, x[:, -4:]).kv
        shapes = decoder.config.projection_shapes
        lora = {
            name: {
                "a": jax.random.normal(jax.random.key(i), (decoder.config.num_layers, n, 2)) * 0.1,
                "b": jax.random.normal(jax.random.key(i), (decoder.config.num_layers, 2, m)) * 0.1,
            }
            for i, (name, (n, m)) in enumerate(shapes.items())
        }
        args |= dict(prefix=prefix, start=4, lora=lora)
    want = generate_ids(decoder, params, x, mask, **args).tokens
    assert not decode_cpu._laid_out
    monkeypatch.setattr(decode_cpu, "SMALLEST_MODEL", 0)
    got = generate_ids(decoder, params, x, mask, **args).tokens
    assert got.tolist() == want.tolist()
    assert bool(decode_cpu._laid_out) == (family != "qwen2")
    del params  # the remembered layout goes with the weights
    assert not decode_cpu._laid_out


def test_stop_ids_end_rows_one_by_one():
    decoder, params = model()
    rows = prompts(decoder.config.vocab_size)
    ids, mask = left_pad(rows)
    x = embed(decoder, params, ids)
    free = generate_ids(decoder, params, x, mask, max_new_tokens=NEW).tokens
    stop = int(free[0, 2])
    out = generate_ids(decoder, params, x, mask, max_new_tokens=NEW, stop_ids=[stop])
    for i in range(3):
        want = free[i].tolist()
        n = want.index(stop) + 1 if stop in want else NEW
        assert int(out.lengths[i]) == n and bool(out.stopped[i]) == (stop in want)
        assert out.tokens[i].tolist() == want[:n] + [0] * (NEW - n)


def test_everything_stopped_at_the_first_token():
    decoder, params = model()
    x = embed(decoder, params, [[1, 2, 3]])
    first = int(generate_ids(decoder, params, x, max_new_tokens=1).tokens[0, 0])
    out = generate_ids(decoder, params, x, max_new_tokens=NEW, stop_ids=[5, first])
    assert out.lengths.tolist() == [1] and out.tokens[0].tolist() == [first] + [0] * (NEW - 1)


def test_lengths_temperatures_and_stops_share_programs():
    decoder, params = model()
    before = generate._generate._cache_size()
    for t, new, temp, stops in [
        (3, 4, 0.7, [1]),
        (9, 7, 1.2, [2, 3]),
        (14, 16, 0.5, []),
        (16, 1, 2.0, [9]),
    ]:
        x = embed(decoder, params, [list(range(t))])
        generate_ids(
            decoder, params, x, max_new_tokens=new, sampling=Sampling(temp), stop_ids=stops, rng=t
        )
    assert generate._generate._cache_size() == before + 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "allowed"),
    [
        (1.0, None, None, {0, 1, 2, 3}),
        (1.0, 2, None, {1, 3}),
        (1.0, None, 0.6, {1, 3}),
        (1.0, None, 0.3, {3}),
        (1.0, 3, 0.95, {0, 1, 3}),
        (0.0, None, None, {3}),
    ],
)
def test_sampled_support(temperature, top_k, top_p, allowed):
    """Probabilities 0.15, 0.3, 0.1, 0.45: the support of each rule is known by hand."""
    logits = jnp.tile(jnp.log(jnp.array([0.15, 0.3, 0.1, 0.45])), (2000, 1))
    got = np.asarray(
        sampling.sample(jax.random.key(0), logits, Sampling(temperature, top_k, top_p))
    )
    assert set(got.tolist()) == allowed
    if len(allowed) > 1:
        p = np.array([0.15, 0.3, 0.1, 0.45]) * [i in allowed for i in range(4)]
        np.testing.assert_allclose(np.bincount(got, minlength=4) / 2000, p / p.sum(), atol=0.04)


def test_temperature_sharpens_by_the_closed_form():
    logits = jnp.tile(jnp.array([0.0, 1.0]), (4000, 1))
    got = sampling.sample(jax.random.key(1), logits, Sampling(0.5))
    assert abs(float(jnp.mean(got)) - 1 / (1 + np.exp(-2.0))) < 0.02


@pytest.mark.parametrize(
    "bad", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)]
)
def test_bad_sampling_is_named(bad):
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(bad))} is"):
        Sampling(**bad)


def test_bad_calls_are_named():
    decoder, params = model()
    x = embed(decoder, params, [[1, 2]])
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate_ids(decoder, params, x, max_new_tokens=0)
    with pytest.raises(BackboneError, match="expected"):
        generate_ids(decoder, params, x[..., :5], max_new_tokens=1)
    with pytest.raises(BackboneError, match="prefix keys"):
        kv = decoder.apply({"params": params}, jnp.tile(x, (2, 1, 1))).kv
        generate_ids(decoder, params, x, max_new_tokens=1, prefix=kv)


def test_buckets_are_few_and_close():
    sizes = {bucket(n) for n in range(1, 4097)}
    assert len(sizes) <= 18
    assert all(n <= bucket(n) <= max(16, n * 3 / 2) for n in range(1, 4097))


class Letters:
    """A tokenizer of single characters: ids are code points below 97."""

    bos_id, eos_id, pad_id, vocab_size = None, 1, None, 97
    stop_ids, add_bos = (1,), False

    def encode(self, text):
        return [ord(c) % 97 for c in text]

    def decode(self, ids, skip_special=True):
        return "".join(chr(i + 32) for i in ids)

    def token_to_id(self, token):
        return ord(token) - 32 if len(token) == 1 else None


class Fake:
    """As much of a `Backbone` as `generate_text` uses."""

    tokenizer = Letters()

    def embed(self, ids):
        return embed(self.decoder, self.params, ids)

    def __init__(self):
        self.decoder, self.params = model()
        self.config = self.decoder.config


def test_generate_text_batches_change_nothing():
    backbone = Fake()
    texts = ["hello there", "a", "some longer prompt than that", "bb", "ccc"]
    args = dict(temperature=1.0, top_k=30, seed=4)
    whole = generate_text(backbone, texts, 6, batch_size=8, **args)
    assert whole == generate_text(backbone, texts, 6, batch_size=2, **args)
    assert len(whole) == 5 and all(len(t) <= 6 for t in whole)
    ids = generate_text(
        backbone, [backbone.tokenizer.encode(t) for t in texts], 6, return_ids=True, **args
    )
    assert [backbone.tokenizer.decode(i) for i in ids] == whole


def test_generate_text_stops_at_strings():
    backbone = Fake()
    options = dict(temperature=2.0, seed=1)
    free = generate_text(backbone, "hello", 12, **options)[0]
    assert len(free) > 4  # a seed whose text ends at once would test nothing
    for stop in (free[2:4], [free[3]]):
        cut = free[: free.find(stop if isinstance(stop, str) else stop[0])]
        assert generate_text(backbone, ["hello"], 12, stop=stop, **options)[0] == cut


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "prompt 0 is empty"), ([5, 500], "token id 500"), ([1] * 600, "context window")],
)
def test_generate_text_bad_prompts(prompt, words):
    with pytest.raises(BackboneError, match=words):
        generate_text(Fake(), [prompt], 4)
