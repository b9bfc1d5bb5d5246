"""Counterfactual utilities: against losses measured one by one, by hand, and as a table."""

from __future__ import annotations

import dataclasses
import doctest
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.core.errors import ConfigError, StoreError
from latent_jax.systems.megacontext import labels, utilities
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.comparison import nll_at_h, policy_table
from latent_jax.systems.megacontext.counterfactual import Action, Counterfactuals, actions
from latent_jax.systems.megacontext.focus import before_tail
from latent_jax.systems.megacontext.gist import GistNet, Gists
from latent_jax.systems.megacontext.label_config import LabelConfig
from latent_jax.systems.megacontext.labelling import label
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory, digest
from latent_jax.systems.megacontext.model_config import GistConfig, LensConfig, ModelConfig
from latent_jax.systems.megacontext.oracle import Oracle
from latent_jax.systems.megacontext.runtime import RuntimeConfig
from latent_jax.systems.megacontext.sight import Look, lens_net, sight_width

LAYOUT = Layout(block=8, branching=4, slots=(2, 4), protected=1)
MODEL = ModelConfig(layout=LAYOUT, gist=GistConfig(reads=2, window=4), lens=LensConfig(width=8))
FOCUS = RuntimeConfig().focus


@pytest.fixture(scope="module")
def base():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def params(base):
    """Gists as they start, the mean of each stretch."""
    r = base.config
    shape = (r.num_layers, 1, LAYOUT.block, r.num_kv_heads, r.head_dim)
    some = Gists(jnp.zeros(shape), jnp.zeros(shape))
    return GistNet(MODEL, r).init(jnp.zeros(2, jnp.uint32), some, method="touch")["params"]


