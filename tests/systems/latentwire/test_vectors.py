"""Poolers, adapters and terms on latents, each against what can be worked out by hand."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones import ByteTokenizer
from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import (
    adapters,
    bottleneck,
    cost,
    look,
    regularise,
    suite,
)
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.first_shape import as_first
from latent_jax.systems.latentwire.latents import Prefix, Wire
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig
from latent_jax.systems.latentwire.vectors import (
    LONGEST,
    VectorPool,
    prime_factors,
    spelling,
)

SOFT = {"encoder": {"slots": "embedded", "output": "hidden"}, "adapter": {"kind": "soft"}}


def shape(**changes):
    both = {k: {**SOFT.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}
    return parse(ModelConfig, {"segment": 16, **SOFT, **both})


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 200, (3, 16)).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(np.arange(16) < np.array([16, 9, 1])[:, None])


@pytest.mark.parametrize("kind", ["mean", "attention", "queries", "hierarchical", "convolution"])
@pytest.mark.parametrize("ratio", [1, 4, 6])
def test_every_pooler_starts_near_the_mean_of_its_span(kind, ratio):
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))
    mask = jnp.arange(16) < jnp.array([16, 7])[:, None]
    out, _ = VectorPool(kind, ratio, 16).init_with_output(jax.random.key(1), x, mask)
    assert out.shape == (2, -(-16 // ratio), 8)
    for row, length in enumerate((16, 7)):
        for slot in range(-(-length // ratio)):
            span = x[row, slot * ratio : min(length, (slot + 1) * ratio)].mean(0)
            if kind == "queries":  # adds what it reads of the whole text
                assert jnp.abs(out[row, slot] - span).max() > 0
            elif kind != "hierarchical" or (slot + 1) * ratio <= length:  # else means of means
                np.testing.assert_allclose(out[row, slot], span, atol=1e-5)


def test_prime_factors_multiply_to_the_ratio():
    assert [prime_factors(n) for n in (1, 2, 12, 49)] == [[], [2], [2, 2, 3], [7, 7]]


def test_tokens_are_spelled_in_their_bytes():
    table = spelling(ByteTokenizer(), 262)
    ids = ByteTokenizer().encode("ab")
    assert table.shape == (262, LONGEST)
    assert table[ids[0], 0] == 97 and table[ids[1], 0] == 98 and table[ids[0], 1] == -1
    split = ByteTokenizer().encode("é")  # one character, two tokens
    assert [table[i, :2].tolist() for i in split] == [[0xC3, -1], [0xA9, -1]]


def test_calibration_moves_sizes_to_the_vocabulary_s():
    key, table = jax.random.key(0), 3 + 0.5 * jax.random.normal(jax.random.key(1), (50, 6))
    y = 7 * jax.random.normal(key, (2, 9, 6)) * jnp.arange(1, 10)[:, None]
    mask = jnp.arange(9) < jnp.array([9, 5])[:, None]
    size = lambda x: np.sqrt(np.square(np.asarray(x)).mean(-1))  # noqa: E731
    one = adapters.calibrate("embed_rms", y, mask, table)
    np.testing.assert_allclose(
        [np.sqrt(np.mean(size(one[i, :n]) ** 2)) for i, n in enumerate((9, 5))],
        float(adapters.rms(table)), rtol=1e-5,
    )  # fmt: skip
    # One factor keeps which tokens are large; one for each takes it away.
    np.testing.assert_allclose(one[0] / y[0], (one[0] / y[0])[0, 0], rtol=1e-4)
    each = adapters.calibrate("token_rms", y, mask, table)
    np.testing.assert_allclose(size(each), float(adapters.rms(table)), rtol=1e-4)
    moved = adapters.calibrate("distribution", y, mask, table)
    np.testing.assert_allclose(moved[1, :5].mean(0), table.mean(0), atol=1e-4)
    np.testing.assert_allclose(moved[1, :5].std(0), table.std(0), rtol=1e-3)
    # A text's own tokens alone count.
    other = adapters.calibrate("distribution", y.at[1, 5:].set(99.0), mask, table)
    np.testing.assert_allclose(other[1, :5], moved[1, :5], atol=1e-5)


def test_the_nearest_embedding_is_itself_and_an_anchor_goes_halfway():
    table = jax.random.normal(jax.random.key(1), (50, 6))
    y = 2 * table[jnp.array([[4, 9]])]
    np.testing.assert_allclose(adapters.nearest(y, table, 1), table[jnp.array([[4, 9]])], atol=1e-5)
    config = dataclasses.replace(shape().adapter, transform="anchor", offset=0.5)
    out = adapters.Adapter(config).apply({}, y, y, jnp.ones((1, 2), bool), table)
    np.testing.assert_allclose(out, 0.75 * y, atol=1e-5)


def test_colour_starts_at_the_statistics_of_training_texts(texts):
    model = Compressor(shape(adapter={"calibration": "colour"}), byte_reader().config)
    frozen = byte_reader().params
    params = model.init(jax.random.key(0), frozen, *texts)["params"]
    batch = {"context": texts[0], "context_mask": texts[1]}
    fitted = adapters.fit_colour(model, params, frozen, [batch])
    shown = model.apply({"params": fitted}, frozen, *texts)
    table = np.asarray(frozen["embed"])
    rows = np.asarray(shown.embeds)[np.asarray(shown.mask)]
    np.testing.assert_allclose(rows.mean(0), table.mean(0), atol=1e-4)
    np.testing.assert_allclose(rows.std(0), table.std(0), rtol=1e-2)


def test_the_vocabulary_s_directions_lose_nothing_at_full_width(texts):
    frozen, config = byte_reader().params, byte_reader().config
    width = config.hidden_size
    model = Compressor(shape(ratio=1.0, wire={"d_z": width, "fit": "vocabulary"}), config)
    params = model.init(jax.random.key(0), frozen, *texts)["params"]
    params = bottleneck.fit(model, params, frozen, [])
    shown = model.apply({"params": params}, frozen, *texts)
    expected = frozen["embed"][texts[0]]
    np.testing.assert_allclose(
        np.asarray(shown.embeds)[np.asarray(texts[1])], np.asarray(expected)[np.asarray(texts[1])],
        atol=1e-4,
    )  # fmt: skip


def test_rounded_latents_have_as_many_values_as_levels(texts):
    model = Compressor(shape(wire={"d_z": 6, "levels": 5}), byte_reader().config)
    frozen = byte_reader().params
    params = model.init(jax.random.key(0), frozen, *texts)["params"]
    batch = {"context": texts[0], "context_mask": texts[1]}
    params = bottleneck.fit(model, params, frozen, [batch], rows=4)
    wire = model.apply({"params": params}, frozen, *texts, method="compress")
    steps = np.asarray(wire.z / params["level_scale"])[np.asarray(wire.mask)] * 2
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert {-1, 0, 1} <= set(np.round(steps).ravel().astype(int)) <= {-2, -1, 0, 1, 2}


def test_levels_cost_their_logarithm():
    levels = shape(ratio=4.0, wire={"d_z": 6, "levels": 8})
    wire = types.SimpleNamespace(config=levels, width=6, backbone=byte_reader())
    assert suite.wire_cost(wire)["wire.bits_per_token"] == 6 * 3 / 4
    wire.config = shape(wire={"d_z": 6})
    assert "wire.bits_per_token" not in suite.wire_cost(wire)


def spent(**changes):
    """What 16 tokens cost, 4 tokens to a latent."""
    config, body, ids = shape(**changes), byte_reader(), np.ones((1, 16), int)
    module = Compressor(config, body.config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), body.params, ids, ids > 0)["params"]
    own = types.SimpleNamespace(
        config=config, backbone=body, separate=None, method=None,
        latents=Latents(module, shapes, body.params),
    )  # fmt: skip
    latents = 4 + sum(own.config.private_slots.values())
    message = types.SimpleNamespace(length=[16], latents=[latents], size=lambda _: (1, 1, 1))
    return cost.cost(own, message, ["a" * 16])


def test_a_reader_holds_every_entry_that_is_made_of_a_latent():
    one, four = spent(), spent(adapter={"entries": 4}, wire={"d_z": 4})
    assert one.text_kv_bytes == 4 * one.latent_kv_bytes == four.latent_kv_bytes
    assert "not key/value memory where it is read" in four.verdict()
    # The reader runs over four times as many, behind what makes them.
    assert four.latent_flops > four.text_flops > one.latent_flops and four.latents == 4
    readers = {"other": {"name": "tiny", "private": 2}}
    shared = spent(encoder={"slots": "memory"}, private=1, readers=readers)
    assert shared.latents == 7 and shared.latent_kv_bytes * 4 == one.latent_kv_bytes * 5


def test_only_an_encoder_that_runs_the_llm_pays_for_it():
    embedded, spelled = spent(), spent(encoder={"slots": "bytes", "byte_layers": 2})
    assert embedded.encode_flops < spelled.encode_flops
    assert embedded.encode_flops < spent().text_flops
    assert spent(encoder={"slots": "states"}).encode_flops >= spent().text_flops


def test_what_is_made_of_a_latent_is_near_tokens_of_its_part_of_the_span():
    """Two soft tokens of each shared latent, and two of the reader's own, which have no span."""
    config = shape(
        segment=8, encoder={"slots": "memory", "lora_rank": 2}, adapter={"entries": 2},
        wire={"d_z": 4}, private=1, readers={"other": {"name": "tiny", "private": 2}},
    )  # fmt: skip
    model, ids, body = Compressor(config, byte_reader().config), np.ones((1, 8), int), byte_reader()
    shapes = jax.eval_shape(model.init, jax.random.key(0), body.params, ids, ids > 0)["params"]
    draw = np.random.default_rng(0).standard_normal
    weights = jax.tree.map(lambda s: draw(s.shape).astype(np.float32), shapes)
    own = LatentWire(body, config, weights, PromptBuilder(body.tokenizer, PromptConfig()))
    found = look.nearest(own, "abcdef", k=3)
    assert [one.span for one in found] == ["ab", "cd", "ef", "", "", ""]
    assert all(len(one.nearest) == 3 for one in found)


