"""Parts of a measurement survive its end before its end, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from latent_jax.core.parts import Parts


def test_a_stopped_measurement_goes_on(tmp_path):
    path, calls = tmp_path / "parts.json", []

    def measure(name):
        calls.append(name)
        if name == "two" and calls.count("two") == 1:
            raise KeyboardInterrupt
        return {name: np.float32(0.5), f"{name}.ci95": (0.25, 0.75)}

    def all_of(key):
        keep, found = Parts(path, key), {}
        for name in ("one", "two", "three"):
            found |= keep(name, lambda name=name: measure(name))
        return keep, found

    with pytest.raises(KeyboardInterrupt):
        all_of("a")
    assert json.loads(path.read_text())["parts"] == {"one": {"one": 0.5, "one.ci95": [0.25, 0.75]}}
    keep, found = all_of("a")
    assert calls == ["one", "two", "two", "three"]
    assert found["one"] == found["three"] == 0.5 and found["one.ci95"] == [0.25, 0.75]
    keep.done()
    assert not path.exists()
    keep.done()


def test_other_weights_or_a_damaged_file_are_measured_again(tmp_path):
    path = tmp_path / "parts.json"
    Parts(path, "a")("one", lambda: {"one": 1})
    assert Parts(path, "b")("one", lambda: {"one": 2}) == {"one": 2}
    path.write_text('{"key": "b", "parts"')
    assert Parts(path, "b")("one", lambda: {"one": 3}) == {"one": 3}
