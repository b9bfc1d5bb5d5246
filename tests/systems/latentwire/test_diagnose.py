"""Statistics against constructed cases, and findings that name what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones import Backbone, ByteTokenizer
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core.errors import ConfigError
from latent_jax.systems.latentwire import causes, diagnose, symptoms
from latent_jax.systems.latentwire.api import LatentWire, compress_ids
from latent_jax.systems.latentwire.assets import check_parts
from latent_jax.systems.latentwire.beside_text import beside_text
from latent_jax.systems.latentwire.config import EncoderConfig, ModelConfig
from latent_jax.systems.latentwire.diagnose import Evidence
from latent_jax.systems.latentwire.findings import findings
from latent_jax.systems.latentwire.given import prefill
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.prompts import PromptBuilder
from latent_jax.systems.latentwire.suite import gradients
from latent_jax.train.diagnose import term_gradients
from latent_jax.train.testing import ToySystem

RNG = np.random.default_rng(0)


def test_repetition():
    assert diagnose.repeats("the the the the the") and diagnose.repeats("a b a b a b")
    assert not diagnose.repeats("") and not diagnose.repeats("the the")
    assert not diagnose.repeats("the mill at Dunmore burned in the year of the flood")


def test_prediction_histogram():
    p = diagnose.predictions(["The cat", "cat", "", "dog"])
    assert p["distinct"] == 3 and p["empty"] == 0.25 and p["distinct_words"] == 2
    assert p["commonest"][0] == ("cat", 2) and p["commonest_share"] == 0.5


def test_cosines_of_equal_and_of_random_latents():
    mask = np.ones((20, 3), bool)
    same = np.tile(RNG.normal(size=(1, 3, 64)), (20, 1, 1))
    assert diagnose.cosines(same, mask)["cosine"] == pytest.approx(1.0, abs=1e-5)
    free = diagnose.cosines(RNG.normal(size=(20, 3, 64)), mask)
    assert abs(free["cosine"]) < 0.1 and abs(free["slot_cosine"]) < 0.1
    two = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert diagnose.cosines(two, mask[:2, :1])["cosine"] == pytest.approx(0.0, abs=1e-6)


def _guesses(*shares, gold=0.06):
    """The log of a run whose commonest guess had these shares of its answers' tokens."""
    rng = np.random.default_rng(1)
    return [
        {"step": 10 + i, "answer_commonest": x + rng.uniform(-0.05, 0.05),
         "answer_commonest_gold": gold}
        for i, x in enumerate(shares)
    ]  # fmt: skip


def test_one_token_for_every_answer_is_named_with_the_step_it_began():
    def found(log):
        return list(symptoms.one_token(Evidence({}, {}, (), log)))

    learned, fell = [0.9] * 10 + [0.1] * 30, [0.1] * 30 + [0.9] * 40
    (line,) = found(_guesses(*fell))
    began = int(re.search(r"since step (\d+) of 79", line)[1])
    assert abs(began - 40) <= 4 and "one token, 9" in line and "has 6%" in line
    assert not found(_guesses(*learned))  # every run begins with one guess
    (line,) = found(_guesses(*[0.9] * 30))
    assert "since step 10 of 39" in line
    assert not found(_guesses(*fell, gold=0.5))  # the answers themselves are alike
    assert not found(_guesses(*[0.2] * 30, gold=0.01))
    assert not found(_guesses(*[0.9] * 9)) and not found([{"step": 1, "loss": 1.0}])
    assert any(x.startswith("one-token: since step") for x in findings(log=_guesses(*fell)))


def test_effective_rank():
    flat = np.eye(4).repeat(50, 0) - 0.25
    assert diagnose.spectrum(flat)["effective_rank"] == pytest.approx(3.0, rel=1e-3)
    line = np.outer(RNG.normal(size=100), np.ones(8))
    assert diagnose.spectrum(line)["effective_rank"] == pytest.approx(1.0, rel=1e-3)


def test_nearest_token_and_magnitudes():
    table = RNG.normal(size=(259, 16))
    (best,) = diagnose.nearest_tokens(3 * table[[97]], table, ByteTokenizer(), k=1)
    assert best == [("a", pytest.approx(1.0))]
    assert diagnose.norm_ratio(2 * table, table) == pytest.approx(2.0)
    s = diagnose.embedding_statistics(table, table)
    assert s["centre_shift"] == 0 and s["spread_ratio"] == pytest.approx(1.0)


