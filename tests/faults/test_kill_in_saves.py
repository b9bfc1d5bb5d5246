"""kill -9 in the middle of saves, at fifty random points of one run.

The toy saves every step, and a save takes longer than a step, so that most kills land inside one:
the aside directory that the dead process left tells which.
"""

from __future__ import annotations

import multiprocessing
import random
import time

import jax
import numpy as np
import pytest

from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import fit, load_variables
from latent_jax.train.testing import ToySystem, toy_config

KILLS = 50
STEPS = 300  # more than fifty lives of a quarter of a second take
SETTINGS = {
    "steps": STEPS, "log_every": 1, "eval_every": 10,
    "checkpoint": {"every": 1, "keep_last": 2, "metric": "eval.mse", "mode": "min"},
}  # fmt: skip


class Noted(ToySystem):
    """The toy, which keeps its weights after each evaluation."""


    def quick_eval(self, variables, frozen):
        kernel = np.asarray(variables["params"]["hidden"]["kernel"])
        self.kernels = getattr(self, "kernels", [])
        self.kernels.append(kernel)
        return super().quick_eval(variables, frozen)


def settings(**checkpoint):
    return toy_config(**{**SETTINGS, "checkpoint": {**SETTINGS["checkpoint"], **checkpoint}})


def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def life(out, asynchronous, stepping, texts):
    """One process of the run; sets ``stepping`` after its first own step."""
    first = []

    def progress(event):
        if event.message:
            texts.put(event.message)
        first.append(event.step)
        if event.step > first[0]:
            stepping.set()

    fit(ToySystem(hidden=2048), settings(asynchronous=asynchronous), out, mesh(), progress)


def entries(out):
    """Finished steps, and what unfinished saves and deletions have left."""
    found = sorted(p.name for p in (out / "checkpoints").iterdir())
    steps = sorted(int(name) for name in found if name.isdigit())
    return steps, [name for name in found if not name.isdigit()]


@pytest.mark.slow
def test_fifty_kills_inside_saves_lose_nothing(tmp_path):
    whole = Noted(hidden=2048)
    fit(whole, toy_config(**{**SETTINGS, "eval_every": 1, "checkpoint": {"every": 0}}),
        tmp_path / "whole", mesh())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latent_jax.train.loop", "latent_jax.train.testing"])
    out, chance = tmp_path / "killed", random.Random(0)
    inside = newest = lives = back = 0
    while lives < KILLS:
        stepping, texts = context.Event(), context.SimpleQueue()
        child = context.Process(target=life, args=(out, bool(lives % 2), stepping, texts))
        child.start()
        while not stepping.wait(0.05):
            assert child.is_alive(), f"life {lives} ended with {child.exitcode} before a step"
        time.sleep(chance.uniform(0.0, 0.25))
        child.kill()
        child.join()
        assert child.exitcode == -9, f"{STEPS} steps are too few for {KILLS} lives"
        told = []
        while not texts.empty():
            told.append(texts.get())
        if newest:
            assert any(f"resumed from step {newest} " in text for text in told), told
        assert not any("damaged" in text for text in told), told
        lives += 1
        steps, aside = entries(out)
        inside += bool(aside)
        # Each life may leave what it was writing, and what it was about to delete: the next one
        # clears that away, so that nothing grows.
        assert len(aside) <= 2 and len(steps) <= 7, (steps, aside)
        last = steps[-1] if steps else 0
        assert last >= newest, "a finished checkpoint is gone"
        back += last == newest
        newest = last
        if not newest:
            continue
        variables, meta = load_variables(out)
        assert meta["step"] == newest and meta["data"][0]["main"]["json"]["at"] == newest
        np.testing.assert_array_equal(
            variables["params"]["hidden"]["kernel"], whole.kernels[newest - 1]
        )
        load_variables(out, "best")
    final = fit(ToySystem(hidden=2048), settings(), out, mesh())
    print(f"{KILLS} kills, {inside} inside a save; reached step {newest}; {back} lives saved none")
    assert inside >= KILLS // 2
    assert int(final.step) == STEPS
    np.testing.assert_array_equal(final.params["hidden"]["kernel"], whole.kernels[-1])
    steps, aside = entries(out)
    assert not aside and not (out / "checkpoints_damaged").exists()
    assert len(steps) <= 4  # two last ones, best and peak
