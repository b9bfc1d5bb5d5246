"""Content and task adapter: what tasks share, what each adds, and that evaluation asks for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire.bits import Rounded
from latent_jax.systems.latentwire.compressed import for_task
from latent_jax.systems.latentwire.config import TASKS, LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.continuation import evaluate_continuation
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 8, "ratio": 4, "encoder": {"slots": "pooled"}, "wire": {"d_z": 6},
              "adapter": {"task_rank": 2}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "continuation": 8, "segments": 20, "questions": 20,
             "mix": {"reconstruct": 0.5, "continue": 0.5}},
    "eval": {"segments": 4, "quick_segments": 4},
    "train": {"steps": 6, "batch_size": 4},
}  # fmt: skip
REBUILD, GO_ON = TASKS.index("reconstruct"), TASKS.index("continue")


@pytest.fixture(scope="module")
def system():
    return LatentWireSystem(parse(LatentWireRun, RUN), byte_reader())


@pytest.fixture(scope="module")
def batches(system):
    """One batch of each task."""
    stream = system.train_data("main", None)
    found = {
        n: next(b for b in stream if int(b["task"][0]) == n) for n in (REBUILD, GO_ON)
    }
    return jax.tree.map(jnp.asarray, found)


@pytest.fixture(scope="module")
def params(system, batches):
    return system.init({"params": jax.random.key(1)}, batches[REBUILD])["params"]


@pytest.fixture(scope="module")
def moved(params):
    """After some training of the task reconstruct, as it were."""
    b = params["task_adapter"]["b"].at[REBUILD].set(0.5)
    return {**params, "task_adapter": {**params["task_adapter"], "b": b}}


@pytest.fixture(scope="module")
def nll(system, batches):
    """Loss of a task's batch, as training computes it."""

    @jax.jit
    def run(params, batch):
        found = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
        return {k: m.value for k, m in found.items()}

    return lambda params, task: float(run(params, batches[task])[TASKS[task]])


def test_it_begins_as_the_content_and_each_task_moves_alone(nll, params, moved):
    flat = {**params, "task_adapter": jax.tree.map(jnp.zeros_like, params["task_adapter"])}
    for task in (REBUILD, GO_ON):
        assert nll(params, task) == nll(flat, task)
    assert nll(moved, GO_ON) == nll(params, GO_ON)
    assert abs(nll(moved, REBUILD) - nll(params, REBUILD)) > 1e-3


def test_a_tasks_batch_teaches_its_own_map_and_the_shared_one(system, params, moved, batches):
    def loss(params, task):
        found = system.loss_terms({"params": params}, system.frozen, batches[task], {}, False)[0]
        return found[TASKS[task]].value

    for start, which in ((params, ("b",)), (moved, ("a", "b"))):
        flat = jax.jit(jax.grad(loss), static_argnums=1)(start, REBUILD)
        for name in which:
            own = flat["task_adapter"][name]
            assert float(jnp.abs(own[REBUILD]).max()) > 0
            others = [i for i in range(len(TASKS)) if i != REBUILD]
            assert float(jnp.abs(own[jnp.array(others)]).max()) == 0
        assert all(float(jnp.abs(flat[k]).max()) > 0 for k in ("up", "down"))
    labels = system.param_labels(params)
    assert set(jax.tree.leaves(labels["task_adapter"])) == {"adapter"}


def test_evaluation_asks_for_its_own_task(system, moved, nll, batches):
    wire = system.wire({"params": moved}, system.frozen)
    shared = {"batch_size": 4, "segment": 8, "sink": wire.sink}
    texts = np.asarray(batches[REBUILD]["context"])
    found, _ = evaluate_ae(wire.backbone, wire.latents, texts, arms=("latent",), **shared)
    np.testing.assert_allclose(found["ae.nll"], nll(moved, REBUILD), rtol=1e-4)
    sent = Rounded(wire.latents, None, "fp32")
    found, _ = evaluate_ae(wire.backbone, sent, texts, arms=("latent",), **shared)
    np.testing.assert_allclose(found["ae.nll"], nll(moved, REBUILD), rtol=1e-4)
    quick = system.quick_eval({"params": moved}, system.frozen)
    held = {**batches[REBUILD]}
    held_out = jnp.asarray(system.eval_data()[:4])
    held |= {"context": held_out, "inputs": held_out, "context_mask": held_out >= 0,
             "inputs_mask": held_out >= 0, "supervised": held_out >= 0}  # fmt: skip
    terms = system.loss_terms({"params": moved}, system.frozen, held, {}, False)[0]
    np.testing.assert_allclose(quick["reconstruct"], terms["reconstruct"].value, rtol=1e-4)


def test_a_task_that_learned_nothing_of_its_own_reads_what_all_share(system, params, moved):
    windows = system.eval_data()[:4]
    rows = []
    for p in (params, moved):
        wire = system.wire({"params": p}, system.frozen)
        rows.append(
            [
                evaluate_continuation(
                    wire.backbone, wire.latents, windows, 8, ["latent"], ratio=4.0, batch_size=4,
                    segment=8, sink=wire.sink, task=task,
                )["continuation.nll.latent"]
                for task in ("continue", "reconstruct")
            ]
        )  # fmt: skip
    before, after = rows
    assert before[0] == after[0] and abs(before[1] - after[1]) > 1e-3


def test_a_person_gets_each_tasks_own(system, moved, params):
    wire, plain = (system.wire({"params": p}, system.frozen) for p in (moved, params))
    z = wire.encode("a b c d")
    latents = wire.latents
    asked = for_task(latents, "reconstruct")
    assert asked.about == REBUILD and for_task(latents, None) is latents
    own, shared = asked.prefix(z), latents.prefix(z)
    assert float(jnp.abs(own.kv.v - shared.kv.v).max()) > 1e-3
    same = for_task(plain.latents, "reconstruct").prefix(z)
    np.testing.assert_array_equal(same.kv.v, plain.latents.prefix(z).kv.v)
    assert len(wire.rebuild_ids(z)[0]) == int(z.length[0])


def test_it_needs_a_map_of_its_own():
    with pytest.raises(ConfigError, match="adapter.task_rank needs a map of its own"):
        parse(ModelConfig, {"adapter": {"task_rank": 2}})