@pytest.fixture(scope="module")
def memory(base, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "store"
    ids = np.random.default_rng(0).integers(10, base.config.vocab_size, 40 * 8)
    ids[31 * 8 : 32 * 8] = ids[26 * 8 : 27 * 8]  # something to look back to
    with Memory.open(path, base, MODEL, params, "one", writable=True) as memory:
        memory.tree.append(ids)
        memory.build()
        yield memory


@pytest.fixture(scope="module")
def counterfactuals(memory):
    return Counterfactuals(memory, 50, rows=4)


@pytest.fixture(scope="module")
def measured(memory, counterfactuals):
    """A context of all three levels, its actions and what they change."""
    tiling = tl.start(LAYOUT, 30, 50)
    todo = actions(LAYOUT, tiling)
    live = memory.tree.tokens(29 * 8, 32 * 8)
    nodes, start = before_tail(LAYOUT, tiling)
    found = counterfactuals.measure(nodes, todo, live, start, 16, drops=True)
    return tiling, todo, live, found


def test_legal_actions_of_a_tiling_by_hand():
    tiling = tl.start(LAYOUT, 9, 23)
    # (2,0) (1,4) (1,5) (1,6) (1,7) (0,8): the group of level 1 may collapse.
    assert tl.nodes(tiling)[:2] == [(2, 0), (1, 4)]
    found = [(a.at, a.kind, a.entries, a.span, a.gone, a.made) for a in actions(LAYOUT, tiling)]
    assert found[0] == (0, 1, 4, 32, [(2, 0)], [(1, 0), (1, 1), (1, 2), (1, 3)])
    assert found[1] == (1, 1, 6, 8, [(1, 4)], [(0, 4)])
    assert found[2] == (1, -1, -4, 32, [(1, 4), (1, 5), (1, 6), (1, 7)], [(2, 1)])
    assert len(found) == 6


def test_shared_cache_equals_contexts_of_their_own(memory, measured):
    """The slow reference gathers every context anew and reads them one by one."""
    tiling, todo, live, found = measured
    nodes, start = before_tail(LAYOUT, tiling)
    assert {a.kind for a in todo} == {1, -1} and {len(a.gone) for a in todo} == {1, 4}

    def loss(context):
        entries = memory.gather(context, start)
        return float(memory.losses([entries], live, start, 16, capacity=80)[0])

    before = loss(nodes)
    assert found.nll == pytest.approx(before, abs=1e-5)
    for i in (0, len(todo) // 2, len(todo) - 1):
        at = nodes.index(todo[i].gone[0])
        rest = nodes[at + len(todo[i].gone) :]
        after = loss([*nodes[:at], *todo[i].made, *rest])
        assert found.delta_nll[i] == pytest.approx(after - before, abs=1e-5)
        dropped = loss([*nodes[:at], *rest])
        assert found.drop_delta_nll[i] == pytest.approx(dropped - before, abs=1e-5)
    assert (found.delta_kl > 0).all()


def test_price_balances_what_is_asked_and_offered():
    assert doctest.testmod(utilities) == (0, 1)
    rng = np.random.default_rng(0)
    value, entries = rng.normal(size=40), rng.choice([-6.0, -4.0, 4.0, 6.0], 40)
    cost = utilities.price(value, entries)
    above = np.maximum((value - cost) * np.sign(entries), 0)
    asked, offered = (above * entries)[entries > 0].sum(), (-above * entries)[entries < 0].sum()
    assert asked == pytest.approx(offered, rel=1e-9) and asked > 0
    assert utilities.price(np.ones(3), np.ones(3)) == 0  # nothing to pay with


def test_utilities_by_hand():
    todo = [
        Action(0, 1, 4, 32, [(2, 0)], []), Action(1, 1, 6, 8, [(1, 4)], []),
        Action(1, -1, -4, 32, [(1, 4)] * 4, []),
    ]  # fmt: skip
    # Values: 0.2 for opening the first, 0.0 for the second, 0.1 for keeping the group apart.
    worth, known = utilities.utilities(LAYOUT, 6, todo, np.array([-0.8, 0.0, 0.4]))
    # The price p solves 4 (0.2 - p) = 4 (p - 0.1), while opening the second is below it.
    assert known.tolist() == [True] * 5 + [False]
    np.testing.assert_allclose(worth[0], 0.05, atol=1e-6)
    np.testing.assert_allclose(worth[1], (-0.15 - 0.05) / 2, atol=1e-6)
    np.testing.assert_allclose(worth[2:5], -0.05, atol=1e-6)


def test_the_oracle_never_loses_to_where_it_starts(memory, counterfactuals, measured):
    tiling, _, live, found = measured
    oracle = Oracle(memory, 50, FOCUS, steps=2)
    oracle.counterfactuals = counterfactuals  # what is compiled
    loss, chosen = oracle.settle(30, live, 29 * 8, 16)
    assert loss < found.nll - 1e-4
    assert bool(tl.check(LAYOUT, chosen, 30, 50).ok)
    nodes, start = before_tail(LAYOUT, chosen)
    entries = memory.gather(nodes, start)
    assert loss == pytest.approx(float(memory.losses([entries], live, start, 16, 80)[0]), abs=1e-5)


def test_regret_is_paired():
    one, best = np.array([3.0, 2.0, 4.0]), np.array([2.5, 2.0, 3.0])
    lens = np.array([2.75, 2.0, 3.5])
    losses = {"oracle.w8": best, "recency.w8": one, "lens.w8": lens}
    found = policy_table(losses, [8], np.arange(3))
    assert found["regret.recency.w8"] == pytest.approx(0.5)
    assert found["gain.lens.w8"] == pytest.approx(0.5) == found["gain.lens.w8.ci95"][0]
    assert "regret.oracle.w8" not in found and "gain.recency.w8" not in found
    # The first two places are of one text, which is drawn whole: 0.25 or 1, and nothing beyond.
    found = policy_table(losses, [8], np.array([0, 0, 1]))
    assert found["regret.recency.w8.ci95"] == pytest.approx([0.25, 1.0])
    assert "regret.recency.w8.ci95" not in policy_table(losses, [8], np.zeros(3))


def test_the_oracle_is_never_worse_than_what_it_is_compared_with():
    """Losses that fall the more of the old half is open, which no single action makes up for."""

    class Measured:
        memory = SimpleNamespace(model=MODEL)

        def measure(self, nodes, todo, *_):
            old = sum(level == 0 and index < 8 for level, index in nodes)
            delta = np.asarray([0.1 if action.kind > 0 else 0.0 for action in todo])
            return SimpleNamespace(nll=9.0 - old, delta_nll=delta)

    oracle = Oracle(Measured.memory, 50, FOCUS, steps=2)
    oracle.counterfactuals = Measured()
    policy = tl.start(LAYOUT, 30, 50, coarse=True)
    for _ in range(2):
        policy = tl.expand(LAYOUT, policy, 0)
    assert tl.nodes(policy)[0] == (0, 0)
    live = np.zeros(24, int)
    assert oracle.settle(30, live, 29 * 8, 16)[0] == 9.0
    loss, chosen = oracle.settle(30, live, 29 * 8, 16, [policy])
    assert loss == 8.0 and tl.nodes(chosen) == tl.nodes(policy)


@pytest.fixture(scope="module")
def table(memory, tmp_path_factory):
    config = LabelConfig(56, places=4, horizon=1, history=24, policies=("recency",), drops=False)
    found, provenance = label(memory, config)
    path = labels.write(tmp_path_factory.mktemp("table") / "t.parquet", found, provenance)
    return path, found, provenance


def test_a_table_holds_its_contexts(memory, table):
    path, rows, _ = table
    columns, provenance = labels.read(path)
    assert provenance["gists"] == "one" and provenance["history_blocks"] == [21, 24]
    assert len(columns["at"]) == len(rows)
    found = labels.snapshots(columns, LAYOUT)
    assert len(found) == 4 and all(20 < s.cursor <= 24 and s.first % 4 == 0 for s in found)
    for s in found:
        n = len(s.level)
        zeros = np.zeros(n, np.int32)
        tiling = tl.Tiling(*map(jnp.asarray, (s.level, s.index, zeros, zeros)), jnp.int32(n))
        assert bool(tl.check(LAYOUT, tiling, s.cursor, 56).ok)
        assert s.measured.sum() == n - 1 and not s.measured[-1]  # all but the tail
        assert s.utility[s.measured].min() < 0 < s.utility.max()
    one = {name: x[columns["snapshot"] == 0] for name, x in columns.items()}
    here, live = memory.stretch(found[0].first), found[0].cursor - 1
    ids = here.tree.tokens(live * 8, (live + 2) * 8)
    nodes = list(zip(found[0].level.tolist(), found[0].index.tolist(), strict=True))[:-1]
    loss = here.losses([here.gather(nodes, live * 8)], ids, live * 8, 8, 80)[0]
    assert one["nll"][0] == pytest.approx(float(loss), abs=1e-5)


def test_short_histories_have_something_before_the_tail(memory):
    """Stretches begin where top nodes do: of a history shorter than those little may be left."""
    config = LabelConfig(56, places=9, horizon=1, history=3, policies=("recency",), drops=False)
    found, _ = label(memory, dataclasses.replace(config, actions=1))
    assert {row["cursor"] for row in found} == {2, 3}


def test_what_the_encoder_sees_with_a_block_names_gists_too(params):
    same = digest(params, MODEL.gist)
    assert same == digest(params, MODEL.gist) != digest(params)
    for change in ({"window": MODEL.gist.window * 2}, {"lead": MODEL.gist.lead + 2}):
        assert digest(params, dataclasses.replace(MODEL.gist, **change)) != same


def test_stale_and_foreign_tables_are_refused(memory, table, base, params, tmp_path):
    path, rows, provenance = table
    labels.check(path, provenance, memory.tree, "one", "frozen")
    with pytest.raises(StoreError, match="stale: measured with gists of version one, .* are two"):
        labels.check(path, provenance, memory.tree, "two", "frozen")
    with pytest.raises(StoreError, match="with the reader frozen, that in use is other"):
        labels.check(path, provenance, memory.tree, "one", "other")
    with Memory.open(tmp_path / "s", base, MODEL, params, "one", writable=True) as other:
        other.tree.append(np.arange(10, 10 + 40 * 8))
        with pytest.raises(StoreError, match="measured on another history"):
            labels.check(path, provenance, other.tree, "one", "frozen")
    with pytest.raises(StoreError, match="no such table"):
        labels.read(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match="not a table of utilities"):
        labels.read(tmp_path / "bad.parquet")
    labels.write(tmp_path / "new.parquet", rows, provenance | {"format": 2})
    with pytest.raises(StoreError, match="of format 2"):
        labels.read(tmp_path / "new.parquet")
    shutil.copy(path, tmp_path / "same.parquet")
    assert labels.read(tmp_path / "same.parquet")[1] == labels.read(path)[1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LabelConfig(56, places=99, history=24), "99 are wanted"),
        (LabelConfig(16, places=2, history=24), "needs 34 entries at its coarsest"),
        (LabelConfig(56, places=99, history=2), "at most 2 blocks of history"),
    ],
)
def test_what_cannot_be_labelled_is_said(memory, config, said):
    with pytest.raises(ConfigError, match=said):
        label(memory, config)


