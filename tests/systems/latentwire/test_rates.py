"""Rates that change over the steps, and what a distillation is restricted to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.substitution import substitution
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import losses
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.rates import Rates
from latent_jax.systems.latentwire.system import LatentWireSystem
from latent_jax.train.curriculum import ScheduleConfig, extremes, make_schedule
from latent_jax.train.step import rates_at

RUN = {
    "system": "latentwire",
    "model": {"segment": 16, "ratio": 4, "encoder": {"slots": "pooled", "lora_rank": 2}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 20, "questions": 20, "mix": {"reconstruct": 0.5, "answer": 0.5}},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 2},
}  # fmt: skip
KEEP = {"kind": "delay", "start": 1.0, "value": 0.01, "begin": 5}
CORRUPT = {"kind": "linear", "value": 0.9, "begin": 0, "steps": 10}


def opened(layers=2, **weights):
    config = parse(LatentWireRun, {**RUN, "losses": weights})
    system = LatentWireSystem(config, byte_reader(layers))
    batch = next(b for b in system.train_data("main", None) if "asked" not in b)
    batch = jax.tree.map(jnp.asarray, batch)
    return system, batch, system.init({"params": jax.random.key(1)}, batch)["params"]


def rebuilt(system, batch, params, step, train=True):
    """Loss of the reconstruction in a step's training, or as it is evaluated."""
    rngs = {"corrupt": jax.random.key(3)}
    found, _, _ = system.loss_terms(
        {"params": params}, system.frozen, batch, rngs, train, **rates_at(system, step)
    )
    return float(found["reconstruct"].value)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ({"kind": "linear", "start": 0.2, "value": 0.9, "steps": 7}, (0.2, 0.9)),
        ({"kind": "taper", "value": 0.9, "end": 0.3, "steps": 7, "start": 9.0}, (0.3, 0.9)),
        ({"kind": "staged", "start": 0.5, "stages": [{"value": 0.7}, {"begin": 4, "value": 0.6}]},
         (0.6, 0.7)),
        ({"kind": "staged", "start": 0.5, "stages": [{"begin": 2, "value": 0.7}]}, (0.5, 0.7)),
        ({"kind": "delay", "start": 0.1, "value": 0.4, "begin": 3}, (0.1, 0.4)),
    ],
)  # fmt: skip
def test_extremes_are_those_that_the_steps_reach(schedule, expected):
    config = parse(ScheduleConfig, schedule)
    reached = [float(make_schedule(config)(step)) for step in range(30)]
    assert extremes(config) == expected
    np.testing.assert_allclose((min(reached), max(reached)), expected, rtol=1e-6)


def test_a_constant_rate_is_a_number_and_asks_the_trainer_for_nothing():
    system, _, _ = opened(keep=0.85, corrupt=0.1)
    assert rates_at(system, 3) == {}
    assert Rates.of(system.config.losses) == (0.85, 0.1, 0.0, True, True, False)


def test_a_share_of_latents_is_hidden_once_its_time_has_come():
    system, batch, params = opened(keep=KEEP)
    evaluated = rebuilt(system, batch, params, 9, train=False)
    np.testing.assert_allclose(rebuilt(system, batch, params, 0), evaluated, rtol=1e-6)
    # Without latents every text is alike.
    hidden = rebuilt(system, batch, params, 5)
    assert abs(hidden - evaluated) > 1e-4
    other = {**batch, "context": jnp.roll(batch["context"], 1, axis=0)}
    np.testing.assert_allclose(rebuilt(system, other, params, 5), hidden, rtol=1e-5)


