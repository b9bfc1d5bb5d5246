"""Files in the schemas of LongBench and InfiniteBench, and what can be wrong with them."""

from __future__ import annotations

import gzip
import json

import pytest

from latent_jax.core.errors import DataError
from latent_jax.data import load_long_questions

LONGBENCH = {
    "input": "Who built the mill?", "context": "Ada built the mill at Dunmore in 1911.",
    "answers": ["Ada", "Ada of Dunmore"], "length": 8, "dataset": "narrativeqa", "language": "en",
    "all_classes": None, "_id": "9a01",
}  # fmt: skip
INFINITE = {
    "id": 3, "context": "The pass key is 71432. Remember it.", "input": "What is the pass key?",
    "answer": ["71432"], "options": [],
}  # fmt: skip


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_longbench(tmp_path):
    (found,) = load_long_questions(write(tmp_path / "narrativeqa.jsonl", LONGBENCH))
    assert (found.id, found.dataset, found.language) == ("9a01", "narrativeqa", "en")
    assert found.answers == ("Ada", "Ada of Dunmore") and found.options == ()
    assert found.question == "Who built the mill?" and "1911" in found.context


def test_longbench_with_classes(tmp_path):
    row = LONGBENCH | {"all_classes": ["Food", "Date"], "answers": ["Date"], "dataset": "trec"}
    (found,) = load_long_questions(write(tmp_path / "trec_e.jsonl", row))
    assert found.options == ("Food", "Date")


def test_infinitebench(tmp_path):
    """A file is a task; answers are strings, lists, or numbers; choices have options."""
    rows = [
        INFINITE, INFINITE | {"id": 4, "answer": "71432"},
        INFINITE | {"id": 5, "answer": [7, 12], "input": ""},
        INFINITE | {"id": 6, "answer": ["b"], "options": ["a", "b", "c", "d"]},
    ]  # fmt: skip
    found = load_long_questions(write(tmp_path / "passkey.jsonl", *rows))
    assert [q.answers for q in found] == [("71432",), ("71432",), ("7", "12"), ("b",)]
    assert {q.dataset for q in found} == {"passkey"} and found[3].options == ("a", "b", "c", "d")
    assert [q.id for q in found] == ["3", "4", "5", "6"]


def test_a_folder_of_both_and_archives(tmp_path):
    write(tmp_path / "a.jsonl", LONGBENCH)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(INFINITE))
    assert [q.dataset for q in load_long_questions(tmp_path)] == ["narrativeqa", "b"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"context": None}, "line 2: field 'context' is missing or no string"),
        ({"context": "  "}, "line 2: field 'context' is empty"),
        ({"input": 3}, "line 2: field 'input' is missing or no string"),
        ({"answers": []}, "line 2: no answer"),
        ({"answers": {"text": "Ada"}}, "line 2: the answer is neither"),
        ({"_id": None}, "line 2: field '_id'"),
        ({"_id": "9a01"}, "line 2: id 9a01 is that of line 1 too"),
        ({"all_classes": {"a": 1}}, "line 2: 'options' is neither"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, said):
    path = write(tmp_path / "bad.jsonl", LONGBENCH, LONGBENCH | {"_id": "b"} | row)
    with pytest.raises(DataError, match=said) as error:
        load_long_questions(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_another_format_is_said(tmp_path):
    path = write(tmp_path / "squad.jsonl", {"context": "a", "input": "b", "label": "c"})
    with pytest.raises(DataError, match="neither 'answers' .* it has 'context', 'input', 'label'"):
        load_long_questions(path)
    (tmp_path / "no.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        load_long_questions(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="no such file"):
        load_long_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .jsonl in this folder"):
        load_long_questions(tmp_path / "empty")
