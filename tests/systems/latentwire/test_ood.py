"""Questions of a second source, and evaluations of compressors that have no run directory."""

from __future__ import annotations

import json
import lzma

import pytest

from latent_jax import run as runs
from latent_jax.core.errors import CheckpointError, ConfigError, DataError
from latent_jax.systems.latentwire.diagnose import read_log
from latent_jax.systems.latentwire.system import LatentWireSystem

SMALL = {
    "data.length": 16, "data.max_context": 16, "data.max_prompt": 16, "data.segments": 32,
    "data.text": "pydoc", "data.qa": "lookup:pairs=2-3,n=40", "data.mix": {"answer": 1.0},
    "model.segment": 16, "model.encoder.slots": "pooled", "backbone.name": "tiny",
    "train.batch_size": 2, "train.log.tensorboard": False, "mesh.data": 1,
    "eval.segments": 0, "eval.quick_segments": 0, "eval.questions": 4, "eval.batch_size": 4,
    "eval.arms": ["latent", "full_text", "token_budget_head", "shuffled"],
    "eval.max_new_tokens": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data folder with six short questions of QED's held-out file, and one too long."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"example_id": i, "title_text": "T", "question_text": f"k{i}",
         "paragraph_text": f"k{i}: {i}{i}.", "original_nq_answers": [
             [{"string": f"{i}{i}", "start": 4, "end": 6}]]}
        for i in range(6)
    ]  # fmt: skip
    rows.append({**rows[0], "example_id": 9, "paragraph_text": "k0: 00. " * 20})
    (folder / "qa").mkdir()
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "qa" / "qed-dev.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    return folder


def config(**changes):
    return runs.resolve({"system": "latentwire", "name": "few"}, SMALL | changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported compressor of one step of training."""
    out = tmp_path_factory.mktemp("run")
    system, state, path = runs.train(config(**{"train.steps": 1, "out": str(out / "run")}))
    system.export(state.variables, system.frozen, str(out / "few"), str(path))
    return out / "few"


def test_a_compressor_without_a_run_is_evaluated_on_a_second_source(
    exported, root, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = {"eval.ood": "qed", "data.root": str(root), "eval.questions": 6}
    results = runs.evaluate(exported, settings)
    assert results.out.resolve() == tmp_path / "runs" / "few"
    assert results["qed.questions"] == 6 == results["squad.questions"]  # the long one is left out
    names = ("squad", "qed")
    ours, theirs = ({k[len(n) + 1 :] for k in results if k.startswith(f"{n}.")} for n in names)
    # A share of an F1 of 0 is left out.
    assert {n for n in ours ^ theirs if "f1_share" not in n} == set()
    assert "f1.latent.ci95" in theirs and "f1_gain.shuffled.ci95" in theirs
    rows = read_log(results.out / "samples.jsonl")
    other = [row for row in rows if row["kind"] == "answer in qed"]
    assert {row["question"] for row in other} == {f"k{i}" for i in range(6)}
    assert {row["context"] for row in other}.isdisjoint(
        row["context"] for row in rows if row["kind"] == "answer"
    )
    # Its own results do not hide it, nor the weights that were evaluated.
    config = runs.open_run(exported, {"model.ratio": 2})[1]
    assert config.model.ratio == 2 and config.model.start == str(exported)


def test_a_compressor_without_a_record_is_refused(exported, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in exported.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    (bare / "record.json").write_text("{}")
    with pytest.raises(CheckpointError, match="nothing says how it was trained"):
        runs.open_run(bare)


def test_packaged_compressors_can_be_opened_for_evaluation():
    path, found = runs.open_run("smollm2-heads", {"model.ratio": 4})
    assert str(path) == "smollm2-heads" and found.model.encoder.slots == "heads"
    assert found.model.ratio == 4 and found.train.steps == 160
    for name in ("smollm2-4x", "smollm2-4x-answers"):
        assert runs.open_run(name)[1].model.start == name


def test_a_second_source_is_checked_before_training(root, tmp_path):
    with pytest.raises(ConfigError, match="that is data.qa, which is trained on"):
        config(**{"eval.ood": "qed", "data.qa": "qed"})
    with pytest.raises(ConfigError, match=r"eval.ood: set eval.questions"):
        config(**{"eval.ood": "qed", "eval.questions": 0})
    missing = LatentWireSystem(config(**{"eval.ood": "qed", "data.root": str(tmp_path)}))
    with pytest.raises(DataError, match="qed"):
        missing.train_data("main", None)
    long = config(**{"eval.ood": "qed", "data.root": str(root), "data.max_context": 2})
    with pytest.raises(DataError, match="fits data.max_context=2"):
        LatentWireSystem(long).question_sets()
