"""QA sources: the embedded set's invariants, SQuAD parsing, and every way a file can be wrong."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections import Counter

import pytest

from latent_jax.assets import asset
from latent_jax.core.errors import DataError
from latent_jax.data import load_squad


@pytest.fixture(scope="module")
def articles():
    return json.loads(asset("passages.json").read_text(encoding="utf-8"))["data"]


def test_embedded_set_has_enough_of_everything(articles):
    assert len(articles) >= 40
    titles = [article["title"] for article in articles]
    assert len(set(titles)) == len(titles)
    splits = Counter(article["split"] for article in articles)
    assert splits["validation"] >= 12 and splits["train"] >= 25
    for article in articles:
        (paragraph,) = article["paragraphs"]
        assert 60 <= len(paragraph["context"].split()) <= 130, article["title"]
        assert len(paragraph["qas"]) >= 4
        questions = [qa["question"] for qa in paragraph["qas"]]
        assert len(set(questions)) == len(questions)


def test_embedded_answers_are_short_verbatim_and_unambiguous(articles):
    for article in articles:
        context = article["paragraphs"][0]["context"]
        for qa in article["paragraphs"][0]["qas"]:
            (answer,) = qa["answers"]
            text, start = answer["text"], answer["answer_start"]
            assert context[start : start + len(text)] == text, qa["id"]
            assert 1 <= len(text.split()) <= 5
            # one place as a whole word, and neither question nor title gives it away
            assert len(re.findall(rf"(?<!\w){re.escape(text)}(?!\w)", context)) == 1, qa["id"]
            assert text.lower() not in qa["question"].lower()
            assert text.lower() not in article["title"].lower()


def test_embedded_splits_share_no_passage_and_no_id():
    train, held = load_squad("embedded", "train"), load_squad("embedded", "validation")
    assert len(held) >= 48
    assert not {e.context for e in train} & {e.context for e in held}
    everything = load_squad("embedded", "all")
    assert len(everything) == len(train) + len(held) == len({e.id for e in everything})


def test_embedded_answers_are_varied():
    answers = Counter(e.answers[0].lower() for e in load_squad("embedded", "all"))
    # a constant answer must not score
    assert answers.most_common(1)[0][1] <= 4


def test_auto_falls_back_to_embedded(monkeypatch):
    monkeypatch.delenv("LATENT_JAX_DATA", raising=False)
    assert load_squad("auto", "validation") == load_squad("embedded", "validation")


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_local_file_compressed_or_not(squad_file, suffix):
    path = squad_file(passages=3)
    data = path.read_bytes()
    packed = path.with_name(path.name + suffix)
    packed.write_bytes(
        {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix](data)
    )
    examples = load_squad(str(packed), "all")
    assert [e.id for e in examples] == ["q0", "q1", "q2"]
    assert examples[0].answers == ("red",) and examples[0].starts == (22,)


def test_single_file_is_split_by_passage(squad_file):
    path = str(squad_file(passages=20))
    train, held = load_squad(path, "train"), load_squad(path, "validation")
    assert len(held) == 2 and len(train) == 18
    assert not {e.context for e in train} & {e.context for e in held}


def test_folder_with_official_names(squad_file):
    squad_file(passages=3, name="train-v1.1.json")
    folder = squad_file(passages=2, name="dev-v1.1.json").parent
    assert len(load_squad(str(folder), "train")) == 3
    assert len(load_squad(str(folder), "validation")) == 2
    with pytest.raises(DataError, match="no train"):
        (folder / "train-v1.1.json").unlink()
        load_squad(str(folder), "train")


def test_root_layout_and_missing_root(tmp_path, squad_file, monkeypatch):
    monkeypatch.delenv("LATENT_JAX_DATA", raising=False)
    (tmp_path / "squad").mkdir()
    for name in ("train", "dev"):
        target = tmp_path / "squad" / f"{name}-v1.1.json.xz"
        target.write_bytes(lzma.compress(squad_file(passages=2).read_bytes()))
    assert len(load_squad("squad", "train", root=tmp_path)) == 2
    assert len(load_squad("auto", "validation", root=tmp_path)) == 2
    with pytest.raises(DataError, match="LATENT_JAX_DATA"):
        load_squad("squad", "train")
    with pytest.raises(DataError, match="no such folder"):
        load_squad("squad", "train", root=tmp_path / "nowhere")


def test_a_wrong_offset_moves_to_the_nearest_occurrence(squad_file):
    def change(paragraph):
        paragraph["context"] = "red hen, a red fox and a red cow"
        paragraph["qas"][0]["answers"][0]["answer_start"] = 13

    assert load_squad(str(squad_file(change)), "all")[0].starts == (11,)


def test_unanswerable_questions_are_left_out_with_a_warning(squad_file):
    def change(paragraph):
        paragraph["qas"].append({"id": "x", "question": "?", "answers": [], "is_impossible": True})

    with pytest.warns(UserWarning, match="left out 1 unanswerable"):
        assert len(load_squad(str(squad_file(change)), "all")) == 1


def _answer(paragraph):
    return paragraph["qas"][0]["answers"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.pop("context"), "paragraph 0: field 'context' is missing"),
        (lambda p: p.pop("qas"), "paragraph 0: field 'qas' is missing"),
        (lambda p: p["qas"][0].pop("id"), "paragraph 0: field 'id' is missing"),
        (lambda p: p["qas"][0].pop("question"), "id q0: field 'question' is missing"),
        (lambda p: p["qas"][0].pop("answers"), "id q0: field 'answers' is missing"),
        (lambda p: p["qas"][0].update(answers=[]), "id q0: no answers"),
        (lambda p: p["qas"][0].update(answers="red"), "id q0: field 'answers' has the wrong type"),
        (lambda p: p["qas"][0].update(question="  "), "id q0: the question is empty"),
        (lambda p: p.update(context=" "), "id q0: the context is empty"),
        (lambda p: p.update(qas=["x"]), "a JSON object is needed, found str"),
        (lambda p: _answer(p).update(text="blue"), "id q0: answer 'blue' is not in the context"),
        (lambda p: _answer(p).update(text=""), "id q0: an answer is empty"),
        (lambda p: _answer(p).update(answer_start="4"), "id q0: answer_start is '4'"),
        (lambda p: p["qas"].append(p["qas"][0]), "id q0 occurs twice"),
        (lambda p: p.update(qas=[]), "no answerable question"),
    ],
)
def test_malformed_examples_name_file_id_and_fault(squad_file, change, says):
    path = squad_file(change)
    with pytest.raises(DataError) as caught:
        load_squad(str(path), "all")
    message = str(caught.value)
    assert says in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"{broken", "not JSON, line 1"),
        ("a.json", b"", "the file is empty"),
        ("a.json", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", b"[]", "a JSON object is needed, found list"),
        ("a.json", b'{"version": 1}', "field 'data' is missing"),
        ("a.json.xz", lzma.compress(b"{}" * 4000)[:-20], "damaged or truncated"),
        ("a.json.gz", gzip.compress(b"{}" * 4000, mtime=0)[:-20], "damaged or truncated"),
        ("a.json.xz", b"not xz at all", "damaged or truncated"),
    ],
)
def test_unreadable_files_are_data_errors(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_squad(str(path), "train")
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_unknown_source_split_and_mark(squad_file):
    with pytest.raises(DataError, match="neither a file nor one of"):
        load_squad("no-such-thing", "train")
    with pytest.raises(DataError, match="split 'test' unknown"):
        load_squad("embedded", "test")
    with pytest.raises(DataError, match="split 'dev' is neither"):
        load_squad(str(squad_file(split="dev")), "train")
    with pytest.raises(DataError, match="no examples left"):
        load_squad(str(squad_file()), "validation")


def test_hub_data_sets_go_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {
        "id": ["a", "b"],
        "title": ["T", "T"],
        "context": ["the fox is red", "no answer here"],
        "question": ["What is the fox?", "Why?"],
        "answers": [{"text": ["red"], "answer_start": [11]}, {"text": [], "answer_start": []}],
    }
    table = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    (example,) = load_squad("hf:some/set", "validation")
    assert example.answers == ("red",) and example.starts == (11,)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: table.remove_columns(["context"])
    )
    with pytest.raises(DataError, match=r"columns \['context'\] are missing"):
        load_squad("hf:some/set", "train")

    def offline(name, split):
        raise ConnectionError("no network\ndetails")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="ConnectionError no network$"):
        load_squad("hf:some/set", "train")


def test_qed_rows_of_both_layouts(tmp_path):
    (tmp_path / "qa").mkdir()
    dev = {
        "example_id": 1, "title_text": "T", "question_text": "who", "paragraph_text": "Ann and Bo",
        "original_nq_answers": [
            [{"string": "Ann", "start": 0, "end": 3}],
            [{"string": "Ann", "start": 0, "end": 3}, {"string": "Bo", "start": 8, "end": 10}],
        ],
    }
    train = {
        "example_id": 2, "title_text": "T", "question_text": "who", "paragraph_text": "Ann and Bo",
        "answer_text": ["Bo"], "answer_spans": [[8, 10]],
    }
    several = train | {"example_id": 3, "answer_text": ["Ann", "Bo"],
                       "answer_spans": [[0, 3], [8, 10]]}
    for name, rows in {"qed-dev": [dev], "qed-train-history": [train, several]}.items():
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "qa" / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (held,) = load_squad("qed", "validation", root=tmp_path)
    assert held.answers == ("Ann",)
    (kept,) = load_squad("qed", "train", root=tmp_path)
    assert kept.id == "2" and kept.starts == (8,)


@pytest.mark.usefixtures("data_root")
def test_real_squad_and_qed():
    held = load_squad("squad", "validation")
    assert len(held) == 10570
    assert sum(len(e.answers) for e in held) == 34726
    for example in held:
        for answer, start in zip(example.answers, example.starts, strict=True):
            assert example.context.startswith(answer, start)
    assert len(load_squad("qed", "validation")) > 1200
