"""Latents of the text's own entries: all of them are the text, fewer are shared out unevenly."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader as reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.ops.attention import MASKED
from latent_jax.systems.latentwire import asking, baselines, heads, look
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.beside_text import beside_text
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import (
    TASKS,
    AdapterConfig,
    EncoderConfig,
    LatentWireRun,
    ModelConfig,
    ReaderConfig,
    WireConfig,
)
from latent_jax.systems.latentwire.cost import cost
from latent_jax.systems.latentwire.given import Asked, prefix_to_given
from latent_jax.systems.latentwire.losses import raw_text
from latent_jax.systems.latentwire.model import Compressor, num_latents
from latent_jax.systems.latentwire.scoring import score_answers
from latent_jax.systems.latentwire.system import LatentWireSystem
from latent_jax.systems.latentwire.telling import given_of

TEXTS = ["abcdefghijklmnopqr", "xyz12345"]


@functools.cache
def wire():
    return LatentWire.training_free(reader(), "kv_heads", ratio=3, segment=16)


def opened(own, z):
    """What the reader is given of compressed texts."""
    return given_of(reader().decoder, reader().params, own._opened(z)[1], z.wire)


def hidden(given, ids=(5, 6, 7)):
    body, frozen, b = reader().decoder, reader().params, given.start.shape[0]
    x = body.apply({"params": frozen}, jnp.tile(jnp.array([ids]), (b, 1)), method="embed")
    where = given.start[:, None] + jnp.arange(len(ids))
    return body.apply({"params": frozen}, x, where, prefix=given.kv).hidden


def test_with_room_for_nearly_all_it_is_nearly_the_text():
    """A key, a value and a weight take a number more than a key and a value."""
    own = wire()
    z = own.compress([TEXTS[1], TEXTS[1][:5]], ratio=1)
    assert z.latents == [8, 5]
    got = opened(own, z)
    ids, mask = own._padded([TEXTS[1], TEXTS[1][:5]])
    none = np.zeros((2, 0), np.int32), np.zeros((2, 0), bool)
    text = baselines.build(
        "full_text", reader().decoder, reader().params, jnp.asarray(ids), jnp.asarray(mask), *none,
        np.arange(2, dtype=np.int32), sink=jnp.int32(own.sink),
    )  # fmt: skip
    np.testing.assert_array_equal(got.start, text.start)
    shown = np.asarray(got.kv.bias)[:, :, 1:] > MASKED
    np.testing.assert_array_equal(shown.sum((0, 2, 3)), [8 * 64 // 17, 5 * 64 // 17])
    near = np.linalg.norm(hidden(got) - hidden(text)) / np.linalg.norm(hidden(text))
    half = own.compress([TEXTS[1], TEXTS[1][:5]], ratio=2)
    far = hidden(opened(own, half)) - hidden(text)
    assert near < 0.25 and near < np.linalg.norm(far) / np.linalg.norm(hidden(text))


def test_heads_differ_and_the_budget_is_kept():
    z = wire().compress(TEXTS[0][:16], ratio=4)
    given = opened(wire(), z)
    shown = np.asarray(given.kv.bias)[:, 0, 1:] > MASKED  # behind the sink
    each = shown.sum(1)
    assert each.sum() == z.latents[0] * 64 // 17 == 15
    assert each.min() >= 1 and len(np.unique(each)) > 1


def capped(most):
    config = dataclasses.replace(wire().config, ratio=4.0)
    encoder = dataclasses.replace(config.encoder, places=most)
    # One head is worth more than the others.
    profile = wire().params["profile"] * jnp.asarray([[9.0, 1.0], [1.0, 1.0]])[..., None]
    return dataclasses.replace(
        wire(), config=dataclasses.replace(config, encoder=encoder),
        params={**wire().params, "profile": profile},
    )  # fmt: skip


def test_a_head_may_keep_no_more_than_it_has_places():
    text, own, free = TEXTS[0][:16], capped(4), capped(None)
    sent = own.compress(text)
    given, before = opened(own, sent), opened(free, free.compress(text))
    shown, freely = (
        (np.asarray(x.kv.bias)[:, 0, 1:] > MASKED).sum(1) for x in (given, before)
    )
    assert freely.max() > 4 == shown.max()
    assert shown.sum() == freely.sum()  # what one head may not keep others do
    assert given.kv.k.shape[2] == 1 + 4 < before.kv.k.shape[2]
    spent = cost(own, sent, [text], "fp32")
    assert spent.latent_kv_bytes * 4 == spent.text_kv_bytes
    # Of another layout, so nobody else's.
    assert own.origin != free.origin
    with pytest.raises(ConfigError, match="encoder.places=5: heads keep 5.3"):
        parse(ModelConfig, {"ratio": 3.0, "segment": 16, "encoder": {
            "slots": "heads", "places": 5}})  # fmt: skip
    with pytest.raises(ConfigError, match="is of encoder.slots=heads"):
        parse(ModelConfig, {"encoder": {"slots": "pooled", "places": 5}})


def test_segments_stand_where_they_stood():
    """Two segments, read together, are the two texts behind one another, each encoded alone."""
    own, text = wire(), TEXTS[0][:16] + TEXTS[1]
    z = own.compress(text, ratio=2)
    assert z.latents == [num_latents(16, 2) + num_latents(8, 2)]
    given = opened(own, z)
    assert int(given.start[0]) == 24
    # Moved back by a segment, the second is what it is alone.
    alone = own.compress(TEXTS[1], ratio=2)
    single = opened(own, alone)
    v, k = (np.asarray(x)[:, 0, 17:25] for x in (given.kv.v, given.kv.k))
    np.testing.assert_allclose(v, np.asarray(single.kv.v)[:, 0, 1:9], atol=1e-5)
    assert np.abs(k - np.asarray(single.kv.k)[:, 0, 1:9]).max() > 0.1


@pytest.mark.parametrize("form,far", [("fp32", 1e-6), ("int8", 0.05)])
def test_another_process_reads_it(form, far):
    own = wire()
    z = own.compress(TEXTS)
    back = own.unpack(z.pack(form))
    ours, theirs = (hidden(opened(own, m)) for m in (z, back))
    assert float(jnp.abs(ours - theirs).max() / jnp.abs(ours).max()) < far


def test_what_it_costs_and_how_it_is_looked_at():
    z = wire().compress(TEXTS[0][:16])
    spent = cost(wire(), z, [TEXTS[0][:16]], "fp32")
    assert spent.encode_flops > 2 * spent.text_flops  # read twice, the second time behind itself
    assert spent.text_kv_bytes == spent.latent_kv_bytes  # padded where it is read
    assert spent.payload == spent.text_kv_bytes * 6 // 16
    assert "not key/value memory where it is read; not bytes" in spent.verdict()
    shown = wire().latents.module.informative(z.wire)
    assert shown.shape == (1, 6, wire().width)
    # The first layer keeps some of the text's entries: each is the token that it was.
    found = look.nearest(wire(), TEXTS[0][:8], k=1)
    assert 0 < len(found) <= 8 and {one.span for one in found} <= set(TEXTS[0][:8])
    ids, mask = wire()._padded([TEXTS[0][:16]])
    assert beside_text(wire(), z.wire, jnp.asarray(ids), jnp.asarray(mask)) == {}


HEADS = EncoderConfig(slots="heads")


@pytest.mark.parametrize("options,line", [
    ({"wire": WireConfig(d_z=8)}, "encoder.slots=heads sends keys and values"),
    ({"adapter": AdapterConfig("soft"), "wire": WireConfig(d_z=8)}, "adapter.kind=kv"),
    ({"readers": {"b": ReaderConfig("tiny")}}, "no adapter of model.readers could read"),
    ({"private": 2}, "private latents"),
])  # fmt: skip
def test_what_it_cannot_be_is_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        ModelConfig(encoder=HEADS, **options).validate()
    with pytest.raises(ConfigError, match="set it to 0"):
        ModelConfig(rebuild_entries=4).validate()
    with pytest.raises(ConfigError, match="made of keys and values"):
        EncoderConfig(slots="heads", output="hidden").validate()


def test_softened_weights_are_the_budget_and_teach_every_head():
    own, ids = wire(), jnp.arange(2, 14)[None].repeat(2, 0)
    mask = jnp.arange(12)[None] < jnp.array([[12], [7]])
    factor = 0.3 * jax.random.normal(jax.random.key(1), (2, 2))

    def weights(factor):
        kv = heads.soften(
            reader().decoder, reader().params, factor, ids, mask, 3.0, jnp.int32(own.sink)
        )
        return jnp.exp(kv.bias), kv

    got, kv = weights(factor)
    np.testing.assert_allclose(got.sum((0, 2, 3)), np.array([4, 3]) * 64 // 17, rtol=1e-3)
    assert (np.asarray(got)[:, 1, 7:] == 0).all()
    # What one head takes, the others lose: the sum has no gradient, each part has.
    total = jax.grad(lambda f: weights(f)[0].sum())(factor)
    np.testing.assert_allclose(total, 0, atol=1e-3)
    part = np.asarray(jax.grad(lambda f: weights(f)[0][0, :, :, 0].sum())(factor))
    assert part[0, 0] > 0 and (part.ravel()[1:] < 0).all()
    # By hand: a head's factor moved a little.
    step = 1e-2
    moved = factor.at[0, 0].add(step)
    hand = (weights(moved)[0][0, :, :, 0].sum() - got[0, :, :, 0].sum()) / step
    np.testing.assert_allclose(part[0, 0], hand, rtol=0.05)


def test_a_trained_factor_becomes_part_of_the_profile():
    shape = ModelConfig(ratio=3, segment=16, encoder=HEADS), reader().config, wire().sink
    factor = jnp.array([[1.5, -1.0], [0.0, 0.5]])
    ids, mask = wire()._padded(TEXTS)
    base = Compressor(*shape).init(jax.random.key(0), reader().params, ids, mask)["params"]
    params = {**base, **wire().params, "factor": factor}
    folded = heads.folded(params)
    assert float(jnp.abs(folded["factor"]).max()) == 0

    def compressed(params):
        latents = Latents(Compressor(*shape), params, reader().params)
        made = latents.compress(jnp.asarray(ids), jnp.asarray(mask))
        return made.z, latents.prefix(made).kv.bias

    for ours, theirs in zip(compressed(params), compressed(folded), strict=True):
        np.testing.assert_allclose(ours, theirs)
    kept = compressed(folded)[1] > MASKED
    assert kept[0, :, :, 0].sum() > (compressed({**params, "factor": 0 * factor})[1] > MASKED)[
        0, :, :, 0
    ].sum()
    assert heads.folded({"lora": 1}) == {"lora": 1}



def asked_model(entries=5):
    config = ModelConfig(ratio=3, segment=16, encoder=HEADS, rebuild_entries=entries)
    return Compressor(config, reader().config, wire().sink)


def asked_params(model):
    ids, mask = map(jnp.asarray, wire()._padded(TEXTS))
    params = model.init(jax.random.key(3), reader().params, ids, mask)["params"]
    return {**params, **wire().params}


def test_what_asks_for_a_text_begins_as_words_behind_it():
    model, tokenizer = asked_model(len(asking.WORDS)), reader().tokenizer
    ids, mask = map(jnp.asarray, wire()._padded([TEXTS[1]]))
    params = asked_params(model)
    batch = {"context": ids, "context_mask": mask}
    params |= asking.start(model, params, reader().params, tokenizer, batch)
    latents = Latents(model, params, reader().params)
    text = raw_text(reader().decoder, reader().params, ids, mask, model.sink)
    given = prefix_to_given(reader().decoder, reader().params, text)
    told = baselines.instructed(latents, given, "reconstruct")
    words = tokenizer.encode(asking.WORDS)
    np.testing.assert_array_equal(told.start, given.start + len(words))
    np.testing.assert_allclose(hidden(told), hidden(given, (*words, 5, 6, 7))[:, -3:], atol=1e-4)
    sink = reader().params["embed"][model.sink]
    np.testing.assert_allclose(latents.task("reconstruct", 1)[0, 0], sink)
    assert baselines.instructed(latents, given, "answer").kv.k.shape == given.kv.k.shape
    assert baselines.instructed(latents, given, None).kv.k.shape == given.kv.k.shape


def test_only_rows_that_are_to_be_rebuilt_are_asked_to():
    model = asked_model()
    params = asked_params(model)
    ids, mask = map(jnp.asarray, wire()._padded(TEXTS))
    apply = functools.partial(model.apply, {"params": params})
    prefix = apply(apply(reader().params, ids, mask, method="compress"), method="prefix")
    task = jnp.array([TASKS.index("reconstruct"), TASKS.index("continue")])
    told = apply(prefix, task, method="instructed")
    np.testing.assert_array_equal(told.start - prefix.start, [5, 0])
    plain, asked = (
        hidden(prefix_to_given(reader().decoder, reader().params, p)) for p in (prefix, told)
    )
    np.testing.assert_allclose(plain[1], asked[1], atol=1e-5)
    assert float(jnp.abs(plain[0] - asked[0]).max()) > 1e-3


def test_rebuilding_is_learned_from_the_entries_that_are_kept():
    """The prompt has the gradient; what is kept, and how questions are asked, stay as they are."""
    run = parse(LatentWireRun, {
        "system": "latentwire",
        "model": {"segment": 16, "ratio": 3, "rebuild_entries": 4, "prompt_tokens": 2,
                  "encoder": {"slots": "heads"}},
        "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 16, "segments": 40,
                 "mix": {"reconstruct": 1}},
        "eval": {"segments": 2, "quick_segments": 2, "continuations": 2},
        "train": {"steps": 2, "batch_size": 2},
    })  # fmt: skip
    system = LatentWireSystem(run, reader())
    batch = jax.tree.map(jnp.asarray, next(system.train_data("main", None)))
    params = system.init({"params": jax.random.key(1)}, batch)["params"]

    def loss(params):
        found, _, _ = system.loss_terms({"params": params}, system.frozen, batch, {}, False)
        return found["reconstruct"].sum / found["reconstruct"].count

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    size = {k: float(jnp.abs(g).sum()) for k, g in gradient.items()}
    assert size.pop("asking") > 0 and size.pop("tasks") > 0
    assert set(size.values()) == {0.0}
    labels = system.param_labels(params)
    assert labels["asking"] == "memory" and labels["profile"] == "frozen"
    # By hand: the wire as it is sent, and the reader behind it.
    latents = Latents(system.model, params, reader().params)
    made = baselines.encode(latents, batch["context"], batch["context_mask"])
    given = baselines.latent_given(
        "latent", reader().decoder, reader().params, latents, made, np.arange(2, dtype=np.int32),
        jax.random.key(0),
    )  # fmt: skip
    given = baselines.instructed(latents, given, "reconstruct")
    none = jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0), bool)
    asked = Asked(given, *none, latents.task("reconstruct", 2))
    forced = score_answers(
        reader().decoder, reader().params, asked, batch["inputs"], batch["inputs_mask"]
    )
    np.testing.assert_allclose(value, forced["nll"].sum() / forced["count"].sum(), rtol=1e-4)
    held = system.wire({"params": params}, system.frozen)
    other = dataclasses.replace(held, params={**held.params, "asking": 0 * params["asking"]})
    assert held.origin == other.origin  # wires do not depend on how they are read
    windows, length = system.windows()
    assert windows.shape == (2, 16 + 32) and length == 16