def test_soft_tokens_that_are_the_span_means_have_no_error(texts):
    model = Compressor(shape(adapter={"entries": 2}, wire={"d_z": 4}), byte_reader().config)
    frozen = byte_reader().params
    text = frozen["embed"][texts[0]]
    target, there = regularise.stood_for(text, texts[1], 16, 8, 2)
    np.testing.assert_allclose(target[0, 3], text[0, 6:8].mean(0), atol=1e-6)
    np.testing.assert_allclose(target[1, 4], text[1, 8], atol=1e-6)
    assert there.sum(1).tolist() == [8, 5, 1]
    prefix = Prefix(None, target, there, None, texts[1].sum(1))
    lost, cosine = regularise.embedding_error(model, prefix, text, texts[1], frozen["embed"])
    assert float(lost.value) == pytest.approx(0, abs=1e-5) and float(cosine.value) > 0.9999
    away = prefix._replace(embeds=-target)
    _, cosine = regularise.embedding_error(model, away, text, texts[1], frozen["embed"])
    assert float(cosine.value) == pytest.approx(-1, abs=1e-3)
    run = lambda y: regularise.embedding_error(  # noqa: E731
        model, prefix._replace(embeds=y), text, texts[1], frozen["embed"]
    )[0].sum
    padded = jax.grad(run)(target * there[..., None] * 0.5)
    assert jnp.isfinite(padded).all() and float(jnp.abs(padded[0]).max()) > 0


