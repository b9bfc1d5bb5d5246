"""Text sources and token windows."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest

from latent_jax.core.errors import DataError
from latent_jax.data import load_segments, load_squad, load_texts, segments
from latent_jax.data.text import split_sources


def test_pydoc_holds_out_whole_topics():
    train, held = load_texts("pydoc", "train"), load_texts("pydoc", "validation")
    assert len(held) >= 5 and not set(train) & set(held)
    assert sum(map(len, train)) > 100_000
    assert load_texts("pydoc", "train") == train


def test_embedded_texts_follow_the_split_of_the_questions():
    held = load_texts("embedded", "validation")
    assert set(held) == {e.context for e in load_squad("embedded", "validation")}
    assert len(held) == len(set(held))


def test_auto_prefers_novels(tmp_path, monkeypatch):
    monkeypatch.delenv("LATENT_JAX_DATA", raising=False)
    assert load_texts("auto", "train") == load_texts("pydoc", "train")
    rows = [{"id": "a", "text": "one", "split": "train"}]
    rows.append({"id": "b", "text": "two", "split": "validation"})
    (tmp_path / "text").mkdir()
    packed = lzma.compress("\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "text" / "novels.jsonl.xz").write_bytes(packed)
    monkeypatch.setenv("LATENT_JAX_DATA", str(tmp_path))
    assert load_texts("auto", "train") == ["one"]
    assert load_texts("auto", "validation") == ["two"]


def test_local_file_folder_and_glob(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text(f"document number {n}")
    everything = [f"document number {n}" for n in range(4)]
    assert load_texts(str(tmp_path), "all") == everything
    assert load_texts(str(tmp_path / "*.txt"), "all") == everything
    train, held = load_texts(str(tmp_path), "train"), load_texts(str(tmp_path), "validation")
    assert sorted(train + held) == everything and len(held) == 1
    words = " ".join(f"w{n}" for n in range(100))
    (tmp_path / "long.txt").write_text(words)
    ends = [load_texts(str(tmp_path / "long.txt"), part)[0] for part in ("train", "validation")]
    assert "".join(ends) == words and len(ends[1]) < len(words) * 0.12


@pytest.mark.parametrize(
    ("source", "says"), [("nothing-here", "no such file"), ("wikitext", "LATENT_JAX_DATA")]
)
def test_missing_sources(source, says, monkeypatch):
    monkeypatch.delenv("LATENT_JAX_DATA", raising=False)
    with pytest.raises(DataError, match=says):
        load_texts(source, "train")


def test_empty_and_malformed_files(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n ")
    with pytest.raises(DataError, match="blank.txt: the file is empty"):
        load_texts(str(tmp_path / "blank.txt"), "all")
    (tmp_path / "text").mkdir()
    target = tmp_path / "text" / "factbook.jsonl.xz"
    target.write_bytes(lzma.compress(b'{"id": 1}\n'))
    with pytest.raises(DataError, match="line 1: field 'text'"):
        load_texts("factbook", "train", root=tmp_path)
    target.write_bytes(lzma.compress(b'{"text": "a"}\n{oops\n'))
    with pytest.raises(DataError, match="line 2 is not JSON"):
        load_texts("factbook", "train", root=tmp_path)


@pytest.fixture
def texts():
    # distinct values, so that a window tells its place
    return [" ".join(f"{book}x{n}" for n in range(900)) for book in range(6)]


def test_segments_are_windows_of_the_texts(tokenizer, texts):
    got = segments(tokenizer, texts, 16, 50, seed=3, continuation=8)
    assert got.shape == (50, 24) and got.dtype == np.int32
    assert all(any(bytes(row.tolist()).decode() in text for text in texts) for row in got)


def test_segments_depend_on_the_seed_alone(tokenizer, texts):
    first = segments(tokenizer, texts, 16, 40, seed=1)
    np.testing.assert_array_equal(first, segments(tokenizer, texts, 16, 40, seed=1))
    assert not np.array_equal(first, segments(tokenizer, texts, 16, 40, seed=2))


def test_segments_do_not_overlap(tokenizer, texts):
    got = segments(tokenizer, texts[:1], 16)
    starts = sorted(texts[0].index(bytes(row.tolist()).decode()) for row in got)
    assert len(starts) >= len(texts[0]) // 16 - 20
    assert min(np.diff(starts)) >= 16
    dense = segments(tokenizer, texts[:1], 16, stride=4)
    assert len(dense) > 3.5 * len(got)


def test_segments_tokenise_only_what_they_need(tokenizer, texts):
    segments(tokenizer, texts * 20, 16, 64)
    assert tokenizer.characters < 0.05 * sum(map(len, texts * 20))


def test_segments_when_there_are_fewer_than_asked(tokenizer):
    assert segments(tokenizer, ["x" * 40], 16, 1000).shape == (2, 16)


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ([], {}, "the text is empty"),
        (["", " \n"], {}, "the text is empty"),
        (["short"], {}, "16 tokens are needed .* the longest has 5"),
        (["long enough " * 9], {"length": 0}, "length=0"),
        (["long enough " * 9], {"stride": 0}, "stride=0"),
        (["long enough " * 9], {"max_segments": 0}, "max_segments=0"),
    ],
)
def test_segments_refuse(tokenizer, texts, options, says):
    with pytest.raises(DataError, match=says):
        segments(tokenizer, texts, **({"length": 16} | options))


def _letters(folder, name):
    """A file of one letter, so that a window tells its source."""
    path = folder / f"{name}.txt"
    path.write_text(f"{name * 7} " * 4000)
    return str(path)


def test_several_sources_have_equal_shares(tokenizer, tmp_path):
    source = " + ".join(_letters(tmp_path, name) for name in "abc")
    got = load_segments(tokenizer, source, "train", 16, 30, seed=5, continuation=8)
    assert got.shape == (30, 24)
    sources = [set(bytes(row.tolist()).decode()) - {" "} for row in got]
    assert [sources.count({name}) for name in "abc"] == [10, 10, 10]
    assert len({tuple(s) for s in sources[:10]}) > 1, "sources are mixed, not one after another"
    again = load_segments(tokenizer, source, "train", 16, 30, seed=5, continuation=8)
    np.testing.assert_array_equal(got, again)


def test_shares_that_do_not_come_out_even_differ_by_one_at_most(tokenizer, tmp_path):
    source = "+".join(_letters(tmp_path, name) for name in "ab")
    got = load_segments(tokenizer, source, "train", 16, 7)
    a = sum(ord("a") in row for row in got)
    assert len(got) == 7 and a in (3, 4)


def test_one_source_is_segments_of_its_texts(tokenizer, tmp_path):
    source = _letters(tmp_path, "a")
    got = load_segments(tokenizer, source, "train", 16, 5, seed=2)
    np.testing.assert_array_equal(
        got, segments(tokenizer, load_texts(source, "train"), 16, 5, seed=2)
    )


def test_a_path_with_a_plus_is_one_source(tmp_path):
    path = tmp_path / "c++ notes.txt"
    path.write_text("x")
    assert split_sources(str(path)) == [str(path)]
    assert split_sources(str(tmp_path / "c++*.txt")) == [str(tmp_path / "c++*.txt")]
    assert load_texts(*split_sources(str(path)), "all") == ["x"]


@pytest.mark.parametrize("source", ["novels+", "+novels", "pydoc+ +novels", "", " ", "+"])
def test_an_empty_part_is_refused(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _letters(tmp_path, "a")  # must not be taken for what was meant
    if source.strip():
        with pytest.raises(DataError, match="text source .*nothing on one side"):
            load_segments(tokenizer, source, "train", 16, 5)
    else:
        with pytest.raises(DataError, match="empty"):
            load_segments(tokenizer, source, "train", 16, 5)
        with pytest.raises(DataError, match="text source .* is empty"):
            load_texts(source, "train")


def test_a_source_named_twice_is_refused(tokenizer):
    with pytest.raises(DataError, match="named twice"):
        load_segments(tokenizer, "pydoc+pydoc", "train", 16, 5)


@pytest.mark.usefixtures("data_root")
@pytest.mark.parametrize("source", ["wikitext", "factbook", "state_union", "shakespeare", "code"])
def test_real_sources_split_without_overlap(source):
    train, held = load_texts(source, "train"), load_texts(source, "validation")
    assert held and not set(train) & set(held)
    assert 0.05 < sum(map(len, held)) / sum(map(len, train)) < 0.25
