"""Scheduled sampling: what gives way to the reader's own, what is learned, what it costs at 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import losses, scheduled_sampling
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.system import LatentWireSystem
from latent_jax.train.step import rates_at

RUN = {
    "system": "latentwire",
    "model": {"segment": 16, "ratio": 4, "encoder": {"slots": "pooled"}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 20, "questions": 20, "recall": 16, "cue": 2, "continuation": 8,
             "mix": {"reconstruct": 0.4, "answer": 0.4, "recall": 0.2}},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 2},
}  # fmt: skip
RAMP = {"kind": "linear", "value": 1.0, "begin": 0, "steps": 4}
KEY = {"corrupt": jax.random.key(3)}


def opened(**weights):
    return LatentWireSystem(parse(LatentWireRun, {**RUN, "losses": weights}), byte_reader(2))


@pytest.fixture(scope="module")
def system():
    return opened(sampled=RAMP)


@pytest.fixture(scope="module")
def batches(system):
    stream, made = system.train_data("main", None), {}
    while len(made) < 3:
        batch = next(stream)
        made["asked" if "asked" in batch else "recalled" if "recalled" in batch else "text"] = batch
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def params(system, batches):
    return system.init({"params": jax.random.key(1)}, batches["text"])["params"]


def fed(monkeypatch, system, params, batch, step, train=True):
    """What the reader is fed in each pass, and its states."""
    seen, own = [], losses.forced

    def watched(body, reader, prefix, lead, inputs, *rest):
        out = own(body, reader, prefix, lead, inputs, *rest)
        seen.append((inputs, out.hidden))
        return out

    monkeypatch.setattr(losses, "forced", watched)
    rates = rates_at(system, step)
    with jax.disable_jit(False):
        found = system.loss_terms({"params": params}, system.frozen, batch, KEY, train, **rates)
    monkeypatch.undo()
    return seen, found[0]


def test_only_what_may_is_swapped_and_at_0_nothing_is_guessed():
    gold = jnp.arange(2000).reshape(2, 1000)
    may, calls = jnp.arange(1000) % 2 == 0, []

    def guess():
        jax.debug.callback(lambda: calls.append(1))
        return gold + 5000

    def run(rate):
        out = jax.jit(scheduled_sampling.own_inputs, static_argnums=4)(
            jax.random.key(0), rate, gold, may & jnp.ones_like(gold, bool), guess
        )
        jax.effects_barrier()
        return np.asarray(out) != np.asarray(gold)

    assert not run(0.0).any() and not calls
    assert (run(1.0) == np.asarray(may)).all() and calls
    share = run(0.25)
    assert not share[:, 1::2].any() and 0.2 < share[:, ::2].mean() < 0.3


@pytest.mark.parametrize("kind", ["text", "asked"])
def test_the_second_pass_is_fed_what_the_first_one_says(monkeypatch, system, params, batches, kind):
    batch = batches[kind]
    # Eager, the branch that is taken is the only one that runs.
    monkeypatch.setattr(jax.lax, "cond", lambda on, yes, no: yes() if bool(on) else no())
    seen, found = fed(monkeypatch, system, params, batch, 9)
    (first, states), (second, own) = seen
    gold, supervised = batch["inputs"], np.asarray(batch["supervised"])
    np.testing.assert_array_equal(first, gold)
    logits = system.body.apply({"params": system.frozen["reader"]}, states, method="unembed")
    wanted = np.where(supervised, np.asarray(logits).argmax(-1), gold)
    np.testing.assert_array_equal(second, wanted)
    assert (np.asarray(second) != np.asarray(gold)).any()
    # Scored is the gold token, behind that history.
    nll, _ = token_cross_entropy(system.body, system.frozen["reader"], own, gold)
    term = found["answer" if kind == "asked" else "reconstruct"]
    np.testing.assert_allclose(term.sum, (nll * supervised).sum(), rtol=1e-5)


def test_at_0_the_loss_is_the_plain_one_and_a_constant_0_is_no_second_pass(
    monkeypatch, system, params, batches
):
    plain = opened()

    def value(system, batch, step):
        @jax.jit
        def run(params, rates):
            found = system.loss_terms({"params": params}, system.frozen, batch, KEY, True, **rates)
            return {k: v.sum for k, v in found[0].items()}

        return jax.tree.map(float, run(params, rates_at(system, step)))

    for kind in ("text", "asked"):
        assert value(system, batches[kind], 0) == value(plain, batches[kind], 0)
        moved = value(system, batches[kind], 9)
        assert moved != value(plain, batches[kind], 9)
    assert len(fed(monkeypatch, plain, params, batches["text"], 9)[0]) == 1
    # Neither an evaluation nor another task is touched.
    assert len(fed(monkeypatch, system, params, batches["text"], 9, train=False)[0]) == 1
    (_, (second, _)), _ = fed(monkeypatch, system, params, batches["recalled"], 9)
    np.testing.assert_array_equal(second, batches["recalled"]["inputs"])


def test_nothing_is_learned_through_the_first_pass(monkeypatch, system, params, batches):
    batch = batches["text"]

    def gradient(system, rates):
        def loss(params):
            found = system.loss_terms({"params": params}, system.frozen, batch, KEY, True, **rates)
            return found[0]["reconstruct"].value

        return jax.jit(jax.grad(loss))(params)["pool"]

    ours = gradient(system, rates_at(system, 9))
    # The same inputs, handed in as constants.
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "cond", lambda on, yes, no: yes() if bool(on) else no())
        inputs = fed(patch, system, params, batch, 9)[0][1][0]
    monkeypatch.setattr(scheduled_sampling, "own_inputs", lambda *_: inputs)
    wanted = gradient(system, rates_at(system, 9))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), ours, wanted)


@pytest.mark.parametrize(
    "losses, mix, message",
    [
        ({"sampled": 0.5}, {"continue": 1.0}, "give data.mix a share of reconstruct or answer"),
        ({"sampled": {"kind": "linear", "value": 1.5, "steps": 3}}, {"answer": 1.0}, "0 to 1.5"),
        ({"sampled": {"kind": "delay", "value": 0.5, "begin": 9}}, {"answer": 1.0}, "stays 0 in"),
        ({"sampled": 2.0}, {"answer": 1.0}, "sampled = 2"),
    ],
)
def test_bad_rates_are_refused(losses, mix, message):
    run = {**RUN, "losses": losses, "data": {**RUN["data"], "mix": mix}}
    with pytest.raises(ConfigError, match=message):
        parse(LatentWireRun, run)
