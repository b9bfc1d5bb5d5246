"""The span head: what it is told of answers, what it learns, and that it stands beside them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader as reader
from latent_jax.core.config import parse
from latent_jax.core.errors import DataError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import evaluate, recipe, span_head, span_training
from latent_jax.systems.latentwire.config import LatentWireRun
from latent_jax.systems.latentwire.given import Asked, Given, prefill
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig, pad_rows
from latent_jax.systems.latentwire.scoring import decode
from latent_jax.systems.latentwire.span_head import SpanHead, Spoken

BUILDER = PromptBuilder(reader().tokenizer, PromptConfig(question="\n{q}"))
SETTINGS = {"ratio": 4.0, "batch_size": 4, "segment": 16, "max_new_tokens": 5, "builder": BUILDER}
ROWS = [QAExample(f"{i}", "t", f"k{i}: {i}{i}.", f"k{i}?", (f"{i}{i}",)) for i in range(3)]


def whole(width: int) -> SpanHead:
    return SpanHead(jnp.zeros(width), jnp.ones(width), jnp.zeros((width, 2)), jnp.ones(2))


@pytest.mark.parametrize(
    "said, text", [("it is 42", "it is 42"), (" 42. ", "42."), ("a\nb", "a"), ("", ""), (" ", "")]
)
def test_the_pieces_of_an_answer_are_its_text(said, text):
    ids = [*reader().tokenizer.encode(said), *([BUILDER.stop_id] * 2)]
    found = span_head.pieces(BUILDER, ids)
    assert found[0] == text == BUILDER.text(ids)
    count = len(found[1]) - 1
    assert (count == 0) == (not text)
    if count:
        assert span_head.span_text(found, 0, count - 1) == text
    if said == "it is 42":  # of bytes
        assert span_head.span_text(found, 6, 7) == "42"
        assert span_head.span_text(found, 5, 7) == "42"


def spoken(n: int = 60, t: int = 7, seed: int = 0) -> Spoken:
    """Answers whose right part begins and ends where two directions of the states say."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(n, t, 6)).astype(np.float32)
    lengths = rng.integers(3, t + 1, n)
    mask = np.arange(t) < lengths[:, None]
    first = (rng.random(n) * lengths).astype(int)
    last = first + (rng.random(n) * (lengths - first)).astype(int)
    states[np.arange(n), first, 0] += 6
    states[np.arange(n), last, 1] += 6
    i, j = np.arange(t)[:, None], np.arange(t)
    both = np.minimum(last[:, None, None], j) - np.maximum(first[:, None, None], i) + 1
    size = np.maximum((last - first + 1)[:, None, None] + (j - i + 1), 1)
    f1 = np.where((both > 0) & (i <= j) & mask[:, None] & mask[:, :, None], 2 * both / size, 0)
    return Spoken(states, mask, f1.astype(np.float32))


def kept(head: SpanHead, told: Spoken) -> float:
    scores = span_head.span_scores(head, *map(jnp.asarray, told[:2]))
    best = np.asarray(scores).reshape(len(told.mask), -1).argmax(1)
    return float(told.f1.reshape(len(best), -1)[np.arange(len(best)), best].mean())


def test_it_learns_where_answers_begin_and_end():
    told, others = spoken(), spoken(40, seed=1)
    start = span_head.fit(told, steps=1)
    assert kept(whole(6), others) < 0.8
    head = span_head.fit(told, steps=400)
    assert kept(head, others) > 0.97 > 0.9 > kept(start, others)
    # It is no worse than what it starts as on answers that it was not trained on: noise is not
    # learned.
    noise = Spoken(np.zeros_like(told.states), told.mask, told.f1)
    assert kept(span_head.fit(noise, steps=20), noise) >= kept(whole(6), noise)


def test_before_training_answers_are_kept_whole():
    told = spoken()
    scores = span_head.span_scores(whole(6), jnp.asarray(told.states), jnp.asarray(told.mask))
    best = np.asarray(scores).reshape(len(told.mask), -1).argmax(1)
    np.testing.assert_array_equal(best, told.mask.sum(1) - 1)