def test_contrast_is_one_for_equal_texts_and_none_for_perpendicular_ones():
    model = Compressor(shape(wire={"d_z": 4}), byte_reader().config)
    z = jnp.eye(4)[:, None]
    wire = Wire(z, jnp.ones((4, 1), bool), jnp.zeros((4, 1), jnp.int32), jnp.ones(4, jnp.int32))
    texts = jnp.arange(8).reshape(4, 2)
    assert float(regularise.contrast(model, wire, texts).value) == pytest.approx(0, abs=1e-6)
    same = wire._replace(z=jnp.ones_like(z))
    assert float(regularise.contrast(model, same, texts).value) == pytest.approx(1, abs=1e-4)
    # Two questions on one passage have the latents of one text: nothing to push apart.
    pairs = same._replace(z=z[jnp.array([0, 0, 2, 2])])
    twice = texts[jnp.array([0, 0, 2, 2])]
    assert float(regularise.contrast(model, pairs, twice).value) == pytest.approx(0, abs=1e-6)
    assert float(regularise.contrast(model, same, twice[:1].repeat(4, 0)).value) == 0


def test_magnitude_is_the_squared_log_of_the_size():
    table = jax.random.normal(jax.random.key(0), (40, 6))
    y = jnp.broadcast_to(table[:1] / adapters.rms(table[:1]) * adapters.rms(table), (2, 3, 6))
    mask = jnp.arange(3) < jnp.array([3, 1])[:, None]
    found = regularise.magnitude(Prefix(None, y * np.e, mask, None, None), table)
    assert float(found.value) == pytest.approx(1, abs=1e-4) and float(found.count) == 4


