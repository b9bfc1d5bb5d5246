"""Where entries stand: damping against quadrature, numbered entries, a nearer far end."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.backbones.decoder import inverse_frequencies
from latent_jax.backbones.sink import sink_token
from latent_jax.core.errors import ConfigError
from latent_jax.ops import rope
from latent_jax.run import resolve
from latent_jax.systems.megacontext.consistency import Checked
from latent_jax.systems.megacontext.counterfactual import Counterfactuals
from latent_jax.systems.megacontext.gist import GistNet, Gists, damped
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig, PositionConfig
from latent_jax.systems.megacontext.positions import Placement, damping
from latent_jax.systems.megacontext.recovery import Recovery
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig

LAYOUT = Layout(block=8, branching=4, slots=(2, 4), protected=1)
MODEL = ModelConfig(layout=LAYOUT, gist=GistConfig(reads=2, window=4))
NODES = [(2, 0), (1, 4), (0, 5), (1, 6)]
BASE = backbones.outline("tiny").config


def having(**positions):
    return dataclasses.replace(MODEL, positions=PositionConfig(**positions))


@pytest.fixture(scope="module")
def base():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def params(base, untrained):
    return untrained(base, MODEL)


@pytest.fixture(scope="module")
def store(base, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("positions") / "s"
    ids = np.random.default_rng(0).integers(10, base.config.vocab_size, 131)
    with Memory.open(path, base, MODEL, params, "x", writable=True) as memory:
        memory.tree.append(ids)
        memory.build()
    return path


@pytest.fixture
def memory(store, base, params):
    """The same store by differing positions: they belong to the reading."""
    opened = []

    def make(**positions):
        opened.append(Memory.open(store, base, having(**positions), params, "x"))
        return opened[-1]

    yield make
    for one in opened:
        one.tree.close()


@pytest.mark.parametrize("level", [1, 2])
def test_damping_is_the_expectation_of_the_rotation(level):
    """Gauss-Hermite quadrature over the places of a slot's stretch, its centre at 20."""
    width = 4.0 if level == 1 else 8.0
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    places = 20 + np.sqrt((width**2 - 1) / 12) * points
    key = jax.random.normal(jax.random.key(0), (1, 1, 1, BASE.head_dim))
    waves = inverse_frequencies(BASE)
    turned = [rope.rotate(key, jnp.full((1, 1), at), waves) for at in places]
    mean = sum(w * np.asarray(x) for w, x in zip(weights / weights.sum(), turned, strict=True))
    factor = damping(MODEL, BASE, level)
    found = rope.rotate(key * factor[0], jnp.full((1, 1), 20.0), waves)
    np.testing.assert_allclose(found, mean, atol=1e-5)
    assert np.abs(np.asarray(found - rope.rotate(key, jnp.full((1, 1), 20.0), waves))).max() > 0.1


