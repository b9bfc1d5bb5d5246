"""`latent_jax.run` and its parts on the toy system."""

from __future__ import annotations

import json

import pytest

import latent_jax
from latent_jax import run as runs
from latent_jax.core.config import to_dict
from latent_jax.core.errors import ConfigError, RunError, UserError
from latent_jax.report.directory import prepare
from tests.toy_cli import TOY


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("work") / "runs"
    return latent_jax.run(TOY, out=str(root / "toy"), seed=4)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_everything_behind(finished):
    names = {path.name for path in finished.out.iterdir()}
    assert names >= {
        "config.yaml", "config.hash", "environment.json", "metrics.jsonl", "results.json",
        "samples.jsonl", "report.html", "checkpoints",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]
    assert finished.report.is_file()
    assert [row["step"] for row in lines(finished.out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_demonstration_is_in_the_report(finished):
    assert lines(finished.out / "samples.jsonl")[-1]["kind"] == "demonstration"
    text = finished.report.read_text()
    assert "Demonstration" in text and "a test" in text


def test_results_are_flat_numbers(finished):
    on_disk = json.loads((finished.out / "results.json").read_text())
    assert on_disk == dict(finished)
    assert on_disk["toy.mse.ci95"][0] < on_disk["toy.mse"] < on_disk["toy.mse.ci95"][1]
    assert on_disk["memory.peak_bytes"] > 1e7
    assert on_disk["throughput.examples_per_second"] > 0


def test_the_recorded_config_makes_the_same_run(finished):
    path, config = runs.open_run(finished.out)
    assert config.seed == 4 and config.out is None
    again = runs.resolve(TOY, {"seed": 4})
    assert to_dict(again) | {"out": None} == to_dict(config)


def test_history_has_a_line_per_training_and_evaluation(finished):
    rows = lines(finished.out.parent / "history.jsonl")
    assert [row["what"] for row in rows[:2]] == ["train", "eval"]
    assert rows[1]["run"] == "toy" and rows[1]["results"]["toy.mse"] == finished["toy.mse"]
    assert rows[0]["config_hash"] == (finished.out / "config.hash").read_text().strip()


def test_environment_names_neither_machine_nor_user(finished, monkeypatch):
    import getpass
    import socket

    text = (finished.out / "environment.json").read_text()
    tree = json.loads(text)
    assert tree["versions"]["jax"] and tree["devices"] and tree["cpu"]["cores"] >= 1
    assert socket.gethostname() not in text
    assert "/" not in json.dumps(tree["devices"]) and f"/{getpass.getuser()}" not in text


def test_evaluating_again_gives_the_same_numbers(finished):
    again = runs.evaluate(finished.out)
    assert again["toy.mse"] == pytest.approx(finished["toy.mse"], rel=1e-6)
    assert again["throughput.examples_per_second"] == finished["throughput.examples_per_second"]


def test_evaluation_elsewhere_leaves_the_run_alone(finished, tmp_path):
    before = (finished.out / "results.json").read_bytes()
    results = runs.evaluate(finished.out, checkpoint="3", out=tmp_path / "runs" / "at3")
    assert results["toy.mse"] != finished["toy.mse"]
    assert results.report.is_file()
    assert (finished.out / "results.json").read_bytes() == before


def test_a_finished_run_is_not_trained_again(finished):
    events = []
    runs.run(TOY, out=str(finished.out), seed=4, progress=events.append)
    assert any("resumed from step 6" in (event.message or "") for event in events)
    assert len(lines(finished.out / "metrics.jsonl")) == 6


def test_another_configuration_is_refused_by_name(finished):
    before = (finished.out / "config.yaml").read_bytes()
    with pytest.raises(RunError, match=r"train\.steps: 6 → 7.*another --out"):
        runs.run(TOY, out=str(finished.out), seed=4, train__steps=7)
    assert (finished.out / "config.yaml").read_bytes() == before


def test_what_is_not_computed_may_differ(finished):
    config = runs.resolve(TOY, {"seed": 4, "out": str(finished.out), "train.log_every": 1})
    assert prepare(config) == finished.out


def test_somebody_elses_directory_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true\n")
    with pytest.raises(RunError, match="no run wrote"):
        prepare(runs.resolve(TOY, {"out": str(tmp_path)}))
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"


def test_a_file_in_the_way_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*file"):
        prepare(runs.resolve(TOY, {"out": str(tmp_path / "file" / "run")}))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"system": "latentwir"}, r"no such system; did you mean 'latentwire'"),
        ({"system": "no.such:Thing"}, "cannot import no.such"),
        ({"system": "latent_jax.run:Nothing"}, "has no Nothing"),
        ({"system": "latent_jax.run:Results"}, "is no system"),
        ({}, "system is missing"),
        ({**TOY, "model": {"widht": 3}}, r"model\.widht.*'?width"),
        ({**TOY, "model": {"width": 0}}, r"model\.width"),
        ({**TOY, "model": {"kind": "cnn"}}, r"model\.kind.*mlp"),
        ({**TOY, "train": {"steps": "many"}}, r"train\.steps"),
    ],
)
def test_bad_configurations_are_told_by_path(tree, message):
    with pytest.raises(ConfigError, match=message):
        runs.resolve(tree)


def test_missing_files_and_runs(tmp_path):
    with pytest.raises(ConfigError, match="no such config"):
        runs.resolve(tmp_path / "none.yaml")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(RunError):
            runs.open_run(path)
    config = runs.resolve(TOY, {"out": str(tmp_path / "fresh")})
    prepare(config)
    with pytest.raises(UserError, match="no checkpoint"):
        runs.evaluate(tmp_path / "fresh")


def test_an_object_or_a_file_serves_as_well(tmp_path):
    from latent_jax.core.config import dump_yaml

    path = tmp_path / "toy.yaml"
    path.write_text(dump_yaml(TOY))
    config = runs.resolve(path)
    assert runs.resolve(config) is config
    assert runs.resolve(config, {"seed": 9}).seed == 9


def test_packaged_configs_parse():
    for name in runs.packaged_configs():
        tree_path = runs.find_config(name)
        assert tree_path.suffix == ".yaml"
        assert runs.resolve(name) is not None, name
        assert runs.find_config(f"configs/{name}.yaml") == tree_path or tree_path.is_file()


def test_a_run_refused_before_its_first_step_leaves_nothing(tmp_path):
    wrong = {"train.optimizer.groups": {"nothing": {"lr_scale": 2.0}}, "out": str(tmp_path / "new")}
    with pytest.raises(ConfigError, match="no such label"):
        runs.train(runs.resolve(TOY, wrong))
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ConfigError, match="no such label"):
        runs.train(runs.resolve(TOY, {**wrong, "out": str(tmp_path / "old")}))
    assert (tmp_path / "old").is_dir()


def test_a_directory_whose_run_saved_nothing_takes_another_configuration(tmp_path, monkeypatch):
    """As a process leaves it that is killed before its first checkpoint."""
    monkeypatch.chdir(tmp_path)
    tree = {**TOY, "out": "runs/cut"}
    out = prepare(runs.resolve(tree))
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"st')
    told = []
    results = runs.run(tree, progress=lambda e: told.append(e.message), **{"train.steps": 4})
    assert any(t and "ended before its first one" in t for t in told)
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert results.out == out and "steps: 4" in (out / "config.yaml").read_text()
    with pytest.raises(RunError, match="another configuration"):  # now something would be lost
        runs.run(tree, **{"train.steps": 6})
