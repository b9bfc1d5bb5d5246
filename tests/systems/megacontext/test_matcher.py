"""Late interaction between questions and the tokens of a history."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import backbones, cli
from latent_jax import run as runs
from latent_jax.assets import asset
from latent_jax.backbones.sink import sink_token
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext import episodes, match_assets, match_data, matcher, policies
from latent_jax.systems.megacontext.focus import Focus, RuntimeConfig
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.matcher import (
    Finder,
    Matcher,
    States,
    interaction,
    matching,
    whitened,
)
from latent_jax.systems.megacontext.model_config import MatcherConfig
from latent_jax.systems.megacontext.reranker import Reranker
from latent_jax.systems.megacontext.store import GistTree, TreeSpec

CONFIG = MatcherConfig(layers=(1, 3), width=16, window=4, question=6)
BLOCK = 8
TEXT = (
    "The mill at Dunmore burned down in 1911. Nobody was hurt when the bridge fell. A ship left "
    "the harbour at dawn with forty sacks of corn, and the keeper of the light wrote it down. "
) * 3


@pytest.fixture(scope="module")
def reader():
    return backbones.load("tiny")


@pytest.fixture(scope="module")
def ids(reader):
    found = np.asarray(reader.tokenizer.encode(TEXT), np.int32)
    return found[: len(found) // BLOCK * BLOCK]


@pytest.fixture(scope="module")
def params(reader, ids):
    """Both maps the principal directions of the text's states."""
    states = States(reader, CONFIG.layers)
    found = np.concatenate(list(states(ids[None, :120], np.ones((1, 120), bool))))
    blank = Matcher(CONFIG.width).init(jax.random.key(0), jnp.zeros((1, 2, states.width)))
    start = {"kernel": jnp.asarray(whitened(found, CONFIG.width))}
    return {**blank["params"], "question": start, "history": start}


@pytest.fixture(scope="module")
def finder(reader, params):
    return Finder(reader, CONFIG, BLOCK, params)


def test_the_best_cosine_of_a_block_and_the_next_weighted():
    rng = np.random.default_rng(0)
    asked, stored = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 4), (5, 12, 4)))
    weight, real = rng.random((2, 3)).astype(np.float32), np.arange(12) < 7 + np.arange(5)[:, None]
    found = np.asarray(interaction(asked, weight, stored, real, 4))
    assert found.shape == (2, 5, 3)
    for b, n, k in np.ndindex(found.shape):
        stop = min(k * 4 + 8, 12)
        cosine = np.where(real[n], asked[b] @ stored[n].T, -1.0)[:, k * 4 : stop]
        assert found[b, n, k] == pytest.approx(float(weight[b] @ cosine.max(1)), abs=1e-5)


def test_whitened_directions_have_unit_variance():
    x = np.random.default_rng(0).standard_normal((500, 6)) * [9, 4, 2, 1, 0.5, 0.1] + 3
    y = (x - x.mean(0)) @ whitened(x, 4)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(4), atol=0.02)


def test_ranks_leave_nothing_to_the_rest():
    found = policies.first_ones(np.array([3.0, 9.0, -1.0, 5.0]), 2)
    assert found.tolist() == [0.0, 1.0, 0.0, 0.75]
    assert policies.of_blocks(np.array([3.0, 4.0]), 3).tolist() == [3.0, 4.0, 4.0]
    assert policies.of_blocks(np.array([1.0]), 1).tolist() == [1.0]


def batch(rows=3, blocks=4, width=12):
    rng = np.random.default_rng(1)
    tokens = blocks * BLOCK
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float16)  # noqa: E731
    fact = np.zeros((rows, blocks), bool)
    fact[np.arange(rows), [1, 2, 1]] = True
    return {
        "question": draw(rows, 5, width), "question_mask": np.ones((rows, 5), bool),
        "passage": draw(rows, tokens, width),
        "passage_mask": np.arange(tokens) < np.array([32, 24, 32])[:, None],
        "fact": fact, "same": np.array([7, 8, 7], np.int32), "other": draw(rows, tokens, width),
    }  # fmt: skip