def test_the_entropy_of_the_first_supervised_token_counts():
    body, frozen = byte_reader().decoder, byte_reader().params
    hidden = jnp.zeros((2, 3, byte_reader().config.hidden_size)).at[:, 1].set(5.0)
    supervised = jnp.array([[False, True, True], [True, True, False]])
    both = regularise.first_entropy(body, frozen, hidden, supervised)
    undecided = regularise.first_entropy(body, frozen, hidden[1:], supervised[1:])
    # A state of zeros says nothing: all tokens are equally likely.
    assert float(undecided.value) == pytest.approx(0, abs=1e-5)
    assert float(both.value) > 0 and float(both.count) == 2


def test_hidden_latents_are_a_share_of_the_real_ones():
    wire = Wire(jnp.zeros((64, 64, 1)), jnp.arange(64) < 48 * jnp.ones((64, 1)), None, None)
    kept = regularise.dropped(jax.random.key(0), wire, 0.85).mask
    assert not bool((kept & ~wire.mask).any())
    assert float(kept.sum() / wire.mask.sum()) == pytest.approx(0.85, abs=0.02)


def test_smoothed_targets_are_a_mixture(texts):
    reader = byte_reader()
    hidden = jax.random.normal(jax.random.key(0), (3, 16, reader.config.hidden_size))

    def loss(share, chunk=None):
        run = lambda h: token_cross_entropy(  # noqa: E731
            reader.decoder, reader.params, h, texts[0], chunk, share
        )[0].sum()
        return jax.value_and_grad(run)(hidden)

    logits = reader.decoder.apply({"params": reader.params}, hidden, method="unembed")
    even = -jax.nn.log_softmax(logits).mean(-1).sum()
    np.testing.assert_allclose(loss(0.1)[0], 0.9 * loss(0.0)[0] + 0.1 * even, rtol=1e-5)
    np.testing.assert_allclose(loss(0.1)[1], loss(0.1, 7)[1], atol=1e-6)
    assert float(jnp.abs(loss(0.1)[1] - loss(0.0)[1]).max()) > 0


def test_settings_that_came_later_do_not_change_who_wrote_a_wire():
    from latent_jax.core.config import to_dict

    plain, other = (as_first(to_dict(c)) for c in (ModelConfig(), shape(follow="text")))
    assert set(plain["adapter"]) == {"kind"} and set(plain["wire"]) == {"d_z"}
    assert "follow" not in plain and other["follow"] == "text"
    assert "refiner" not in plain["encoder"]
    tuned = shape(encoder={"refiner": 2}, wire={"d_z": 8})
    assert as_first(to_dict(tuned))["encoder"]["refiner"] == 2


@pytest.mark.parametrize(
    "model, named",
    [
        ({"encoder": {"slots": "embedded", "output": "kv"}}, "encoder.output=hidden"),
        ({"encoder": {"slots": "memory", "pooler": "attention"}}, "encoder.pooler=attention"),
        ({"ratio": 2.5, "encoder": {"pooler": "hierarchical"}}, "divides the ratio"),
        ({"wire": {"levels": 5}}, "with wire.d_z"),
        ({"wire": {"d_z": 4, "levels": 2}}, "use 3 or more"),
        ({"adapter": {"entries": 2}}, "wire.d_z"),
        ({"adapter": {"kind": "kv", "calibration": "colour"}}, "only adapter.kind=soft"),
        ({"encoder": {"refiner": 1}, "wire": {"d_z": 5}}, "even"),
    ],
)
def test_what_cannot_be_wired_is_refused(model, named):
    with pytest.raises(ConfigError, match=named):
        shape(**model)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"losses": {"magnitude": 0.1}}, "adapter.kind=soft"),
        ({"losses": {"corrupt": 0.3}, "data": {"mix": {"answer": 1}}}, "losses.corrupt"),
        ({"train": {"steps": 9}, "losses": {"answer": {"kind": "delay", "begin": 9}}},
         "losses.answer: stays 0 in all 9 steps"),
        ({"losses": {"label_smoothing": 0.1, "distil_logits": 1.0}, "data": {"mix": {"answer": 1}}},
         "label_smoothing"),
        ({"losses": {"keep": 0.5}, "model": {"encoder": {"slots": "heads"}}}, "no latents"),
        ({"losses": {"embeddings": 1.0}, "model": {**SOFT, "ratio": 4, "wire": {"d_z": 8},
          "adapter": {"kind": "soft", "entries": 3}}}, "no multiple"),
    ],
)  # fmt: skip
def test_terms_that_have_nothing_to_weigh_are_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        parse(LatentWireRun, {"system": "latentwire", **changes})
