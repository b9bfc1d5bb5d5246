from __future__ import annotations

import io
import json
import struct
import sys

import pytest
from tensorboardX.proto import event_pb2

from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError, RunError
from latent_jax.train.config import LogConfig, TrainConfig
from latent_jax.train.progress import PlainProgress, ProgressEvent, duration, make_progress
from latent_jax.train.writers import JsonlWriter, open_writers, truncate_jsonl


def test_jsonl_is_strict_json_and_names_what_is_not_finite(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": float("nan"), "term.a": 1.5, "phase": "main"})
    writer.close()
    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert row == {"step": 1, "loss": None, "term.a": 1.5, "phase": "main", "nonfinite": ["loss"]}


def test_truncate_drops_later_rows_and_a_cut_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert truncate_jsonl(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert truncate_jsonl(tmp_path / "none", 2) == 0


def test_tensorboard_events_are_written_in_order_whatever_the_clock_says(tmp_path, monkeypatch):
    texts = []
    for start, hours in ((0, 0), (3, -5), (6, 5)):
        now = 1.8e9 + 3600 * hours
        monkeypatch.setattr("time.time", lambda now=now: now)
        writers = open_writers(LogConfig(), tmp_path, "run", start)
        writers.write(start + 1, {"loss": 1.0, "term.a": 2.0, "phase": "main"})
        writers.close()
        monkeypatch.undo()
        files = sorted((tmp_path / "tensorboard").iterdir())
        texts.append(events(files[-1]))
    assert len(files) == 3
    for start, found in zip((0, 3, 6), texts, strict=True):
        assert found[0].file_version == "brain.Event:2"
        # A reader drops what it has from this step on.
        starts = [e.step for e in found if e.HasField("session_log")]
        assert starts == ([start + 1] if start else [])
        rows = {v.tag: (e.step, v.simple_value) for e in found for v in e.summary.value}
        assert rows == {"loss": (start + 1, 1.0), "term/a": (start + 1, 2.0)}


def events(path):
    """Events of a file of length, crc, bytes, crc."""
    raw, at, found = path.read_bytes(), 0, []
    while at < len(raw):
        (size,) = struct.unpack_from("<Q", raw, at)
        found.append(event_pb2.Event.FromString(raw[at + 12 : at + 12 + size]))
        at += 16 + size
    return found


def test_optional_writers_say_what_to_install(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            open_writers(LogConfig(tensorboard=False, **{name: "p"}), tmp_path, "run", 0)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    writer = JsonlWriter(tmp_path / "m.jsonl")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        writer.flush()


def test_progress_plain_lines_and_quiet():
    out = io.StringIO()
    show = PlainProgress(interval=1e9, file=out)
    metrics = {"loss": 2.0, "term.a": 1.0}
    show(ProgressEvent(1, 10, metrics=metrics, rates={"tokens": 1234.0}, eta=75))
    show(ProgressEvent(2, 10, metrics={"loss": 1.0}))  # too soon
    show(ProgressEvent(2, 10, message="saved"))
    show(ProgressEvent(10, 10, metrics={"loss": 0.5}, eta=0.0))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "step 1/10 [main]  loss 2  a 1  1,234 tokens/s  eta 1:15"
    assert make_progress(quiet=True) is None
    assert duration(3675) == "1:01:15" and duration(None) == "-:--"


@pytest.mark.parametrize("tree, words", [
    ({"optimizer": {"lrr": 1}}, ["train.optimizer.lrr", "lr"]),
    ({"batch_size": 10, "accumulate": 3}, ["accumulate", "10"]),
    ({"phases": [{"steps": 0}, {"steps": 2}]}, ["steps=0"]),
    ({"guards": [{"metric": "x"}]}, ["above", "below"]),
    ({"optimizer": {"kind": "adam"}}, ["adam", "adamw"]),
    ({"checkpoint": {"mode": "big"}}, ["mode", "min", "max"]),
])
def test_impossible_configs_name_the_key(tree, words):
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, tree, "train")
    assert all(word in str(error.value) for word in words)
