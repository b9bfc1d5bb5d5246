"""The language model as a system of the shared trainer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError, RunError
from latent_jax.ops import rope
from latent_jax.systems.lm import asset
from latent_jax.systems.lm.config import LMRun
from latent_jax.systems.lm.system import LMSystem


def tiny_run(**extra):
    tree = {
        "system": "lm",
        "tokenizer": {"kind": "bytes"},
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
                  "head_dim": 8, "intermediate_size": 24, "max_position": 256},
        "data": {"stages": {"main": {"rows": 16, "length": 96, "pairs": [2, 2], "questions": 1,
                                     "mix": {"lookup": 1, "copy": 1, "text": 1}, "copy": [4, 8]}}},
        "eval": {"rows": 2, "questions": 3, "copies": 2, "copy_length": 4, "quick": 4,
                 "batch_size": 4},
        "train": {"steps": 3, "batch_size": 4, "log": {"tensorboard": False}},
    }  # fmt: skip
    return parse(LMRun, {**tree, **extra})


@pytest.fixture(scope="module")
def system():
    return LMSystem(tiny_run())


@pytest.fixture(scope="module")
def variables(system):
    return system.init({"params": jax.random.key(0)}, {})


def test_documents_in_a_row_do_not_see_one_another(system, variables):
    """A packed row's loss is that of its documents alone."""
    row = {k: jnp.asarray(v[:1]) for k, v in system.rows("main").items()}
    terms, _, _ = system.loss_terms(variables, {}, row, {}, True)
    total = sum(float(t.sum) for t in terms.values())
    alone = 0.0
    segment = np.asarray(row["segment_ids"][0])
    model = system.backbone(variables)
    for number in range(1, segment.max() + 1):
        inside = segment == number
        ids = row["tokens"][:, inside]
        logp = jax.nn.log_softmax(model.logits(ids)[:, :-1])
        nll = -jnp.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0]
        alone += float((nll * (row["kinds"][:, inside][:, 1:] > 0)).sum())
    np.testing.assert_allclose(total, alone, rtol=2e-4)


def test_protocol_and_counts(system, variables):
    stream = system.train_data("main", None)
    first = next(stream)
    state = stream.get_state()
    second = next(stream)
    resumed = next(system.train_data("main", state))
    assert all((second[k] == resumed[k]).all() for k in second)
    assert system.unit_counts(first)["tokens"] == (first["segment_ids"] > 0).sum()
    labels = system.param_labels(variables["params"])
    assert set(jax.tree.leaves(labels)) == {"decoder"}


def test_a_short_training_lowers_every_term(system, tmp_path):
    from latent_jax.train.loop import fit

    config = tiny_run(train={"steps": 25, "batch_size": 8, "optimizer": {"lr": 0.01},
                             "log": {"tensorboard": False}})  # fmt: skip
    small = LMSystem(config)
    before = small.init({"params": jax.random.key(0)}, {})
    state = fit(small, config, tmp_path)
    old, new = small.quick_eval(before, {}), small.quick_eval(state.variables, {})
    assert all(new[kind] < old[kind] - 0.5 for kind in ("text", "lookup", "copy"))


def test_evaluation_and_export_round_trip(system, variables, tmp_path):
    metrics, artefacts = system.evaluate(variables, {})
    assert 7.0 < metrics["text.bits_per_byte"] < 14.0  # untrained, over bytes
    assert metrics["lookup.full_text.em"] == 0.0 and len(artefacts["samples"]) == 3
    shown = system.export(variables, {}, to=str(tmp_path / "model"))
    assert shown["written"] == tmp_path / "model"
    loaded = backbones.load(tmp_path / "model")
    ids = np.arange(12)[None]
    want = system.backbone(variables).logits(ids)
    np.testing.assert_allclose(loaded.logits(ids), want, atol=1e-5)
    assert (tmp_path / "model" / "record.json").is_file()


def test_errors_name_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="data.stages has no 'late'"):
        tiny_run(train={"phases": [{"name": "a", "data": "late"}]})
    with pytest.raises(ConfigError, match="beyond"):
        tiny_run(model={"max_position": 64})
    with pytest.raises(RunError, match=r"environment\.json is missing"):
        asset.training_record(tmp_path)


@pytest.mark.parametrize(("family", "heads", "groups"), [("llama", 4, 2), ("qwen3", 6, 3)])
def test_induction_start_looks_back_and_keeps_the_shapes(family, heads, groups):
    shape = {"hidden_size": 48, "num_layers": 2, "num_heads": heads, "num_kv_heads": groups}
    run = tiny_run(model={**shape, "family": family, "head_dim": 16, "start": "induction"})
    made = LMSystem(run)
    variables = made.init({"params": jax.random.key(1)}, {})
    fresh = made.decoder.init(jax.random.key(1), jnp.zeros((1, 4, 48)))["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables["params"])
    # A first-layer query prefers the key one place back to its own and to those further away.
    params = variables["params"]
    x = params["embed"][jnp.arange(8)]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))

    def project(name, n):
        y = (x @ params["layers"][name]["kernel"][0]).reshape(1, 8, n, 16)
        if family == "qwen3":
            y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True))
            y = y * params["layers"][f"{name}_norm"]["scale"][0]
        return rope.rotate(y, jnp.arange(8)[None], made.decoder.inv_freq)

    q, k = project("q", heads), project("k", groups)
    for head in range(heads):
        score = q[0, 7, head] @ k[0, :, head // 2].T
        assert int(jnp.argmax(score)) == 7 - (head + 1)


def test_induction_start_needs_its_heads():
    with pytest.raises(ConfigError, match="needs num_heads=4"):
        tiny_run(model={"num_heads": 2, "num_kv_heads": 1, "start": "induction"})
