"""MegaContext through the shared trainer, on the packaged tiny reader."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import latent_jax
from latent_jax import run
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.systems.megacontext.system import MegaContextSystem
from latent_jax.train.load import load_variables

SMALL = {
    # one device: eight virtual ones only share these cores, and compile for longer
    "mesh.data": 1,
    "train.steps": 24, "train.eval_every": 0, "eval.rows": 32, "eval.upper_rows": 0,
    "eval.arms": ["full", "gist", "dropped"], "data.rows": 400,
    "eval.budgets": [80], "eval.policies": ["full", "uniform", "bm25"], "eval.long": 24,
    "eval.places": 2, "eval.long_rows": 2,
    "train.phases": [
        {"name": "near", "steps": 20, "data": "near", "train": ["queries", "maps"]},
        {"name": "level 2", "data": "upper2", "train": ["upper_queries", "upper_maps"]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("mega") / "run"
    return latent_jax.run("megacontext/tiny", **SMALL, out=str(out))


def test_trained_gists_stand_in_for_the_text(results):
    """The divergence from the base on the text falls, on held-out text. (The tiny reader makes so
    little of a history that its losses say nothing.)
    """
    system = results.system
    batch = {"ids": jnp.asarray(system.eval_data()[:, :64]), "near": True}

    @jax.jit
    def divergence(variables):
        return system.loss_terms(variables, system.frozen, batch, {}, False)[0]["substitute"].value

    trained = load_variables(results.out)[0]
    fresh = system.init({"params": jax.random.key(0)}, batch)
    assert divergence(trained) < 0.8 * divergence(fresh)


def test_recovery_has_an_interval(results):
    low, high = results["recovery.lod1.slots2.ci95"]
    assert low < results["recovery.lod1.slots2"] < high


def test_all_entries_stand_where_their_text_did(results):
    """Of the policies' contexts and of recovery's; `test_consistency` breaks it."""
    read = [results[f"positions.{part}.entries"] for part in ("policies", "recovery.lod1")]
    assert results["positions.entries"] == sum(read) and min(read) > 0
    assert results["positions.inconsistent"] == 0


def test_policies_on_a_long_history(results):
    names = {n for n in results if n.startswith("nll_at_h.") and ".lod" not in n}
    lost = {f"nll_at_h.{p}.w80.minus_full" for p in ("uniform", "bm25")}
    wanted = {"nll_at_h.full", "nll_at_h.uniform.w80", "nll_at_h.bm25.w80", *lost}
    assert names == wanted | {f"{n}.ci95" for n in lost}
    low, high = results["nll_at_h.bm25.w80.minus_full.ci95"]
    assert low <= results["nll_at_h.bm25.w80.minus_full"] <= high


def test_both_phases_were_trained(results):
    rows = [json.loads(x) for x in (results.out / "metrics.jsonl").read_text().splitlines()]
    terms = {name for row in rows for name in row if name.startswith("term.")}
    assert {"term.substitute", "term.upper"} <= terms


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.blocks": 3}, "data.blocks=3"),
        ({"data.blocks": 4, "data.chunk": 4}, "two whole"),
        ({"data.beyond": 2, "model.layout.protected": 2}, "leaves nothing to predict"),
        ({"model.layout.slots": [8]}, "less than that"),
        ({"eval.arms": ["gist", "full"]}, "add both"),
        ({"eval.policies": ["nearest"]}, "eval.policies: unknown"),
        ({"eval.budgets": [16], "eval.long": 64}, "at their coarsest"),
        ({"train.phases": [{"data": "lens", "train": ["lens"]}]}, "trains model.lens; set it"),
        ({"train.phases": [{"data": "lens"}], "model.lens.width": 8}, "loss of the lens alone"),
        ({"train.phases": [{"data": "lens", "train": ["lens"], "steps": 1}, {"train": ["maps"]}],
          "model.lens.width": 8}, "measured anew"),
        ({"train.phases": [{"steps": 1}, {"data": "lens", "train": ["lens"]}],
          "model.lens.width": 8}, "name in train what it trains"),
        ({"train.phases": [{"train": ["lora"]}]}, "set model.lora"),
        ({"model.lens.width": 8, "model.lens.heads": 3}, "heads=3 do not divide"),
        ({"eval.budgets": [200], "eval.policies": ["lens"]}, "lens needs model.lens"),
        ({"eval.tasks": ["riddle"]}, "eval.tasks: unknown"),
        ({"eval.tasks": ["passkey"]}, "need eval.budgets"),
        ({"model.positions.kind": "ordinal", "model.positions.far": 64}, "no distances in"),
        ({"model.positions.kind": "ordinal", "model.gist.kind": "heads", "model.gist.reads": 4},
         "kind heads are the text"),
        ({"model.positions.damped": True, "model.gist.kind": "heads", "model.gist.reads": 4},
         "which have no width"),
        ({"model.positions.damped": True, "model.gist.kind": "embeddings"}, "inside the base"),
        ({"model.positions.kind": "ordinal", "eval.budgets": [200], "eval.policies": ["oracle"]},
         "measure actions on entries"),
        ({"eval.passkey_blocks": [64]}, "eval.passkey_blocks: they need eval.budgets"),
        ({"eval.passkey_blocks": [64, 65], "eval.budgets": [400]}, "eval.passkey_blocks=65 must"),
        ({"eval.passkey_blocks": [4096], "eval.budgets": [200]},
         "cannot hold eval.passkey_blocks=4096"),
        ({"eval.passkey_depths": []}, "eval.passkey_depths is empty"),
        ({"eval.passkey_depths": [1.5]}, "eval.passkey_depths"),
        ({"eval.tasks": ["passkey"], "eval.budgets": [200], "eval.task_blocks": 4096},
         "cannot hold eval.task_blocks=4096"),
        ({"eval.reach": [4096]}, "eval.reach: give eval.tasks"),
        ({"eval.tasks": ["passkey"], "eval.budgets": [400], "eval.reach": [8]},
         "no more than the protected tail"),
        ({"eval.tasks": ["passkey"], "eval.budgets": [400], "eval.reach": [65536],
          "eval.reach_budget": 16}, "eval.reach_budget=16 cannot hold the 65536 tokens"),
        ({"eval.documents": "d", "eval.budgets": [200], "eval.document_tokens": 65536},
         "cannot hold eval.document_tokens=65536"),
        ({"model.gist.kind": "heads", "model.gist.reads": 2}, "model.gist.reads=2"),
        ({"model.gist.kind": "heads", "model.gist.reads": 4, "model.gist.place": "start"},
         "model.gist.place=start"),
    ],
)
def test_impossible_settings_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        run.resolve("megacontext/tiny", overrides)


def test_a_phase_of_a_missing_level_is_refused(tmp_path):
    phases = [{"name": "level 3", "data": "upper3"}]
    with pytest.raises(ConfigError, match="upper3.*there are: main, near, upper2"):
        latent_jax.run("megacontext/tiny", out=str(tmp_path / "run"), **{"train.phases": phases})


def test_too_little_text_is_said_before_training(tmp_path):
    (tmp_path / "short.txt").write_text("A mill burned down. " * 40)
    overrides = {"eval.text": str(tmp_path / "short.txt"), "out": str(tmp_path / "run")}
    system = MegaContextSystem(run.resolve("megacontext/tiny", overrides))
    with pytest.raises(DataError, match="tokens are needed"):
        system.train_data("main", None)


def test_an_evaluation_that_is_stopped_goes_on(results, tmp_path, monkeypatch):
    """What was measured before is not measured again, and what it found is in the results."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MegaContextSystem, "_policies", stop)
        with pytest.raises(KeyboardInterrupt):
            run.evaluate(results.out, out=tmp_path)
    assert (tmp_path / "evaluation.parts.json").is_file()
    assert not (tmp_path / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(MegaContextSystem, "_recovery", stop)
        found = run.evaluate(results.out, out=tmp_path)
    assert found["recovery.lod1.slots2"] == results["recovery.lod1.slots2"]
    assert "nll_at_h.bm25.w80" in found
    assert not (tmp_path / "evaluation.parts.json").exists()