def test_inputs_are_corrupted_more_and_more():
    system, batch, params = opened(corrupt=CORRUPT)
    fixed, _, _ = opened(corrupt=0.9)
    clean = rebuilt(system, batch, params, 0)
    np.testing.assert_allclose(clean, rebuilt(system, batch, params, 0, train=False), rtol=1e-6)
    assert rebuilt(system, batch, params, 10) != pytest.approx(clean, abs=1e-4)
    # At its end the schedule is the constant, on the same random stream.
    np.testing.assert_allclose(
        rebuilt(system, batch, params, 10), rebuilt(fixed, batch, params, 0), rtol=1e-6
    )


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"keep": {"kind": "linear", "start": 0.0, "steps": 3}}, "keep goes from 0 to 1 .* > 0"),
        ({"corrupt": {"value": 1.0}}, "corrupt goes from 1 to 1 .* allowed: 0 to < 1"),
        ({"keep": {"value": 0.5, "gate": {"metric": "answer"}}}, "a gate or auto_scale is of"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"distil_first": 2}, "distil_first is of distil_logits, which has no weight"),
        ({"distil_layers": 1, "distil_states": 1.0}, "distil_layers = 1: the first layer's keys"),
        ({"distil_layers": 2, "distil_logits": 1.0}, "distil_layers is of distil_states"),
    ],
)
def test_rates_out_of_range_and_idle_settings_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        parse(LatentWireRun, {**RUN, "losses": weights})


def test_a_softened_divergence_is_that_of_softened_distributions():
    reader = byte_reader()
    full, given = jax.random.normal(jax.random.key(0), (2, 2, 3, reader.config.hidden_size))
    targets = jnp.ones((2, 3), jnp.int32)
    run = lambda t: substitution(reader.decoder, reader.params, full, given, targets, None, t)  # noqa: E731
    logits = [
        reader.decoder.apply({"params": reader.params}, x, method="unembed") for x in (full, given)
    ]
    for t in (1.0, 3.0):
        p, q = (jax.nn.log_softmax(x / t) for x in logits)
        wanted = t**2 * (jnp.exp(p) * (p - q)).sum(-1)
        np.testing.assert_allclose(run(t).kl, wanted, rtol=1e-4)
    np.testing.assert_array_equal(run(3.0).nll, run(1.0).nll)


def test_distilling_the_first_tokens_leaves_the_later_ones_alone():
    system, _, params = opened(distil_logits=1.0)
    first, _, _ = opened(distil_logits=1.0, distil_first=1)
    batch = next(b for b in system.train_data("main", None) if "asked" in b)
    batch = jax.tree.map(jnp.asarray, batch)

    def terms(s, batch):
        return s.loss_terms({"params": params}, s.frozen, batch, {}, False)[0]

    every, one = terms(system, batch), terms(first, batch)
    rows, tokens = one["distil_logits"].count, batch["supervised"].sum()
    assert rows == 2 and every["distil_logits"].count == tokens > rows
    assert 0 < one["distil_logits"].sum < every["distil_logits"].sum
    # With nothing but first tokens supervised, all of them are the first ones.
    only = batch["supervised"] & (jnp.cumsum(batch["supervised"], axis=1) == 1)
    alone = terms(system, {**batch, "supervised": only})["distil_logits"]
    np.testing.assert_allclose(one["distil_logits"].sum, alone.sum, rtol=1e-5)
    np.testing.assert_allclose(one["answer"].sum, every["answer"].sum, rtol=1e-6)


def test_states_are_compared_in_the_first_layers_alone(monkeypatch):
    system, _, params = opened(3, distil_states=1.0, distil_layers=2)
    batch = next(b for b in system.train_data("main", None) if "asked" in b)
    batch = jax.tree.map(jnp.asarray, batch)
    own, seen, layers = losses.unexplained, [], system.backbone.config.num_layers

    def watched(states, target, mask):
        seen.append((states, target))
        return own(states, target, mask)

    def loss(params):
        found = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
        return found["distil_states"].value

    monkeypatch.setattr(losses, "unexplained", watched)
    loss(params)
    states, target = seen[0]
    assert states.shape[2] == target.shape[2] == 4 < 2 * layers
    # Why one layer would teach nothing: what it reads is the tokens alone.
    np.testing.assert_allclose(states[:, :, :2], target[:, :, :2], atol=1e-5)
    assert float(jnp.abs(states[:, :, 2:] - target[:, :, 2:]).max()) > 1e-3
    monkeypatch.undo()
    pool = jax.grad(loss)(params)["pool"]["v"]
    # The second layer's states come of what the first layer reads of the latents.
    assert float(jnp.abs(pool[0]).max()) > 0 and float(jnp.abs(pool[1:]).max()) == 0
