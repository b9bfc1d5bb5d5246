"""The two evaluations end to end on a tiny random reader, with a compressor that is one too."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from latent_jax.backbones import ByteTokenizer
from latent_jax.backbones.testing import byte_reader as reader
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.data.squad import QAExample
from latent_jax.systems.latentwire import baselines, evaluate, faults
from latent_jax.systems.latentwire.bits import Rounded
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import (
    AdapterConfig,
    EncoderConfig,
    ModelConfig,
    ReaderConfig,
    WireConfig,
)
from latent_jax.systems.latentwire.continuation import continuable, evaluate_continuation
from latent_jax.systems.latentwire.evaluate import Row
from latent_jax.systems.latentwire.given import Asked
from latent_jax.systems.latentwire.model import Compressor, Wire
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig, qa_batch
from latent_jax.systems.latentwire.readers import ReaderAdapter, ReaderLatents
from latent_jax.systems.latentwire.reconstruct import rebuild
from latent_jax.systems.latentwire.scoring import batch_widths, score_answers

SEGMENT = 16


@functools.cache
def latents(private=0):
    encoder = EncoderConfig(lora_rank=2)
    model = ModelConfig(ratio=4.0, segment=SEGMENT, encoder=encoder, private=private)
    module = Compressor(model, reader().config)
    ids = np.ones((2, SEGMENT), np.int32)
    frozen = reader().params
    params = module.init(jax.random.key(1), frozen, ids, ids > 0)["params"]
    return Latents(module, params, frozen)


def examples(n=6):
    return [
        QAExample(str(i), "t", f"k{i // 2}: {'ab'[i % 2] * (1 + i)}.", f"k{i}?", (f"v{i}",))
        for i in range(n)
    ]


def builder(**options):
    return PromptBuilder(reader().tokenizer, PromptConfig(question="\n{q}", **options))


def qa(arms, rows=None, **options):
    settings = {"ratio": 4.0, "batch_size": 4, "segment": SEGMENT, "max_new_tokens": 4} | options
    return evaluate.evaluate_qa(
        reader(), latents(), rows or examples(), arms, builder=builder(), **settings
    )


def test_questions_from_every_kind_of_arm():
    seen = []
    arms = ("latent", "full_text", "shuffled", "zero", "no_context")
    soft = {"full_text": np.zeros((3, reader().config.hidden_size), np.float32)}
    out, samples = qa(arms, tuned=soft, progress=lambda *a: seen.append(a))
    for arm in (*arms, "full_text_tuned"):
        low, high = out[f"squad.f1.{arm}.ci95"]
        assert low <= out[f"squad.f1.{arm}"] <= high
        assert 0 <= out[f"squad.em.{arm}"] <= out[f"squad.f1.{arm}"] <= 1
        assert out[f"squad.nll.{arm}"] > 0
        assert out[f"squad.first_top1.{arm}"] <= out[f"squad.first_top5.{arm}"]
        assert out[f"squad.first_margin.{arm}"] > 0
        assert 0 < out[f"squad.first_entropy.{arm}"] < np.log(reader().config.vocab_size)
    assert out["squad.questions"] == 6 and out["squad.left_out"] == 0
    assert 3 < out["squad.ratio"] <= 4
    assert "squad.f1_gain.shuffled" in out
    assert [s["id"] for s in samples] == [e.id for e in examples()]
    assert set(samples[0]["predictions"]) == {*arms, "full_text_tuned"}
    assert seen[-1][1:] == (12, 12)
    # An untrained wire says something else than the text, and its owner matters to the likelihood.
    nll = {a: out[f"squad.nll.{a}"] for a in arms}
    assert len({round(v, 5) for v in nll.values()}) == len(arms)


def test_attended_padding_shows_and_a_mask_hides_it():
    """In the text's padding as in the prompt's, which alone stands behind latents."""
    arms, rows = ("latent", "full_text"), examples()
    rows = [dataclasses.replace(e, question="?" * (i + 1)) for i, e in enumerate(rows)]
    sound, _ = qa(arms, rows)
    broken, _ = qa(arms, rows, faults=(faults.PADDING,))
    for arm in arms:
        assert sound[f"squad.padding.{arm}"] < 1e-4
        assert broken[f"squad.padding.{arm}"] > 1e-2
    # No prompt is padded: what shows then is the text's padding.
    question = "k" * (16 - len(builder().prompt_ids("")))
    same = [dataclasses.replace(e, question=question) for e in rows]
    broken, _ = qa(("full_text",), same, faults=(faults.PADDING,))
    assert broken["squad.padding.full_text"] > 1e-2


def test_the_batch_size_changes_nothing():
    arms = ("latent", "shuffled", "scrambled")
    first, a = qa(arms)
    second, b = qa(arms, batch_size=6)
    assert [s["predictions"] for s in a] == [s["predictions"] for s in b]
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], rtol=1e-4, atol=1e-4, err_msg=key)


def test_what_is_decoded_is_what_is_scored():
    """With its own first answer as the gold one, the reader is right every time."""
    _, samples = qa(("full_text",), score=False)
    echo = [
        QAExample(e.id, e.title, e.context, e.question, (s["predictions"]["full_text"],))
        for e, s in zip(examples(), samples, strict=True)
    ]
    out, _ = qa(("full_text",), rows=echo, score=False)
    assert out["squad.em.full_text"] == 1.0 and "squad.nll.full_text" not in out


def test_a_long_text_is_rebuilt_segment_by_segment():
    """Private latents or not: rows of other lengths would mix segments."""
    own = latents(private=2)
    ids = np.random.default_rng(0).integers(97, 122, (2, 2 * SEGMENT)).astype(np.int32)
    mask = np.arange(2 * SEGMENT) < np.array([[2 * SEGMENT], [SEGMENT - 3]])
    long = baselines.encode(own, ids, mask)
    assert own.segments(long).mask.sum(1).tolist() == [6, 6, 6, 0]
    whole, real = rebuild(reader(), own, long, SEGMENT)
    np.testing.assert_array_equal(real, mask)
    apart = baselines.encode(own, ids[0].reshape(2, SEGMENT), np.ones((2, SEGMENT), bool))
    parts, _ = rebuild(reader(), own, apart, SEGMENT)
    np.testing.assert_array_equal(whole[0], parts.reshape(-1))


def test_a_latent_is_counted_once_however_many_entries_it_becomes():
    adapter = AdapterConfig(kind="soft", entries=4)
    model = ModelConfig(
        ratio=4.0, segment=SEGMENT, adapter=adapter, wire=WireConfig(d_z=2), private=1,
        readers={"other": ReaderConfig(name="tiny", private=2, entries=3)},
    )  # fmt: skip
    z, mask = np.zeros((1, 14, 2), np.float32), np.ones((1, 14), bool)
    wire = Wire(z, mask, np.zeros((1, 14), np.int32), np.array([2 * SEGMENT]))
    own = Latents(Compressor(model, reader().config), {}, {})
    other = ReaderLatents(ReaderAdapter(model, "other", reader().config, 2), own, {}, {})
    assert baselines.received(own, wire).sum() == 2 * (4 + 1)
    assert baselines.received(other, wire).sum() == 2 * (4 + 2)
    assert baselines.received(Rounded(own, None, "int8"), wire).sum() == 2 * (4 + 1)
    assert other.segments(wire).mask.shape == (2, 7)


def test_a_rebuilt_text_is_read_as_text(monkeypatch):
    """Rebuilt without a fault it is the full text, with or without a soft prompt."""

    def perfect(reader, latents, wire, *_):
        return texts[tuple(np.asarray(wire.length).tolist())]

    texts, real = {}, baselines.encode

    def remember(latents, ids, mask):
        texts[tuple(np.asarray(mask).sum(1).tolist())] = (np.asarray(ids), np.asarray(mask))
        return real(latents, ids, mask)

    monkeypatch.setattr(baselines, "encode", remember)
    monkeypatch.setattr(evaluate, "rebuild", perfect)
    arms = ("full_text", "rebuilt", "full_text_prompted", "rebuilt_prompted")
    out, samples = qa(arms)
    for metric in ("nll", "f1"):
        for suffix in ("", "_prompted"):
            np.testing.assert_allclose(
                out[f"squad.{metric}.rebuilt{suffix}"], out[f"squad.{metric}.full_text{suffix}"],
                rtol=1e-5,
            )  # fmt: skip
    assert out["squad.nll.full_text"] != out["squad.nll.full_text_prompted"]
    assert all(s["predictions"]["rebuilt"] == s["predictions"]["full_text"] for s in samples)


def test_shuffled_never_uses_the_same_passage():
    passages = ["a", "b", "a", "c", "a", "a", "b"] * 5
    rows = [
        Row(QAExample(str(i), "", p, "", ("",)), [1], [1], [1], [1]) for i, p in enumerate(passages)
    ]
    for seed in range(20):
        partner = evaluate.partners(rows, seed)
        assert all(passages[i] != passages[j] for i, j in enumerate(partner))
    assert len(set(partner)) > 5
    with pytest.raises(DataError, match="at least two passages"):
        evaluate.partners(rows[:1], 0)


def test_bad_requests_are_one_clear_line():
    with pytest.raises(ConfigError, match="unknown arm 'latents'"):
        qa(("latents",))
    with pytest.raises(ConfigError, match="needs a trained soft prompt"):
        qa(("full_text_tuned",))
    with pytest.raises(DataError, match="fits 2 tokens"):
        qa(("full_text",), max_context=2)
    with pytest.raises(ConfigError, match="trained parts"):
        evaluate.check_arms((), ("latent",))
    with pytest.raises(ConfigError, match="set model.prompt_tokens"):
        evaluate.check_arms(("full_text_prompted",))
    with pytest.raises(ConfigError, match="'latent' has the prompt already"):
        evaluate.check_arms(("latent_prompted",), (), 4)


def test_reconstruction_metrics_and_samples():
    segments = np.random.default_rng(0).integers(97, 122, (7, SEGMENT)).astype(np.int32)
    settings = {"segment": SEGMENT, "batch_size": 3}
    out, samples = evaluate.evaluate_ae(reader(), latents(), segments, samples=2, **settings)
    assert out["ratio"] == 4.0 and out["ae.segments"] == 7
    for suffix in ("", ".shuffled", ".zero"):
        assert 0 <= out[f"ae.token_accuracy{suffix}"] <= 1
        assert 0 <= out[f"ae.exact_prefix{suffix}"] <= SEGMENT
        low, high = out[f"ae.nll{suffix}.ci95"]
        assert low <= out[f"ae.nll{suffix}"] <= high
    assert out["ae.nll"] != out["ae.nll.shuffled"]
    assert len(samples) == 2 and samples[0]["text"] == reader().tokenizer.decode(segments[0])
    assert len(samples[0]["tokens"]) == SEGMENT and "shuffled" in samples[0]
    one, _ = evaluate.evaluate_ae(
        reader(), latents(), segments, arms=("latent", "zero"), **settings | {"batch_size": 7}
    )
    for key in one:
        np.testing.assert_allclose(one[key], out[key], rtol=1e-4, atol=1e-4, err_msg=key)


def test_text_arms_are_asked_for_the_text_as_latents_are():
    segments = np.random.default_rng(2).integers(97, 122, (3, SEGMENT)).astype(np.int32)
    arms = ("latent", "full_text_prompted", "kv_stride_prompted", "no_context_prompted")
    settings = {"segment": SEGMENT, "batch_size": 3, "samples": 0}
    out, _ = evaluate.evaluate_ae(reader(), latents(), segments, arms=arms, sink=2, **settings)
    assert len({out["ae.nll"], *(out[f"ae.nll.{arm}"] for arm in arms[1:])}) == 4
    # By hand: the cache of sink and text, the learned embedding, the text once more.
    body, frozen = reader().decoder, reader().params
    apply = functools.partial(body.apply, {"params": frozen})
    text = np.concatenate([np.full((3, 1), 2), segments], axis=1)
    x = apply(text, method="embed")
    again = jax.numpy.concatenate([x, latents().task("reconstruct", 3), x[:, 1:-1]], axis=1)
    logits = apply(apply(again).hidden[:, -SEGMENT:], method="unembed")
    logp = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(logp), segments[..., None], axis=2).mean()
    np.testing.assert_allclose(out["ae.nll.full_text_prompted"], nll, rtol=1e-3)
    with pytest.raises(ConfigError, match="with _prompted"):
        evaluate.evaluate_ae(reader(), latents(), segments, arms=("full_text",), **settings)


def test_what_follows_a_text_is_scored_from_every_arm():
    windows = np.random.default_rng(3).integers(97, 122, (5, SEGMENT + 6)).astype(np.int32)
    arms = ("latent", "full_text", "no_context", "kv_stride", "shuffled", "token_budget_tail")
    settings = {"ratio": 4.0, "segment": SEGMENT, "sink": 2}
    out = evaluate_continuation(
        reader(), latents(), windows, SEGMENT, arms, batch_size=4, **settings
    )
    again = evaluate_continuation(
        reader(), latents(), windows, SEGMENT, arms[:2], batch_size=5, **settings
    )
    for key in again:
        np.testing.assert_allclose(out[key], again[key], rtol=1e-4, atol=1e-5, err_msg=key)
    assert len({round(out[f"continuation.nll.{arm}"], 6) for arm in arms}) == len(arms)
    gap = out["continuation.nll.latent"] - out["continuation.nll.full_text"]
    assert out["continuation.nll_gap.latent"] == pytest.approx(gap)
    low, high = out["continuation.nll_gap.latent.ci95"]
    assert low <= gap <= high
    assert out["continuation.tokens"] == 5 and out["continuation.length"] == SEGMENT
    # By hand: the text goes on as it is; its first token is given.
    apply = functools.partial(reader().decoder.apply, {"params": reader().params})
    text = np.concatenate([np.full((5, 1), 2), windows], axis=1)
    states = apply(apply(text, method="embed")).hidden[:, -6:-1]
    logp = np.asarray(jax.nn.log_softmax(apply(states, method="unembed")))
    nll = -np.take_along_axis(logp, windows[:, -5:, None], axis=2).mean()
    np.testing.assert_allclose(out["continuation.nll.full_text"], nll, rtol=1e-3)


def test_continuations_that_cannot_be_scored_are_refused():
    windows = np.ones((3, 9), np.int32)
    score = functools.partial(evaluate_continuation, reader(), latents(), ratio=4.0)
    with pytest.raises(DataError, match="2 tokens after"):
        score(windows, 8, ("full_text",))
    with pytest.raises(ConfigError, match="no arm cramming, full_text_prompted"):
        score(windows, 4, ("latent", "cramming", "full_text_prompted"))
    known = continuable(["latent", "rebuilt", "full_text_prompted", "full_text", "kv_question"])
    assert known == ["latent", "full_text"]


def test_longer_texts_are_compressed_in_segments():
    segments = np.random.default_rng(1).integers(97, 122, (2, SEGMENT + 8)).astype(np.int32)
    out, _ = evaluate.evaluate_ae(
        reader(), latents(), segments, arms=("latent",), segment=SEGMENT, batch_size=2
    )
    assert out["ratio"] == pytest.approx(24 / 6)
    with pytest.raises(DataError, match="at least 2"):
        evaluate.evaluate_ae(reader(), latents(), segments[:1])


def test_the_prompt_splits_where_the_answer_begins():
    b = builder()
    prompt, gold = b.supervised("who?", "Bob")
    joint = b.tokenizer.encode("\nwho?\nAnswer: Bob")
    assert prompt + gold[:-1] == joint and gold[-1] == b.stop_id
    assert b.text([*b.tokenizer.encode(" Bob\nQuestion"), 3]) == "Bob"
    assert b.text([b.stop_id, 65]) == ""
    batch = qa_batch(b, [[1, 2]], ["who?"], ["Bob"], (4, 20, 8))
    assert batch["prompt_mask"][0, -1] and not batch["prompt_mask"][0, 0]
    assert batch["answer_ids"][0, batch["answer_mask"][0]].tolist() == gold


class _Merging(ByteTokenizer):
    """Merges ``: `` into one token, as a tokenizer might that starts no word with a space."""

    def encode(self, text):
        return super().encode(text.replace(": ", "\x01"))


def test_a_tokenizer_that_merges_across_the_boundary_is_refused():
    b = PromptBuilder(_Merging(), PromptConfig())
    with pytest.raises(DataError, match="does not start a token of its own"):
        b.supervised("who?", "Bob")
    with pytest.raises(ConfigError, match="chat needs"):
        PromptBuilder(ByteTokenizer(), PromptConfig(format="chat"))


def test_few_widths_are_compiled_for():
    assert batch_widths([10, 20, 40, 60], 16) == [64] * 4
    assert batch_widths([10] * 4 + [60], 16) == [16] * 4 + [64]
    assert batch_widths([10, 10, 30, 30, 60], 16, least=2) == [16, 16, 32, 32, 64]
    assert batch_widths([10, 30, 30, 60], 16, least=3) == [32, 32, 32, 64]


def test_decoding_is_compiled_once_for_all_arms():
    arms = ("latent", "full_text", "token_budget_head", "kv_stride", "no_context", "zero")
    before = score_answers._cache_size()
    qa(arms, batch_size=3)  # a batch size no other test uses
    assert score_answers._cache_size() == before + 1


def test_margin_and_entropy_of_the_first_token_by_hand():
    body, params = reader().decoder, reader().params
    prompt, gold = (np.arange(97, 97 + 2 * n, dtype=np.int32).reshape(2, n) for n in (5, 3))
    given = baselines.Given(None, None, None, np.zeros(2, np.int32))
    asked = Asked(given, prompt, prompt > 0)
    found = score_answers(body, params, asked, gold, gold > 0)
    hidden = body.apply({"params": params}, body.apply({"params": params}, prompt, method="embed"))
    logits = body.apply({"params": params}, hidden.hidden[:, -1:], method="unembed")[:, 0]
    p = np.sort(np.asarray(jax.nn.softmax(logits)))
    np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(found["margin"], np.log(p[:, -1] / p[:, -2]), rtol=1e-3, atol=1e-5)
