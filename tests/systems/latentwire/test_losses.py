"""Losses of a batch: the teacher is the evaluation's full text; who gets gradient, who none."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import losses
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.model import Wire
from latent_jax.systems.latentwire.system import LatentWireSystem
from latent_jax.systems.latentwire.tuned import tuned_loss

RUN = {
    "system": "latentwire",
    "model": {"segment": 32, "ratio": 4, "prompt_tokens": 3,
              "encoder": {"slots": "both", "lora_rank": 4, "lora_alpha": 4}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 32, "max_context": 256, "max_prompt": 64,
             "segments": 40, "questions": 40, "recall": 64, "continuation": 24,
             "mix": {"reconstruct": 0.4, "answer": 0.4, "recall": 0.2}},
    "losses": {"distil_logits": 1.0, "distil_states": 2.0},
    "eval": {"segments": 4, "quick_segments": 2},
    "train": {"steps": 6, "batch_size": 2},
}  # fmt: skip


def config(**changes):
    return parse(LatentWireRun, {**RUN, **changes})


@pytest.fixture(scope="module")
def system():
    return LatentWireSystem(config(), byte_reader())


@pytest.fixture(scope="module")
def batches(system):
    """A batch of questions and the same with the mark of the phase that trains the prompt."""
    batch = next(system.train_data("prompt", None))
    assert {"asked", "raw"} <= set(batch)
    batch = jax.tree.map(jnp.asarray, batch)
    return {k: v for k, v in batch.items() if k != "raw"}, batch


@pytest.fixture(scope="module")
def params(system, batches):
    return system.init({"params": jax.random.key(1)}, batches[0])["params"]


def terms(system, params, batch):
    found, _, aux = system.loss_terms({"params": params}, system.frozen, batch, {}, False)
    return {k: m.sum / m.count for k, m in found.items() if k in system.weights}, aux


def total(system, batch):
    weights = {"answer": 1.0, "distil_logits": 1.0, "distil_states": 1.0}

    def loss(params):
        found, _ = terms(system, params, batch)
        return sum(w * found[k] for k, w in weights.items() if k in found)

    return jax.jit(jax.value_and_grad(loss))


def test_the_phase_of_the_prompt_is_the_tuned_control(system, params, batches):
    """The teacher's own training and the tuned full text of the evaluation are one loss."""
    _, raw = batches
    ours, _ = terms(system, params, raw)
    loss, _ = tuned_loss(
        {"prompt": params["prompt"]}, system.body, system.frozen["reader"], raw,
        arm="full_text", ratio=4.0, sink=system.sink,
    )  # fmt: skip
    np.testing.assert_allclose(ours["answer"], loss.sum / loss.count, rtol=1e-4)
    assert "distil_logits" not in ours


def test_only_the_prompt_learns_from_raw_text(system, params, batches):
    _, gradient = total(system, batches[1])(params)
    size = {k: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(g))
            for k, g in gradient.items()}  # fmt: skip
    assert size.pop("prompt") > 0
    assert set(size.values()) == {0.0}


def test_latents_learn_from_the_teacher_which_does_not_move(system, params, batches):
    loss, gradient = total(system, batches[0])(params)
    assert np.isfinite(float(loss))
    assert float(jnp.abs(gradient["pool"]["v"]).sum()) > 0
    states, target = jax.random.normal(jax.random.key(2), (2, 2, 3, 4, 5))
    real = jnp.array([[True, True, False], [True, True, True]])
    share = lambda *x: losses.unexplained(*x, real).sum  # noqa: E731
    own, other = jax.grad(share, argnums=(0, 1))(states, target)
    assert float(jnp.abs(own[0, :2]).min()) > 0
    assert float(jnp.abs(own[0, 2]).max()) == 0
    assert float(jnp.abs(other).max()) == 0


def test_a_student_that_reads_the_text_is_explained_whole(system, params, batches):
    batch, _ = batches
    reader, body = system.frozen["reader"], system.body
    text = losses.raw_text(body, reader, batch["context"], batch["context_mask"], system.sink)
    lead = jnp.broadcast_to(params["prompt"], (2, *params["prompt"].shape))
    ask = (lead, batch["inputs"], batch["inputs_mask"])
    same = losses.forced(body, reader, text, *ask)
    # Keys are compared before rotation: where the prompt stands does not matter by itself.
    unseen = text._replace(kv=text.kv._replace(mask=jnp.zeros_like(text.mask)))
    blind = losses.forced(body, reader, unseen, *ask)
    real = batch["inputs_mask"]
    assert float(losses.unexplained(same.states, same.states, real).sum) == 0
    share = losses.unexplained(blind.states, same.states, real)
    assert 1e-4 < float(share.sum / share.count) < 2
    constant = jnp.broadcast_to(jnp.mean(same.states[real], axis=0), same.states.shape)
    share = losses.unexplained(constant, same.states, real)
    np.testing.assert_allclose(share.sum / share.count, 1.0, rtol=1e-3)


