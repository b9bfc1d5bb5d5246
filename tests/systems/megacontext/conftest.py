"""A run and a store that several files of tests look at."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from latent_jax import cli
from latent_jax import run as runs
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.gist import GistNet, Gists
from latent_jax.systems.megacontext.runtime import Runtime
from latent_jax.systems.megacontext.working import WorkingContext


@pytest.fixture(scope="package")
def trained(tmp_path_factory):
    """A run that has hardly learned, and a store of its gists made by the commands."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = {
        "mesh.data": 1, "train.steps": 1, "train.batch_size": 8, "train.eval_every": 0,
        "train.phases": [],
        "data.rows": 8, "out": str(folder / "run"),
    }  # fmt: skip
    runs.train(runs.resolve("megacontext/tiny", overrides))
    texts = folder / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("The mill at Dunmore burned down in 1911. " * 20)
    (texts / "b.txt").write_text("Nobody was hurt when the bridge fell. " * 20)
    run, store = str(folder / "run"), str(folder / "store")
    command = ["mega", "ingest", str(texts), "--store", store, "--run", run]
    first = CliRunner().invoke(cli.app, command)
    assert first.exit_code == 0, first.output
    assert "gists made" in first.output
    return run, store, str(texts)


@pytest.fixture(scope="session")
def untrained():
    """Makes parameters of a GistNet that has not been trained, for a reader and a model."""

    def make(reader, model):
        c = reader.config
        shape = (c.num_layers, 1, model.layout.block, c.num_kv_heads, c.head_dim)
        some = Gists(jnp.zeros(shape), jnp.zeros(shape))
        return GistNet(model, c).init(jax.random.key(0), some, method="touch")["params"]

    return make


@pytest.fixture
def watched(monkeypatch):
    """Every context of a generation, against one that is made from nothing."""
    seen, moved = [], Runtime._moved

    def look(self, tiling, context, clock):
        tiling, edit, begun = moved(self, tiling, context, clock)
        memory, budget = self.memory, self.config.budget
        assert bool(tl.check(self.layout, tiling, self.blocks, budget).ok)
        assert len(memory.tree) % self.layout.block == 0
        nodes, live, start = self.context(tiling)
        assert context.nodes == nodes
        fresh = WorkingContext(memory, budget)
        fresh.edit(nodes, start)
        again = memory.begin(fresh, live, start, len(live), self.layout.block)
        np.testing.assert_allclose(begun.hidden, again.hidden, atol=1e-4)
        assert int(begun.position[0]) == int(again.position[0])
        seen.append((nodes, edit))
        return tiling, edit, begun

    monkeypatch.setattr(Runtime, "_moved", look)
    return seen
