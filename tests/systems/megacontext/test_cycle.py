"""LoRA on the base, and alternating training: gists, a lens on fresh labels, the base's deltas."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax.backbones.sink import behind, sink_kv
from latent_jax.core import trees
from latent_jax.core.errors import ConfigError
from latent_jax.nn.lora import merged
from latent_jax.systems.megacontext import base_lora, labels
from latent_jax.systems.megacontext.base_lora import BaseLoraConfig
from latent_jax.systems.megacontext.contexts import stacked
from latent_jax.systems.megacontext.memory import digest
from latent_jax.systems.megacontext.system import MegaContextSystem
from latent_jax.train.load import load_variables

SMALL = {
    "mesh.data": 1, "train.steps": 9, "train.batch_size": 4, "train.eval_every": 0,
    "train.phases": [
        {"name": "gists", "steps": 2, "train": ["queries", "maps"]},
        {"name": "lens", "steps": 2, "data": "lens", "train": ["lens"]},
        {"name": "lora", "steps": 1, "train": ["lora"], "weights": {"next_token": 1.0}},
    ],
    "data.rows": 64, "data.label_blocks": 40,
    "data.label": {"budget": 64, "places": 3, "history": 24, "policies": ["recency", "lens"],
                   "actions": 4, "drops": False},
    "eval.rows": 8, "eval.quick_rows": 8, "eval.batch_size": 8, "eval.budgets": [],
    "eval.arms": ["full", "gist", "shuffled", "dropped"],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("cycle") / "run"
    return latent_jax.run("megacontext/tiny_cycle", **SMALL, out=str(out))


@pytest.fixture(scope="module")
def system():
    return MegaContextSystem(runs.resolve("megacontext/tiny_cycle", SMALL))


@pytest.fixture(scope="module")
def params(system):
    batch = {"ids": jnp.asarray(system.eval_data()[:2, :64])}
    fresh = system.init({"params": jax.random.key(0)}, batch)["params"]
    moved = jax.tree.map(lambda x: x + 0.05, fresh["lora"])
    return batch, fresh, {**fresh, "lora": moved}


@pytest.fixture(scope="module")
def terms(system):
    """Loss terms, compiled once."""
    return jax.jit(
        lambda p, batch: {
            name: term.value for name, term in
            system.loss_terms({"params": p}, system.frozen, batch, {}, False)[0].items()
        }
    )  # fmt: skip


def test_fresh_deltas_change_nothing_and_moved_ones_do(params, terms):
    batch, fresh, moved = params
    frozen, same, other = (
        terms(p, batch) for p in (base_lora.frozen(fresh), fresh, moved)
    )
    np.testing.assert_allclose(same["next_token"], frozen["next_token"], rtol=1e-6)
    assert abs(other["next_token"] - frozen["next_token"]) > 1e-3


def test_gists_and_deltas_get_a_gradient_and_the_base_has_none(system, params):
    batch, _, moved = params

    @jax.jit
    def gradient(p):
        return jax.grad(
            lambda q: system.loss_terms({"params": q}, system.frozen, batch, {}, False)[0][
                "substitute"
            ].value
        )(p)

    found = gradient(moved)
    norms = {name: float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(found[name])))
             for name in ("lora", "gist", "lens")}  # fmt: skip
    assert norms["lora"] > 0 and norms["gist"] > 0 and norms["lens"] == 0


@pytest.mark.parametrize("where, first", [("first", 0), ("last", 2)])
def test_only_the_chosen_layers_are_adapted(system, where, first):
    config, base = BaseLoraConfig(rank=2, layers=2, where=where), system.backbone.config
    own = base_lora.make(config, base).init(jax.random.key(0))["params"]
    found = base_lora.deltas(config, base, {"lora": jax.tree.map(jnp.ones_like, own)})
    touched = np.asarray(jnp.abs(found["q"]["b"]).sum((1, 2))) > 0
    assert np.flatnonzero(touched).tolist() == [first, first + 1]
    assert set(found) == {"q", "k", "v", "o"}


@pytest.fixture(scope="module")
def memories(system, params, tmp_path_factory):
    """The same store read by the base as it is, and by the base with deltas."""
    _, fresh, moved = params
    path, ids = str(tmp_path_factory.mktemp("store") / "s"), system.eval_data()[0, :64]
    with system.memory({"params": fresh}, system.frozen, path, writable=True) as memory:
        memory.tree.append(ids)
        memory.build()
    plain = system.memory({"params": base_lora.frozen(fresh)}, system.frozen, path)
    adapted = system.memory({"params": moved}, system.frozen, path)
    return plain, adapted, ids


def test_entries_and_gists_are_of_the_base_as_it_is(memories):
    plain, adapted, _ = memories
    nodes = [(1, 0), (0, 1), (1, 2)]
    one, other = (m.gather(nodes, 64) for m in (plain, adapted))
    for name in one.held:
        np.testing.assert_array_equal(one.held[name], other.held[name])
    assert plain.reader == "frozen" and adapted.reader == digest(adapted.lora)


def test_reading_with_deltas_equals_reading_with_changed_weights(memories):
    """The losses of evaluation, and what is generated, against a base whose kernels were changed;
    only the sink and the entries are the old base's.
    """
    plain, adapted, ids = memories
    nodes = [(1, i) for i in range(6)]
    entries = adapted.gather(nodes, 48)
    found = adapted.losses([entries], ids[48:], 48, 8, 16)[0]
    assert abs(found - plain.losses([entries], ids[48:], 48, 8, 16)[0]) > 1e-3
    held, at, mask = stacked([entries], 16)
    changed = merged(adapted.base, adapted.lora)

    @jax.jit
    def reference(ids):
        sink = sink_kv(adapted.decoder, adapted.base, jnp.int32(adapted.sink), 1)
        prefix = behind(sink, adapted._as_prefix(adapted.base, held, at, mask))
        x = adapted.decoder.apply({"params": changed}, ids, method="embed")
        where = 48 + jnp.arange(ids.shape[1])[None]
        hidden = adapted.decoder.apply({"params": changed}, x, where, prefix=prefix).hidden
        return adapted.decoder.apply({"params": changed}, hidden, method="unembed")

    logits = reference(ids[None, 48:])
    log = jax.nn.log_softmax(logits[0, -9:-1])
    expected = -jnp.take_along_axis(log, jnp.asarray(ids[-8:])[:, None], -1).mean()
    assert found == pytest.approx(float(expected), abs=1e-4)
    said = adapted.continued(entries, ids[48:], 48, 16, 1)
    assert said == adapted.backbone.tokenizer.decode([int(logits[0, -1].argmax())])


def test_every_turn_measures_its_labels_with_the_gists_and_the_reader_of_its_time(results):
    tables = sorted((results.out / "labels").glob("*.parquet"))
    assert [t.stem for t in tables] == ["00000002", "00000007"]
    first, second = (labels.read(t)[1] for t in tables)
    assert first["gists"] != second["gists"] and first["reader"] != second["reader"]
    params = load_variables(results.out)[0]["params"]
    # The run ends with the second turn of the lens.
    model = results.system.config.model
    assert second["gists"] == digest(params["gist"], model.gist)
    deltas = base_lora.deltas(model.lora, results.system.backbone.config, params)
    assert second["reader"] == digest(deltas)
    assert first["seed"] != second["seed"]


def test_all_three_were_trained_in_turn(results):
    rows = [json.loads(x) for x in (results.out / "metrics.jsonl").read_text().splitlines()]
    names = [row["phase"] for row in rows if "phase" in row]
    turn = ["gists", "gists", "lens", "lens", "lora"]
    assert names == [*turn, *turn[:4]]
    lens = [row for row in rows if row.get("phase") == "lens"]
    assert all("term.regression" in row and "grad_norm.lens" in row for row in lens)


def test_results_tell_what_the_base_as_it_is_makes_of_the_same(results):
    assert results["frozen.nll_at_h.lod1.full"] > 0
    gap = results["nll_at_h.lod1.gist.minus_frozen_full"]
    whole = results["nll_at_h.lod1.gist"] - results["frozen.nll_at_h.lod1.full"]
    assert gap == pytest.approx(whole, abs=1e-6)
    low, high = results["nll_at_h.lod1.full.minus_frozen_full.ci95"]
    assert low <= results["nll_at_h.lod1.full.minus_frozen_full"] <= high


def test_a_run_that_was_stopped_in_a_lens_turn_does_not_measure_again(results, tmp_path):
    """And ends with the same parameters."""
    out = tmp_path / "run"
    shutil.copytree(results.out, out)
    for step in (out / "checkpoints").iterdir():
        if step.name != "7":
            shutil.rmtree(step)
    before = (out / "labels" / "00000007.parquet").stat().st_mtime_ns
    again = latent_jax.run("megacontext/tiny_cycle", **SMALL, out=str(out))
    assert (out / "labels" / "00000007.parquet").stat().st_mtime_ns == before
    old, new = (trees.flatten(load_variables(o)[0]["params"]) for o in (results.out, again.out))
    for name in old:
        np.testing.assert_array_equal(old[name], new[name], err_msg=name)


def test_a_lens_alone_measures_its_labels_before_its_first_step(tmp_path):
    """Nothing but the shapes of labels is there when the trainer is built."""
    alone = {"train.phases": [{"name": "lens", "data": "lens", "train": ["lens"]}]}
    few = {"train.steps": 2, "eval.policies": [], "eval.rows": 4, "eval.quick_rows": 4}
    found = latent_jax.run("megacontext/tiny_cycle", **SMALL | alone | few, out=str(tmp_path / "r"))
    rows = [json.loads(x) for x in (found.out / "metrics.jsonl").read_text().splitlines()]
    terms = [row["term.regression"] for row in rows if row.get("phase") == "lens"]
    assert len(terms) == 2 and all(x > 0 for x in terms)
    snapshots = found.system.measured.train
    assert snapshots and all(one.measured.any() for _, one in snapshots)


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"data.labels": ["t.parquet"]}, "leave data.labels out"),
        ({"train.phases": [{"train": ["maps"]}]}, "train.phases has none"),
        ({"data.label_blocks": 24}, "data.label_blocks: 24 blocks have 0 places"),
        ({"data.label.budget": 16}, "at its coarsest"),
        ({"data.label.policies": ["match"]}, "match needs model.matcher"),
        ({"model.gist.kind": "heads", "model.gist.reads": 4}, "calibrated, not trained"),
    ],
)  # fmt: skip
def test_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        runs.resolve("megacontext/tiny_cycle", SMALL | overrides)


def test_unknown_projections_are_refused(system):
    with pytest.raises(ConfigError, match=r"unknown \['w'\]; the base has"):
        base_lora.make(BaseLoraConfig(targets=("w",)), system.backbone.config)