def test_the_loss_is_that_of_the_best_spans_and_answers_without_any_have_none():
    told = spoken(4)
    head = whole(6)._replace(kernel=jax.random.normal(jax.random.key(0), (6, 2)))
    scores = np.asarray(span_head.span_scores(head, *map(jnp.asarray, told[:2])))
    wanted = []
    for row, f1 in zip(scores, told.f1, strict=True):
        p = np.exp(row - row.max())
        wanted.append(-np.log(p[f1 == f1.max()].sum() / p.sum()))
    np.testing.assert_allclose(span_head.span_loss(head, told), np.mean(wanted), rtol=1e-5)
    # One answer is wrong, one is empty.
    told.f1[0] = 0
    told.f1[1], told.mask[1] = 0, False
    loss, grads = jax.value_and_grad(span_head.span_loss, allow_int=True)(head, Spoken(*told))
    np.testing.assert_allclose(loss, np.mean(wanted[2:]), rtol=1e-5)
    assert np.isfinite(grads.kernel).all() and float(jnp.abs(grads.kernel).max()) > 0


def test_states_are_those_from_which_the_reader_went_on():
    rng = np.random.default_rng(0)
    texts = pad_rows([rng.integers(97, 122, n).tolist() for n in (8, 5, 3)], 8)
    prompts = pad_rows([rng.integers(97, 122, n).tolist() for n in (4, 6, 2)], 6, left=True)
    body, params = reader().decoder, reader().params
    given = Given(prefill(body, params, *texts), None, None, texts[1].sum(-1))
    asked = Asked(given, *map(jnp.asarray, prompts))
    ids, lengths = decode(reader(), asked, 5, ())
    states = span_head.said_states(body, params, asked, jnp.asarray(ids), jnp.asarray(lengths))
    assert states.shape == (*ids.shape, reader().config.hidden_size)
    logits = body.apply({"params": params}, states, method="unembed")
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, :-1], ids[:, 1:])


def test_it_is_reported_beside_the_greedy_score():
    call = (reader(), None, ROWS, ("full_text", "no_context"))
    plain, samples = evaluate.evaluate_qa(*call, score=False, **SETTINGS)
    cut = span_head.Cutter(BUILDER, whole(reader().config.hidden_size))
    found, same = evaluate.evaluate_qa(
        *call, score=False, extract=("span",), listener=cut, **SETTINGS
    )
    assert {k: v for k, v in found.items() if k in plain} == plain and same == samples
    for arm in call[3]:
        assert found[f"squad.extract.span.f1.{arm}"] == plain[f"squad.f1.{arm}"]
        assert [cut.said[arm][i] for i in range(3)] == [s["predictions"][arm] for s in samples]
    # One that keeps the first token alone.
    first = whole(reader().config.hidden_size)._replace(whole=jnp.array([9.0, -9.0]))
    short = span_head.Cutter(BUILDER, first)
    evaluate.evaluate_qa(*call, score=False, extract=("span",), listener=short, **SETTINGS)
    assert all(len(x) <= 1 for x in short.said["full_text"].values())
    assert max(len(s["predictions"]["full_text"]) for s in samples) > 1


RUN = {
    "system": "latentwire",
    "model": {"segment": 16, "ratio": 4, "encoder": {"slots": "pooled"}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "questions": 20, "mix": {"answer": 1.0}},
    "eval": {"segments": 0, "questions": 4, "extract": ["span"], "span_questions": 9,
             "span_steps": 3},
    "train": {"steps": 6, "batch_size": 2},
}  # fmt: skip


def test_it_learns_from_training_questions_and_their_text_alone(monkeypatch):
    config = parse(LatentWireRun, RUN)
    seen = []

    def answers(reader, latents, examples, arms, **options):
        seen.append((latents, examples, arms))
        told = spoken(len(examples))
        options["listener"].batches.append(told)

    monkeypatch.setattr(span_training, "evaluate_qa", answers)
    system = SimpleNamespace(config=config, builder=BUILDER)
    cut = span_training.cutter(system, reader(), BUILDER)
    ((latents, examples, arms),) = seen
    assert latents is None and arms == ("full_text",) and len(examples) == 9
    held, _ = recipe.questions(config, BUILDER, "validation", 100)
    assert not {x.id for x in examples} & {x.id for x in held}
    assert isinstance(cut, span_head.Cutter)
    other = dataclasses.replace(config, eval=dataclasses.replace(config.eval, extract=()))
    system = SimpleNamespace(config=other, builder=BUILDER)
    assert span_training.cutter(system, reader(), BUILDER) is None


def test_training_questions_that_do_not_fit_are_told_before_training(monkeypatch):
    from latent_jax.systems.latentwire.system import LatentWireSystem

    system = LatentWireSystem(parse(LatentWireRun, RUN), reader())
    own = recipe.questions

    def none(config, builder, split, *rest):
        if split == "train" and rest == (1,):
            raise DataError("no passage of the train split")
        return own(config, builder, split, *rest)

    monkeypatch.setattr(recipe, "questions", none)
    with pytest.raises(DataError, match="train split"):
        system.train_data("main", None)
