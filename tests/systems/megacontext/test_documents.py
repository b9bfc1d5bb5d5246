"""Questions on long documents through the tiny reader: what each arm reads, and its scores."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from latent_jax import backbones, run
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.data.long_documents import LongQuestion
from latent_jax.systems.megacontext import documents
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, ModelConfig
from latent_jax.systems.megacontext.runtime import Answer, Runtime
from latent_jax.systems.megacontext.system import MegaContextSystem

LAYOUT = Layout(block=8, branching=4, slots=(2, 4), protected=1)
MODEL = ModelConfig(layout=LAYOUT, gist=GistConfig(reads=2, window=4))
TEXT = "The mill at Dunmore burned down in 1911, and nobody was hurt when it fell. " * 12
QUESTIONS = [
    LongQuestion("1", "narrativeqa", TEXT, "Where was the mill?", ("Dunmore",)),
    LongQuestion("2", "choice", TEXT, "Which year?", ("1911",), ("1911", "1912")),
]


@pytest.fixture(scope="module")
def base():
    return backbones.load("tiny")


def test_prompts():
    assert documents.prompt(QUESTIONS[0]) == "\n\nQuestion: Where was the mill?\nAnswer:"
    assert documents.prompt(QUESTIONS[1]).endswith("year?\nOne of:\n- 1911\n- 1912\nAnswer:")
    assert documents.said(" in 1911 \n\nQuestion: why?") == "in 1911"
    assert documents.said(" \n") == ""


def test_a_long_document_loses_its_middle():
    ids = np.arange(10)
    assert documents.cut(ids, 5).tolist() == [0, 1, 2, 8, 9]
    assert documents.cut(ids, 10).tolist() == list(range(10)) == documents.cut(ids, None).tolist()


def test_every_arm_reads_what_it_should(base, untrained, monkeypatch):
    """Who is given the answer says it; live tokens and entries are those of the arm."""
    params, read = untrained(base, MODEL), []

    def made(path):
        return Memory.open(path, base, MODEL, params, "one", writable=True)

    def continued(self, entries, live, start, capacity, new):
        size = 0 if entries is None else len(entries.positions)
        read.append((size, self.backbone.tokenizer.decode(live), start))
        return " Dunmore, in 1911.\nQuestion: more" if size else "I do not know"

    def generate(self, asked, new, keep=False):
        nodes, live, start = self.context(self.settle(asked))
        entries = self.memory.gather(nodes, start)
        text = continued(self.memory, entries, np.append(live, asked), start, 64, new)
        return Answer(text, nodes, {}, [], np.zeros(0, np.int32))

    monkeypatch.setattr(Memory, "continued", continued)
    monkeypatch.setattr(Runtime, "generate", generate)
    found, samples = documents.measure(made, QUESTIONS, ["bm25"], 64, most=200, new_tokens=4)
    (bm25, newest, nothing), again = read[:3], read[3:]
    assert bm25[0] <= 64 - LAYOUT.block and bm25[1].endswith("Answer:")
    assert newest[0] == 64 and newest[1].endswith("Where was the mill?\nAnswer:")
    assert nothing == (0, documents.prompt(QUESTIONS[0]), 0) and len(again) == 3
    assert found["documents.questions"] == 2
    assert found["documents.narrativeqa.bm25.f1"] == pytest.approx(0.5)
    assert found["documents.bm25.f1"] == found["documents.newest.f1"] == pytest.approx(0.5)
    assert found["documents.no_context.f1"] == 0.0 and found["documents.bm25.em"] == 0.0
    assert found["documents.bm25.f1.ci95"] == [0.5, 0.5]
    told = ["Dunmore, in 1911."] * 2 + ["I do not know"]
    assert list(samples[0]["predictions"].values()) == told and samples[0]["kind"] == "answer"


def test_through_the_evaluation(tmp_path):
    rows = [
        {"input": q.question, "context": q.context, "answers": list(q.answers), "length": 100,
         "dataset": q.dataset, "language": language, "all_classes": None, "_id": q.id}
        for q, language in zip(QUESTIONS, ("en", "zh"), strict=True)
    ]  # fmt: skip
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "eval.documents": str(path), "eval.budgets": [160], "eval.policies": ["full", "recency"],
        "eval.document_tokens": 160, "eval.long": 24,
    }  # fmt: skip
    system = MegaContextSystem(run.resolve("megacontext/tiny", overrides))
    assert [q.id for q in system.questions()] == ["1"]
    variables, artefacts = system.init({"params": jax.random.key(0)}, {}), {}
    found = system._documents(variables, system.frozen, artefacts, None)
    (sample,) = artefacts["samples"]
    assert set(sample["predictions"]) == {"recency", "newest", "no_context"}
    assert all(0 <= found[f"documents.{arm}.f1"] <= 1 for arm in ("recency", "newest"))
    small = {**overrides, "eval.budgets": [32], "eval.long": 8, "eval.document_tokens": None}
    with pytest.raises(ConfigError, match="eval.documents: 1 costs .* raise it"):
        MegaContextSystem(run.resolve("megacontext/tiny", small)).train_data("main", None)
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(DataError, match="no question of language 'en'"):
        system.train_data("main", None)
    with pytest.raises(ConfigError, match="eval.documents: give eval.budgets"):
        run.resolve("megacontext/tiny", {"eval.documents": str(path)})