def lost(params, batch):
    return float(matching(Matcher(4), params, batch, BLOCK)[0].value)


def test_what_the_contrast_leaves_out():
    """Blocks beside a fact, the same passage in another row, and places without a token."""
    made = batch()
    params = Matcher(4).init(jax.random.key(2), jnp.zeros((1, 2, 12)))["params"]
    before = lost(params, made)

    def changed(row, blocks):
        passage = made["passage"].copy()
        at = slice(blocks[0] * BLOCK, (blocks[1] + 1) * BLOCK)
        passage[row, at] = np.random.default_rng(5).standard_normal(passage[row, at].shape)
        return lost(params, {**made, "passage": passage})

    assert changed(1, (3, 3)) == pytest.approx(before, abs=1e-5)  # no token stands there
    assert abs(changed(1, (0, 0)) - before) > 1e-4  # a block like any other, to all rows
    # Rows 0 and 2 share a passage: what it is in row 2 means nothing to row 0, and the other way.
    alone = {k: v[[0, 1]] if k != "same" else np.array([7, 8]) for k, v in made.items()}
    both = {k: np.stack([v[0], v[1], v[0]]) for k, v in made.items()}
    both["same"] = np.array([7, 8, 7])
    both["other"] = np.stack([alone["other"][0], alone["other"][1], alone["other"][0]])
    x, y = (matching(Matcher(4), params, b, BLOCK)[0] for b in (alone, both))
    assert float(y.count) == 3 and float(x.count) == 2
    gone = {**made, "fact": made["fact"] & False}
    loss, right = matching(Matcher(4), params, gone, BLOCK)
    assert float(loss.count) == 0 and float(right.sum) == 0


