"""Entries stand where their text did, and a break of that is seen wherever they are read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.run import resolve
from latent_jax.systems.megacontext import positions
from latent_jax.systems.megacontext.comparison import nll_at_h
from latent_jax.systems.megacontext.consistency import Checked, inconsistent
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.recovery import Recovery
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig

LAYOUT = Layout(block=8, branching=4, slots=(2, 4), protected=1)
MODEL = ModelConfig(layout=LAYOUT, gist=GistConfig(reads=2, window=4))
NODES = [(2, 0), (1, 4), (0, 5), (1, 6)]


@pytest.fixture(scope="module")
def base():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def params(base, untrained):
    return untrained(base, MODEL)


@pytest.fixture
def memory(base, params, tmp_path):
    with Memory.open(tmp_path / "s", base, MODEL, params, "x", writable=True) as memory:
        memory.tree.append(np.random.default_rng(0).integers(10, base.config.vocab_size, 131))
        memory.build()
        yield memory


def wrong(at, cursor=56, far=400, model=MODEL, nodes=NODES, first=None):
    first = min(cursor, far) if first is None else first
    return inconsistent(model, nodes, np.asarray(at), cursor, first, far)


def test_what_stands_in_its_span():
    at = [3, 11, 19, 27, 33, 37, *range(40, 48), 49, 53]
    assert not wrong(at).any()
    # All that is farther than 20 from the cursor at 56 stands at 0, the cursor at 20.
    assert not wrong([0, 0, 0, 0, 0, 1, *range(4, 12), 13, 17], far=20).any()
    shifted = np.asarray(at) + 1
    assert wrong(shifted).all() and not wrong(shifted, first=57).any()
    start = dataclasses.replace(MODEL, gist=dataclasses.replace(MODEL.gist, place="start"))
    assert wrong(at, model=start).tolist() == [True] * 6 + [False] * 8 + [True] * 2
    heads = dataclasses.replace(MODEL, gist=GistConfig(kind="heads", window=4))
    assert not wrong([8] * 8 + list(range(16, 24)), model=heads, nodes=[(1, 1), (0, 2)]).any()
    assert wrong([9] * 8, model=heads, nodes=[(1, 1)]).all()
    assert wrong(at[:-1]).all()  # entries that belong to no node


@pytest.mark.parametrize("shift", [0, 1])
def test_entries_that_are_read_are_counted(memory, shift):
    entries = memory.gather(NODES, 56)
    entries = entries._replace(positions=entries.positions + shift)
    ids = memory.tree.tokens(56, 80)
    memory.losses([entries] * 2, ids, 56, 8, 24)
    assert memory.checked == Checked(16, 16 * shift)
    memory.continued(entries, ids, 56, 24, 1)
    assert memory.checked == Checked(32, 32 * shift)


def test_a_cursor_that_is_not_theirs_is_seen(memory):
    """Beyond what the base can look back, positions are of one cursor."""
    far = memory.far
    entries = memory.gather([(0, 5)], far + 8)
    assert entries.positions[0] == 32
    memory.check(entries.nodes, entries.positions, far + 8)
    assert memory.checked == Checked(8, 0)
    memory.check(entries.nodes, entries.positions, far + 16)
    assert memory.checked == Checked(16, 8)


def test_a_context_that_is_edited_is_looked_at(memory, monkeypatch):
    query = memory.tree.tokens(120, 131)
    runtime = Runtime(memory, RuntimeConfig(64, "recency"))
    runtime.generate(query, 12)
    seen = memory.checked.entries
    assert seen > 100 and not memory.checked.inconsistent
    right = positions.slot_offsets

    def shifted(layout, level, place="centre"):
        return right(layout, level, place) + (level > 0)

    monkeypatch.setattr(positions, "slot_offsets", shifted)
    Runtime(memory, RuntimeConfig(64, "recency")).generate(query, 12)
    broken = memory.checked.inconsistent
    assert 0 < broken < memory.checked.entries - seen  # gists, and not raw text
    nll_at_h(memory, [48], ["recency", "oracle"], [12], 8, oracle_steps=1)
    assert memory.checked.inconsistent > broken


def test_recovery_is_looked_at(base, monkeypatch):
    config = resolve("megacontext/tiny", {"eval.batch_size": 2})
    measure = Recovery(base.decoder, None, 0, config, 1, 7)
    for arm in ("full", "windowed", "gist", "shuffled", "mean_pool", "kv_stride", "dropped"):
        measure._check(arm)
    assert measure.checked == Checked(56 + 4 * 14, 0)
    monkeypatch.setattr(measure, "places", lambda arm: np.arange(14))
    measure._check("gist")
    assert measure.checked.inconsistent > 10