def test_findings_name_the_symptoms(tmp_path):
    rows = [
        {"step": i, "latent_cosine": 0.1 * i, "share.answer": 0.9, "share.reconstruct": 0.1}
        for i in range(1, 11)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 11, "late')
    log = diagnose.read_log(path)
    assert len(log) == 10 and diagnose.first_step(log, "latent_cosine", 0.85) == 9
    statistics = {"cosine": 0.97, "norm_ratio": 30.0}
    results = {
        "ae.token_accuracy": 0.4, "ae.forced_accuracy": 0.8, "ae.token_accuracy.shuffled": 0.4,
        "squad.f1.latent": 0.1, "squad.f1.shuffled": 0.1,
        "squad.f1_gain.shuffled.ci95": [-0.1, 0.1],
    }  # fmt: skip
    samples = [{"kind": "answer", "predictions": {"latent": "the the the the"}}] * 10
    text = "\n".join(findings(statistics, results, samples, log))
    for symptom in ("collapsed", "since step 9", "30.00 times the norm", "term answer is 90%",
                    "repeat one word", "ignores them", "derails", "not surely better"):  # fmt: skip
        assert symptom in text
    healthy = {"cosine": 0.1, "norm_ratio": 1.0}
    assert findings(healthy, {"ae.token_accuracy": 0.9, "ae.forced_accuracy": 0.95}) == []


FAILED = {  # answers that are no better than from another's latents, of a reader that can answer
    "squad.f1.latent": 0.02, "squad.f1.shuffled": 0.02, "squad.f1.full_text": 1.0,
    "squad.f1_gain.shuffled.ci95": [-0.1, 0.1], "squad.em.latent": 0.02, "squad.nll.latent": 6.0,
}  # fmt: skip
WORKED = {
    "squad.f1.latent": 0.9, "squad.f1.shuffled": 0.02, "squad.f1.full_text": 1.0,
    "squad.f1_gain.shuffled.ci95": [0.8, 0.95], "squad.em.latent": 0.9, "squad.nll.latent": 0.3,
    "squad.empty.latent": 0.0, "squad.empty.full_text": 0.0, "squad.first_top1.full_text": 1.0,
}  # fmt: skip


def training(begin=6.0, end=0.1, steps=20, term="answer", weight=1.0, **more):
    """The log of one term that goes from one value to another."""
    values = np.linspace(begin, end, steps)
    return [
        {"step": i + 1, f"term.{term}": v, f"weight.{term}": weight, f"share.{term}": 1.0, **more}
        for i, v in enumerate(values)
    ]


def of(detector, results=WORKED, log=(), samples=(), **statistics):
    return list(detector(Evidence(statistics, results, samples, log)))


def answers(*said, gold=tuple("abcdefghij")):
    return [
        {"kind": "answer", "predictions": {"latent": text}, "answers": [right]}
        for text, right in zip(said, gold, strict=True)
    ]


def test_a_run_that_works_has_no_findings():
    log = training(answer_accuracy=0.99, **{"grad_norm.pool": 1.0, "skipped_total": 0.0})
    # Tasks alternate: each is all of the loss of its batch, which is no dominance.
    log += training(5.0, 2.5, term="reconstruct")
    statistics = {"cosine": 0.85, "norm_ratio": 1.0}
    assert findings(statistics, WORKED, answers(*"abcdefghij"), log) == []


def test_the_ends_of_a_log():
    log = [{"x": float(v)} for v in range(100)] + [{"y": 1.0}, {"x": float("nan")}]
    assert diagnose.ends(log, "x") == (4.5, 94.5)
    assert diagnose.ends(log, "y") is None and diagnose.ends([], "x") is None
    assert diagnose.ends([{"x": 1.0}] * 5, "x") is None


def test_divergence_and_standstill():
    (line,) = of(causes.diverged, log=training(6.0, 9.0))
    assert "answer rose from" in line and "lr" in line
    assert not of(causes.diverged, log=training(6.0, 9.0, weight=0.0))
    skipped = [{"step": i, "skipped_total": 0.2 * i} for i in range(1, 21)]
    assert of(causes.diverged, log=skipped) == [
        "4 of 20 steps were not finite: lower train.optimizer.lr"
    ]
    (line,) = of(causes.stuck, FAILED, training(6.0, 5.95))
    assert "hardly moved, 6.00 to 5.95" in line
    assert not of(causes.stuck, WORKED, training(6.0, 5.95))  # a start that was good already
    assert not of(causes.stuck, FAILED, training(6.0, 3.0))
    assert not of(causes.stuck, FAILED, training(6.0, 5.95) + training(term="reconstruct"))


def test_weights_that_are_off():
    rest = training(5.0, 2.0, term="reconstruct")
    (line,) = of(causes.never_weighted, log=training(weight=0.0) + rest)
    assert "answer was 0 in all of its 20 batches, its schedule never turned on" in line
    (line,) = of(causes.never_weighted, log=training(weight=0.0, **{"gate.answer": 0.0}) + rest)
    assert "gate never opened" in line
    ramp = [*training(weight=0.0), *training()]
    assert not of(causes.never_weighted, log=ramp + rest)
    # The extra weight on first tokens is off by default.
    assert not of(causes.never_weighted, log=training(term="first_token", weight=0.0))

    (line,) = of(causes.starved, log=training(6.0, 5.0, weight=1e-3) + rest)
    assert line.startswith("answer is 50% of the batches, 0.16% of the loss and still at 5.05 nats")
    assert not of(causes.starved, log=training(6.0, 0.1, weight=1e-3) + rest)  # learned anyway
    assert not of(causes.starved, log=training(6.0, 5.0) + rest)

    both = [{"share.answer": 0.05, "share.distil_states": 0.95}] * 3
    (line,) = of(causes.dominant, log=[*both, {"share.answer": 1.0, "share.first_token": 0.0}])
    assert line.startswith("the loss term distil_states is 95% of the loss")


def test_parts_without_gradient():
    rows = [{"grad_norm": 1.0, "grad_norm.lora_a": 0.0, "grad_norm.pool": 1.0}] * 12
    (line,) = of(causes.dead_parts, log=rows)
    assert line.startswith("lora_a had no gradient in any of 12 steps")
    assert not of(causes.dead_parts, log=[*rows, {"grad_norm.lora_a": 0.1}])
    assert not of(causes.dead_parts, log=rows[:5])
    rows = [{"lr.pool": 0.0, "lr.gate": 1e-3}] * 12
    (line,) = of(causes.held_parts, FAILED, rows)
    assert line.startswith("pool had learning rate 0 in all of 12 steps")
    assert not of(causes.held_parts, WORKED, rows)


def test_what_was_trained_is_not_what_is_asked():
    rest = training(5.0, 2.0, term="reconstruct")
    (line,) = of(causes.untrained_task, FAILED, rest)
    assert "F1 0.02" in line and "only reconstruct was trained" in line
    assert not of(causes.untrained_task, FAILED, rest + training())
    assert not of(causes.untrained_task, WORKED, rest)  # the start could answer already

    padded = training(1.5, 0.3, **{"term.first_token": 4.0})
    (line,) = of(causes.padding_learned, FAILED, padded)
    assert "0.36 nats per token, their first token 4.00" in line
    assert not of(causes.padding_learned, WORKED, padded)
    short = training(6.0, 3.0, **{"term.first_token": 6.0})
    assert not of(causes.padding_learned, FAILED, short)

    learned = training(6.0, 0.1, answer_accuracy=1.0)
    (line,) = of(causes.memorised, FAILED, learned)
    assert "100% of the answer tokens are right in training, 2% of the held-out answers" in line
    assert not of(causes.memorised, WORKED, learned)
    assert not of(causes.memorised, FAILED, training(6.0, 3.0, answer_accuracy=0.4))


def test_a_broken_evaluation_is_not_blamed_on_latents():
    empty = FAILED | {
        "squad.f1.full_text": 0.0, "squad.empty.full_text": 1.0, "squad.empty.latent": 1.0,
        "squad.first_top1.full_text": 1.0,
    }  # fmt: skip
    (line,) = findings(results=empty, samples=answers(*[""] * 10))
    assert line.startswith("empty-everywhere: 100% of the answers from the full text and 100% of")
    assert "first token is guessed right in 100%" in line
    wrong = FAILED | {"squad.f1.full_text": 0.03, "squad.empty.full_text": 0.1}
    (line,) = findings(results=wrong, samples=answers(*["7"] * 10))
    assert line.startswith("reader-fails: the reader answers with F1 0.03 from the full text")


def test_answers_that_are_empty_or_all_alike():
    (line,) = of(symptoms.empty_answers, FAILED | {"squad.empty.latent": 0.6})
    assert line.startswith("60% of the answers from latents are empty, 0% of those from the text")
    unanswerable = FAILED | {"squad.empty.latent": 0.6, "squad.empty.full_text": 0.5}
    assert not of(symptoms.empty_answers, unanswerable)
    (line,) = of(symptoms.collapsed_answers, samples=answers(*"77777abcde"))
    assert line.startswith("50% of the answers from latents are '7' (6 different ones to 10")
    # Where most right answers are alike, so may be those given.
    said = answers(*["yes"] * 6, *["no"] * 4, gold=["yes"] * 5 + ["no"] * 5)
    assert not of(symptoms.collapsed_answers, samples=said)
    assert not of(symptoms.repetitive_answers, samples=said)


def test_latents_of_another_size_or_without_content():
    (line,) = of(symptoms.magnitude, value_ratio=450.0)
    assert line.startswith("the latents' values have 450.00 times the norm of those of text")
    assert not of(symptoms.magnitude, value_ratio=1.5, norm_ratio=1.0)
    (line,) = of(symptoms.span_means, FAILED, span_mean_cosine=0.99)
    assert line.startswith("latents have cosine 0.99 to the mean of their span")
    assert not of(symptoms.span_means, WORKED, span_mean_cosine=0.99)


def test_a_deep_prefix_beside_its_text():
    """Untrained pooled slots are the means of their spans, whatever that makes of their size."""
    reader = tiny_config("llama", vocab_size=300)
    config = ModelConfig(segment=6, sink=False, encoder=EncoderConfig(slots="pooled"))
    ids = jnp.asarray(RNG.integers(0, 256, (3, 6)), jnp.int32)
    mask = jnp.arange(6) < jnp.array([[6], [5], [4]])
    body = Backbone(
        "random", reader, random_params(reader, jax.random.key(0)), ByteTokenizer(), "",
        Decoder(reader),
    )  # fmt: skip
    params = jax.jit(Compressor(config, reader).init)(jax.random.key(1), body.params, ids, mask)
    wire = LatentWire(body, config, params["params"], PromptBuilder(body.tokenizer))
    z = compress_ids(wire.latents, ids, mask)
    out = beside_text(wire, z, ids, mask)
    cache = prefill(body.decoder, body.params, ids, mask)
    v = np.asarray(cache.v).transpose(1, 2, 0, 3, 4).reshape(3, 6, -1)
    spans = [v[0, :4], v[0, 4:6], v[1, :4], v[1, 4:5], v[2, :4]]
    size = lambda rows: np.linalg.norm(rows, axis=-1)  # noqa: E731
    # A map weighs all four places of a span by a quarter, also where the text fills fewer.
    own = np.mean([size(s.sum(0) / 4) for s in spans])
    text = np.concatenate([size(v[i, :n]) for i, n in enumerate((6, 5, 4))]).mean()
    assert out["value_ratio"] == pytest.approx(own / text, rel=1e-4)
    assert out["span_mean_cosine"] == pytest.approx(1.0, abs=1e-4)
    double = params["params"] | {"pool": jax.tree.map(lambda x: 2 * x, params["params"]["pool"])}
    z = compress_ids(dataclasses.replace(wire, params=double).latents, ids, mask)
    again = beside_text(wire, z, ids, mask)
    assert again["value_ratio"] == pytest.approx(2 * out["value_ratio"], rel=1e-4)
    assert again["span_mean_cosine"] == pytest.approx(1.0, abs=1e-4)


def test_parts_of_the_training_are_parts_of_the_evaluation():
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)  # noqa: E731
    trained = {"memory": shape(4), "lora": {"q_a": shape(2, 3)}, "tasks": shape(4, 4)}
    check_parts(trained, trained | {"tasks": shape(5, 4)})  # tasks may be added
    with pytest.raises(ConfigError, match=r"20 parameters, 26 were trained \(trained and left out: "
                                          r"lora/q_a\); evaluate with"):  # fmt: skip
        check_parts(trained, {"memory": shape(4), "tasks": shape(4, 4)})
    with pytest.raises(ConfigError, match=r"\(never trained: prompt\)"):
        check_parts(trained, trained | {"prompt": shape(8, 4)})
    with pytest.raises(ConfigError, match=r"memory is \(4,\), not \(8,\)"):
        check_parts(trained, trained | {"memory": shape(8)})