def test_a_stretch_is_a_history_of_its_own(memory):
    here = memory.stretch(8)
    np.testing.assert_array_equal(here.tree.tokens(0, 30), memory.tree.tokens(64, 94))
    np.testing.assert_array_equal(here.tree.gists(2, 1, 2), memory.tree.gists(2, 3, 2))
    assert len(here.tree) == len(memory.tree) - 64
    near, far = here.gather([(1, 2), (0, 3)], 40), memory.gather([(1, 10), (0, 11)], 104)
    np.testing.assert_array_equal(near.held["k"], far.held["k"])
    with pytest.raises(StoreError, match="block 6 begins no node of level 2"):
        memory.stretch(6)


@pytest.mark.slow
def test_a_lens_is_compared_with_the_oracle(memory, base):
    r, config = base.config, MODEL.lens
    records = memory.tree.gists(1, 0, 2)
    seen = Look(r, config)(records, 1)
    assert seen.shape == (2, sight_width(r, config))
    first = records.reshape(2, 2, r.num_layers, 2, -1)[:, :, 0, 1].astype(np.float32).mean(1)
    scale = np.sqrt((first**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(seen[:, : first.shape[1]], first / scale, rtol=1e-5)
    with pytest.raises(ConfigError, match="this run has no lens"):
        nll_at_h(memory, [56], ["lens"], [30], 16)
    from latent_jax.systems.megacontext.lens import nothing_seen

    net = lens_net(config, LAYOUT)
    lens = net.init(jnp.zeros(2, jnp.uint32), *nothing_seen(seen.shape[1]))["params"]
    other = Memory(memory.backbone, MODEL, memory.params, memory.tree, lens=lens)
    found = nll_at_h(other, [56], ["lens", "oracle"], [30], 16, oracle_steps=1)
    # An untrained lens scores 0, so the context stays as it starts.
    assert found["oracle.w56"][0] <= found["lens.w56"][0] + 1e-6