def test_a_question_in_the_texts_own_words_finds_its_block(finder, ids):
    index = finder.index(ids)
    assert index.dtype == np.int8 and index.shape == (len(ids) // BLOCK, BLOCK, CONFIG.width)
    assert int(np.abs(index.astype(int)).max()) <= 127
    for block in (2, 9, 13):
        question = ids[block * BLOCK + 1 : block * BLOCK + 7]
        score = finder.score(question, index)
        assert (score > score[block]).sum() < len(score) / 4  # nothing is trained


def test_only_the_last_tokens_of_a_question_count(finder, ids):
    index = finder.index(ids)
    long, short = ids[3:40], ids[40 - CONFIG.question : 40]
    np.testing.assert_allclose(finder.score(long, index), finder.score(short, index), atol=1e-6)


def test_windows_are_read_once_and_kept_in_files(
    reader, params, finder, ids, tmp_path, monkeypatch, caplog
):
    window, store = finder.window, tmp_path / "store"
    store.mkdir()
    monkeypatch.setattr(matcher, "_AT_ONCE", 2)
    first = Finder(reader, CONFIG, BLOCK, params, f"{store}/")
    whole = first.index(ids)
    np.testing.assert_array_equal(whole, finder.index(ids))
    count = len(ids) // window
    assert len(first._windows) == count  # the last one is not whole, and may still grow
    assert first.kept.path.parent == tmp_path and not list(store.iterdir())

    def found():
        return len(Finder(reader, CONFIG, BLOCK, params, store)._windows)

    again = Finder(reader, CONFIG, BLOCK, params, store)
    again.states = None  # nothing may be read
    np.testing.assert_array_equal(
        again.index(ids[: count * window]), whole[: count * window // BLOCK]
    )
    # A flipped byte and a file that was cut are found, left out, and made again.
    files = sorted(first.kept.path.iterdir())
    raw = bytearray(files[0].read_bytes())
    raw[20] ^= 1
    files[0].write_bytes(raw)
    assert found() == count - 2 and "damaged" in caplog.text
    files[0].write_bytes(raw[: len(raw) // 2])
    other = Finder(reader, CONFIG, BLOCK, params, store)
    np.testing.assert_array_equal(other.index(ids), whole)
    assert found() == count
    # What was read before a kill stays.
    killed = Finder(reader, CONFIG, BLOCK, params, tmp_path / "killed")
    read, calls = killed.states, iter([1, 1, 0])
    killed.states = lambda *some: read(*some) if next(calls) else 1 / 0
    monkeypatch.setattr(matcher, "_AT_ONCE", 1)
    with pytest.raises(ZeroDivisionError):
        killed.index(ids)
    assert len(list(killed.kept.path.glob("*.bin"))) == 2


def test_vectors_of_another_matcher_base_window_or_width_are_kept_apart(
    reader, params, tmp_path
):
    moved = jax.tree.map(lambda x: x + 1, params)
    others = [
        Finder(reader, CONFIG, BLOCK, params, tmp_path / "s"),
        Finder(reader, CONFIG, BLOCK, moved, tmp_path / "s"),
        Finder(reader, dataclasses.replace(CONFIG, window=3), BLOCK, params, tmp_path / "s"),
        Finder(reader, dataclasses.replace(CONFIG, width=5), BLOCK, params, tmp_path / "s"),
        Finder(dataclasses.replace(reader, sha256="x"), CONFIG, BLOCK, params, tmp_path / "s"),
    ]
    assert len({other.kept.path for other in others}) == len(others)


def test_a_full_disk_costs_nothing_but_time(reader, params, finder, ids, tmp_path, caplog):
    (tmp_path / "file").write_text("no directory")
    full = Finder(reader, CONFIG, BLOCK, params, tmp_path / "file" / "store")
    np.testing.assert_array_equal(full.index(ids), finder.index(ids))
    assert caplog.text.count("are not kept") == 1


def test_what_stands_in_one_window_does_not_know_of_the_next(finder, ids):
    window = finder.window
    other = np.concatenate([ids[:window], ids[window:][::-1]])
    np.testing.assert_array_equal(
        finder.index(ids)[: CONFIG.window], finder.index(other)[: CONFIG.window]
    )


def test_the_question_behind_a_text_costs_what_the_base_says(reader, ids):
    texts, question = ids[: 3 * 2 * BLOCK].reshape(3, -1), ids[100:105]
    found = Reranker(reader, 8)(question, texts)
    sink, decoder, base = sink_token(reader.tokenizer), reader.decoder, {"params": reader.params}
    for text, loss in zip(texts, found, strict=True):
        row = jnp.asarray(np.concatenate([[sink], text, question]))[None]
        hidden = decoder.apply(base, decoder.apply(base, row, method="embed")).hidden
        log = jax.nn.log_softmax(decoder.apply(base, hidden, method="unembed"))[0]
        # All but the question's first token.
        each = [float(log[-j - 1, row[0, -j]]) for j in range(1, len(question))]
        assert loss == pytest.approx(-np.mean(each), abs=2e-4)
    np.testing.assert_array_equal(Reranker(reader, 4)(question, texts),
                                  Reranker(reader, 4)(question[1:], texts))  # fmt: skip
    assert Reranker(reader, 8)(question, texts[:0]).shape == (0,)


def test_what_is_read_again_comes_first(reader, params, finder, ids):
    question = ids[41:46]
    plain = finder.score(question, finder.index(ids))
    np.testing.assert_array_equal(finder.rank(question, ids), plain)
    again = Finder(reader, dataclasses.replace(CONFIG, rerank=4), BLOCK, params)
    found, texts = again.rank(question, ids), policies.in_pairs(ids.reshape(-1, BLOCK))
    read = np.flatnonzero(found >= 0)
    assert 0 < len(read) <= 2 * 5  # pairs of the matcher's four, and of one by words
    words = int(policies.bm25(texts, question).argmax())
    assert {words, words + 1} <= set(read)
    rest = np.setdiff1d(np.arange(len(found)), read)
    assert found[rest].max() <= -1
    # What was not read keeps its order.
    np.testing.assert_array_equal(np.argsort(found[rest]), np.argsort(plain[rest]))
    assert again.rank(question, ids[:BLOCK]).shape == (1,)


def test_a_pair_without_a_word_of_the_question_is_not_read_for_its_words(reader, params, ids):
    again = Finder(reader, dataclasses.replace(CONFIG, rerank=4), BLOCK, params)
    read, reranker = [], again._reranker
    again._reranker = lambda question, texts: read.append(len(texts)) or reranker(question, texts)
    foreign = np.setdiff1d(np.arange(reader.config.vocab_size), ids)[:5]
    for question in (foreign, ids[41:46]):
        again.rank(question, ids)
    assert read[0] == 4 <= read[1]
    again.rank(ids[41:46], ids, again=False)
    assert len(read) == 2


def test_the_focus_opens_what_matches(reader, finder, ids, tmp_path):
    layout = Layout(block=BLOCK, branching=4, slots=(2, 2), protected=1)
    long = np.resize(ids, 64 * BLOCK)
    long[-8 * BLOCK :] = 5  # nothing there
    with GistTree.create(
        tmp_path / "s", TreeSpec(reader.config.vocab_size, 1, layout.slots, block=BLOCK, branch=4)
    ) as tree:
        tree.append(long)
        focus = Focus(tree, layout, RuntimeConfig(80, "match"), None, finder)
        question = long[11 * BLOCK + 1 : 11 * BLOCK + 7]
        nodes = focus.nodes(focus.settle(question))[0]
        score = finder.score(question, finder.index(long))
        assert (0, int(score.argmax())) in nodes or (0, int(score.argmax()) + 1) in nodes
        with pytest.raises(ConfigError, match="this run has no matcher"):
            Focus(tree, layout, RuntimeConfig(80, "match"))


def test_histories_share_windows(reader, finder):
    tokenizer = reader.tokenizer
    text = TEXT * 12
    filler = np.asarray(tokenizer.encode(text), np.int32)
    unit, around = finder.window, episodes.Filler(text, filler)
    made = list(
        episodes.episodes(
            "passkey", around, [], tokenizer, BLOCK, 400, [0.25, 0.75], seed=1, unit=unit
        )
    )
    period = filler[: len(filler) // unit * unit].reshape(-1, unit)
    known = {row.tobytes() for row in period}
    for one in made:
        windows = one.ids[: len(one.ids) // unit * unit].reshape(-1, unit)
        odd = [i for i, row in enumerate(windows) if row.tobytes() not in known]
        blocks = {b // CONFIG.window for b in one.needle}
        # All but the part around the fact is filler in its own windows.
        assert blocks <= set(odd) and odd[-1] - odd[0] < 25 < len(windows) / 3
        assert len(one.ids) == 400 * BLOCK


def rows(**more):
    config = runs.resolve("megacontext/tiny_match", {"data.passages": 4, "data.others": 2, **more})
    return config


def test_facts_lie_where_rows_say(reader):
    config = rows()
    made = match_data.MatchRows(config, reader)
    texts, _ = match_data.facts(config, reader.tokenizer, "train", 4, 3)
    window, size = made.tokens, made.block
    assert window == 40 * 8 and len(made.passages) == 4 and len(made.others) == 2
    found = [made.row(i) for i in range(len(made.facts))]
    assert any(row["fact"].any() for row in found)
    for fact, row in zip(made.facts, found, strict=True):
        shift = int(np.flatnonzero(row["passage_mask"])[0])
        length = len(texts[fact.passage])
        assert 0 <= shift < size and row["passage_mask"].sum() == length
        np.testing.assert_array_equal(
            row["passage"][shift : shift + length], made.passages[fact.passage]
        )
        for block in np.flatnonzero(row["fact"]):
            begin = block * size
            assert begin <= shift + fact.first and shift + fact.stop <= begin + 2 * size
        assert row["question_mask"].sum() == len(fact.question) <= 16
    again, later = made.row(0), [made.row(i * len(made.facts)) for i in range(1, 5)]
    np.testing.assert_array_equal(again["passage"], found[0]["passage"])
    shifts = {int(np.flatnonzero(row["passage_mask"])[0]) for row in later}
    assert len(shifts) > 1 and {int(row["same"]) for row in later} == {int(again["same"])}
    # Texts read together have the states that each has alone.
    states = States(reader, config.model.matcher.layers)
    one = next(states(texts[1][None], np.ones((1, len(texts[1])), bool)))
    np.testing.assert_allclose(
        made.passages[1].astype(np.float32), one.astype(np.float32), atol=2e-2
    )


def test_it_learns_and_trains_nothing_else(tmp_path, capsys):
    config = runs.resolve("megacontext/tiny_match", {
        "out": str(tmp_path / "run"), "mesh.data": 1, "train.steps": 30, "eval.questions": 4,
    })  # fmt: skip
    told = []
    system, state, out = runs.train(config, lambda event: told.append(event.message))
    assert any(line and line.startswith("reading questions: ") for line in told)
    assert set(state.params) == {"gist", "matcher"}
    log = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    losses = [json.loads(line)["loss"] for line in log]
    assert losses[-1] < 0.6 * losses[0]
    labels = system.param_labels(state.params)
    assert set(jax.tree.leaves(labels["matcher"])) == {"matcher"}
    # Exported, it is where another run may start.
    to = tmp_path / "made"
    assert cli.main(["export", str(out), "--to", str(to)]) == 0
    shape = config.model.matcher
    found = match_assets.load(str(to), shape, system.backbone)
    for old, new in zip(
        jax.tree.leaves(jax.device_get(state.params["matcher"])), jax.tree.leaves(found),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(old, new, rtol=2e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="was trained with"):
        match_assets.load(str(to), dataclasses.replace(shape, width=8), system.backbone)
    other = dataclasses.replace(system.backbone, sha256="0" * 64)
    with pytest.raises(ConfigError, match="was trained on states of tiny"):
        match_assets.load(str(to), shape, other)
    with pytest.raises(ConfigError, match="is neither of"):
        match_assets.load("nowhere", shape, system.backbone)


PHASE = {"name": "m", "data": "questions", "train": ["matcher"]}


@pytest.mark.parametrize(
    "change,told",
    [
        ({"train.phases": [PHASE]}, "trains model.matcher; set it"),
        ({"model.matcher": {"layers": [3, 1]}}, "give them in order"),
        ({"eval.questions": 4}, "set model.matcher"),
        ({"eval.budgets": [640], "eval.policies": ["match"]}, "set model.matcher"),
        ({"model.matcher": {"layers": [1]},
          "train.phases": [PHASE | {"train": ["matcher", "maps"]}]}, "trains nothing else"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_of_a_matcher(change, told):
    with pytest.raises(ConfigError, match=told):
        runs.resolve("megacontext/tiny", change)


def test_the_packaged_matcher_is_one_of_the_default_shape(reader):
    record = json.loads((asset("matchers") / "smollm2" / match_assets.RECORD).read_text())
    base = dataclasses.replace(reader, sha256=record["backbone"])  # what it is checked by
    found = match_assets.load("smollm2", MatcherConfig(), base)
    shape = {"question": (1728, 64), "history": (1728, 64), "weight": (1728, 1)}
    assert {k: v["kernel"].shape for k, v in found.items()} == shape
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert not np.array_equal(found["question"]["kernel"], found["history"]["kernel"])
    assert record["config"]["data"]["qa"] == ["squad", "qed"]