def test_formats_that_lose():
    lossy = {"wire.int4.f1_loss": 0.3, "wire.int4.f1_loss.ci95": [0.2, 0.4],
             "wire.int8.f1_loss": 0.0, "wire.int8.f1_loss.ci95": [-0.01, 0.01]}  # fmt: skip
    (line,) = of(symptoms.lossy_format, lossy)
    assert line.startswith("latents sent as int4 lose 0.30 F1 (0.20 to 0.40)")


def test_latent_statistics_are_flat_numbers():
    z, mask = RNG.normal(size=(10, 4, 16)), np.arange(4)[None] < np.array([[4]] * 5 + [[2]] * 5)
    out = diagnose.latent_statistics(z, mask)
    assert all(isinstance(v, float) for v in out.values())
    assert out["norm"] == pytest.approx(4.0, rel=0.1) and out["effective_rank"] > 8


def test_gradients_of_a_run_are_of_the_terms_that_have_a_weight_at_its_end():
    system = ToySystem(noise=0.0)
    batch = next(system.train_data("main", None))
    variables = system.init({"params": jax.random.key(0)}, batch)
    system.config = SimpleNamespace(train=SimpleNamespace(steps=10))
    found = gradients(system, variables, system.frozen)
    rows = term_gradients(system, variables, system.frozen, batch, step=9)
    assert found["gradient.norm.mse"] == pytest.approx(rows["mse"]["grad_norm"], rel=1e-5)
    assert found["gradient.body.mse"] == pytest.approx(rows["mse"]["grad_norm.body"], rel=1e-5)
    system.weights = dict(system.weights) | {"l2": 0.0}
    assert "gradient.norm.l2" in found
    assert "gradient.norm.l2" not in gradients(system, variables, system.frozen)