def test_what_is_wider_or_turns_faster_is_damped_more():
    one, two = (damping(MODEL, BASE, level)[0] for level in (1, 2))
    half = BASE.head_dim // 2
    np.testing.assert_array_equal(one[:half], one[half:])  # both numbers of a plane alike
    assert (np.diff(one[:half]) > 0).all() and (two < one).all() and one.min() > 0
    # The width of one token says all; the exact mean over even places is near for slow planes.
    layout = dataclasses.replace(LAYOUT, slots=(7,))
    assert damping(ModelConfig(layout=layout), BASE, 1).min() > 0.97
    slow = inverse_frequencies(BASE)[half // 2]
    exact = np.mean(np.cos(slow * (np.arange(4) - 1.5)))
    assert one[half // 2] == pytest.approx(exact, rel=1e-4)


def test_off_nothing_is_damped():
    some = Gists(*jnp.ones((2, BASE.num_layers, 1, 2, BASE.num_kv_heads, BASE.head_dim)))
    assert damped(MODEL, BASE, some, 1) is some
    on = having(damped=True)
    assert damped(on, BASE, some, 0) is some  # raw tokens are points
    found = damped(on, BASE, some, 1)
    np.testing.assert_allclose(found.k[0, 0, 1, 0], damping(on, BASE, 1)[0])
    np.testing.assert_array_equal(found.v, some.v)


def test_entries_are_numbered_in_the_order_of_the_text():
    one = Placement(having(kind="ordinal"), BASE)
    assert one.rotary(np.array([40, 3, 900, 33]), 1000).tolist() == [2, 0, 3, 1]
    assert one.first(1000, 4) == 4 and one.rotary(np.zeros(0, int), 8).tolist() == []


def test_text_may_stand_together_from_nearer_on():
    one = Placement(having(far=20), BASE)
    assert one.rotary(np.array([3, 36, 40, 55]), 56).tolist() == [0, 0, 4, 19]
    assert one.first(56, 4) == 20 and one.first(12, 4) == 12
    assert Placement(MODEL, BASE).far == BASE.max_position * 7 // 8
    with pytest.raises(ConfigError, match="use at most"):
        Placement(having(far=BASE.max_position), BASE)


@pytest.mark.parametrize("kind", [{"kind": "ordinal"}, {"far": 20}, {"damped": True}])
def test_contexts_are_read_so(memory, kind):
    plain, other = memory(), memory(**kind)
    ids = plain.tree.tokens(56, 80)
    one, two = (m.gather(NODES, 56) for m in (plain, other))
    lost = [m.losses([x], ids, 56, 16, 24)[0] for m, x in ((plain, one), (other, two))]
    assert abs(lost[0] - lost[1]) > 1e-4
    np.testing.assert_array_equal(one.held["v"], two.held["v"])
    changed = np.abs(one.held["k"] - two.held["k"]).max((0, 2, 3)) > 0
    assert changed.tolist() == [("damped" in kind)] * 6 + [False] * 8 + [("damped" in kind)] * 2
    assert (one.positions.tolist() == two.positions.tolist()) == ("damped" in kind)
    # Behind an edited context it says what it says behind one that is gathered.
    asked = plain.tree.tokens(80, 90)
    answer = Runtime(other, RuntimeConfig(64, "recency")).generate(asked, 3)
    start = 120
    live = np.concatenate([other.tree.tokens(start, 131), asked])
    again = other.continued(other.gather(answer.nodes, start), live, start, 64, 3)
    assert answer.text == again
    assert other.checked.entries > 60 and not other.checked.inconsistent


def test_raw_text_is_numbered_as_it_stood(memory):
    """Where nothing is left out, ordinal positions are the original ones."""
    plain, other = memory(), memory(kind="ordinal")
    ids, raw = plain.tree.tokens(56, 80), [(0, i) for i in range(7)]
    lost = [m.losses([m.gather(raw, 56)], ids, 56, 16, 56)[0] for m in (plain, other)]
    assert lost[0] == lost[1]
    wrong = other.gather(raw, 56)
    wrong = wrong._replace(positions=wrong.positions[::-1])
    other.losses([wrong], ids, 56, 16, 56)
    assert other.checked == Checked(112, 56)
    with pytest.raises(ConfigError, match="entries that stay where they are"):
        Counterfactuals(other, 64)


@pytest.mark.parametrize("kind", [{"kind": "ordinal"}, {"far": 20}, {"damped": True}])
def test_recovery_is_measured_so(base, params, kind):
    overrides = {"model.gist.window": 4, "eval.batch_size": 2, "eval.horizon": 1}
    more = {f"model.positions.{name}": x for name, x in kind.items()}
    lost = []
    rows = np.random.default_rng(0).integers(10, 1000, (2, 72))
    for extra in ({}, more):
        config = resolve("megacontext/tiny", overrides | extra)
        gists = GistNet(config.model, base.config)
        one = Recovery(base.decoder, gists, sink_token(base.tokenizer), config, 1, 7)
        lost.append(one.losses({"gist": params}, base.params, rows, ["windowed", "gist"]))
        assert one.checked == Checked(56 + 14, 0)
    assert (np.abs(lost[0]["gist"] - lost[1]["gist"]) > 1e-4).all()
    same = np.allclose(lost[0]["windowed"], lost[1]["windowed"], atol=1e-5)
    assert same == ("far" not in kind)