def test_recall_is_taught_on_a_stretch_of_its_text(system, params):
    stream = system.train_data("main", None)
    batch = next(b for b in stream if "recalled" in b)
    for row in range(2):
        text = batch["context"][row].tolist()
        stretch = batch["inputs"][row][batch["inputs_mask"][row]].tolist()
        assert any(text[i : i + len(stretch)] == stretch for i in range(len(text)))
        supervised = batch["supervised"][row]
        assert supervised.sum() == 24 and 2 <= supervised.argmax() <= 6
    found, aux = terms(system, params, jax.tree.map(jnp.asarray, batch))
    assert float(found["recall"]) > 0 and float(found["distil_states"]) > 0
    assert int(aux["teacher_nll"].count) == 2 * 24


def test_the_last_marked_places_come_in_front():
    mask = jnp.array([[False, True, True, False], [False, False, False, True]])
    real, values = losses._last(mask, 2, jnp.arange(8).reshape(2, 4))
    assert real.tolist() == [[True, True], [True, False]]
    assert values[0].tolist() == [1, 2] and int(values[1, 0]) == 7


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {}, "train": {"phases": [{"data": "prompt"}]}}, "needs model.prompt_tokens"),
        ({"train": {"phases": [{"data": "warmup"}]}}, "data='warmup'; allowed: main, prompt"),
        ({"data": {"mix": {"reconstruct": 1.0}}}, "give data.mix a share of answer or recall"),
        ({"data": {"mix": {"recall": 1.0}, "recall": 32}}, "cannot hold data.cue=6"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_question_has_the_prompt_before_it(system, params):
    wire = system.wire({"params": params}, system.frozen)
    np.testing.assert_array_equal(wire.latents.task("answer", 1)[0], params["prompt"])
    assert wire.latents.task("reconstruct", 1).shape == (1, 1, system.backbone.config.hidden_size)


def test_a_run_from_before_a_task_existed_is_read(system, params):
    older = {**params, "tasks": params["tasks"][:3]}
    wire = system.wire({"params": older}, system.frozen)
    np.testing.assert_array_equal(wire.latents.task("reconstruct", 1)[0, 0], params["tasks"][0])
    np.testing.assert_array_equal(wire.params["tasks"][3], params["tasks"][1])


def test_the_cosine_between_texts_is_that_of_all_pairs():
    z = jax.random.normal(jax.random.key(0), (4, 3, 5)) + 1.0
    mask = jnp.arange(3) < jnp.asarray([3, 2, 1, 3])[:, None]
    wire = Wire(z, mask, jnp.zeros((4, 3), jnp.int32), jnp.full(4, 12))
    plain = types.SimpleNamespace(informative=lambda wire: wire.z)
    means = [np.asarray(z[i, :n]).mean(0) for i, n in enumerate((3, 2, 1, 3))]
    unit = np.stack([m / np.linalg.norm(m) for m in means])
    wanted = (unit @ unit.T)[~np.eye(4, dtype=bool)].mean()
    np.testing.assert_allclose(losses.cosine_between(plain, wire), wanted, rtol=1e-5)
    alone = jax.tree.map(lambda x: x[:1], wire)
    np.testing.assert_allclose(losses.cosine_between(plain, alone), 0.0, atol=1e-5)


def test_the_commonest_guess_is_of_all_tokens_of_answers_but_their_stops():
    ids = jnp.array([[7, 3, 9, 0], [7, 9, 0, 0], [5, 7, 9, 1]])
    marked = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]], bool)
    said = losses._but_last(marked)
    assert said.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    share = losses.commonest_share(ids, said, 10)
    assert (float(share.sum), float(share.count)) == (3, 4)  # 7 of 7, 3, 7, 7


def test_training_on_answers_tells_the_commonest_guess(system, params, batches):
    batch, raw = batches
    _, aux = terms(system, params, batch)
    guess, gold = aux["answer_commonest"], aux["answer_commonest_gold"]
    given = zip(np.asarray(batch["inputs"]), np.asarray(batch["supervised"]), strict=True)
    tokens = np.concatenate([row[keep][:-1] for row, keep in given])
    assert float(gold.sum) == np.bincount(tokens).max() and float(gold.count) == len(tokens)
    assert 0 < float(guess.sum) <= float(guess.count) == len(tokens)
    assert "answer_commonest" not in terms(system, params, raw)[1]  # no latents are read there
