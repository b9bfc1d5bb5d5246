"""A lens through the commands and the shared trainer: label, train, ask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import cli
from latent_jax import run as runs
from latent_jax.core.errors import ConfigError, StoreError
from latent_jax.systems.megacontext import labels, policies
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.focus import Focus, RuntimeConfig
from latent_jax.systems.megacontext.lens import shared_words
from latent_jax.systems.megacontext.lens_data import LensRows
from latent_jax.systems.megacontext.store import Stretch
from latent_jax.systems.megacontext.tiling import Tiling
from latent_jax.train.load import load_variables


@pytest.fixture(scope="module")
def table(trained, tmp_path_factory):
    run, store, _ = trained
    path = str(tmp_path_factory.mktemp("table") / "t.parquet")
    options = {
        "run": run, "budget": 96, "places": 6, "history": 24, "policies": "recency", "out": path
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items()]
    assert cli.main(["mega", "label", store, "--no-drops", "--quiet", *given]) == 0
    return path


def overrides(run, table, out):
    return {
        "train.init_from": run, "data.labels": [table], "train.steps": 3, "train.eval_every": 3,
        "train.batch_size": 8, "eval.budgets": [], "out": str(out),
    }  # fmt: skip


@pytest.mark.slow
def test_only_the_lens_is_trained_and_can_be_asked(trained, table, tmp_path, capsys):
    run, store, _ = trained
    config = runs.resolve("megacontext/tiny_lens", overrides(run, table, tmp_path / "lens"))
    system, state, out = runs.train(config)
    before, after = load_variables(run)[0]["params"], jax.device_get(state.params)
    for old, new in zip(*map(jax.tree.leaves, (before["gist"], after["gist"])), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.abs(after["lens"]["score"]["kernel"]).max() > 0  # starts at zero
    assert "eval.lens.ordered" in (out / "metrics.jsonl").read_text()
    rows = system.lens_rows
    assert (len(rows.train), len(rows.held_out)) == (5, 1)
    row = rows.row(*rows.train[0])
    assert np.abs(row["utility"]).max() > 0 and row["measured"].sum() == row["count"] - 1
    assert cli.main(["mega", "ask", store, "The mill burned", "--run", str(out), "--policy", "lens",
                     "--budget", "160", "--max-new-tokens", "2"]) == 0  # fmt: skip
    assert "raw blocks" in capsys.readouterr().out


def test_nodes_and_tail_gists_count_from_the_same_block(trained, table, tmp_path):
    """A causal lens orders the two, also of a stretch that begins later in the store."""
    run, _, _ = trained
    config = runs.resolve("megacontext/tiny_lens", overrides(run, table, tmp_path / "lens"))
    rows = LensRows.of_tables(config, runs.system_class("megacontext")(config).backbone)
    assert any(found.first for _, found in rows.train)
    for sight, found in rows.train:
        row = rows.row(sight, found)
        assert row["tail_at"][row["tail_mask"]].max() == found.cursor - 1


def test_words_are_those_that_the_focus_sees(trained, table, tmp_path):
    run, store, _ = trained
    given = overrides(run, table, tmp_path / "lens") | {"model.lens.words": True}
    config = runs.resolve("megacontext/tiny_lens", given)
    rows = LensRows.of_tables(config, runs.system_class("megacontext")(config).backbone)
    layout, found = config.model.layout, 0
    for sight, snapshot in rows.train:
        row, tree = rows.row(sight, snapshot), Stretch(sight.tree, snapshot.first, layout.levels)
        focus = Focus(tree, layout, RuntimeConfig(96, "bm25"))
        tail = [(snapshot.cursor - x) * layout.block for x in (layout.protected, 0)]
        best = focus.overlap(tree.tokens(*tail), snapshot.cursor)
        tiling = Tiling(row["level"], row["index"], *[0 * row["level"]] * 2, row["count"])
        best = policies.best_block(layout, tiling, jnp.asarray(best))
        free = tl.valid(tiling) & ~tl.tail(layout, tiling)
        words = shared_words(best, free)
        np.testing.assert_allclose(row["words"], words, atol=1e-6)
        found += int((row["words"][:, 0] == 1).sum())
    assert found >= len(rows.train)


def test_tables_that_do_not_belong_are_refused_before_training(trained, table, tmp_path):
    run, _, _ = trained
    given = overrides(run, table, tmp_path / "lens")
    system = runs.system_class("megacontext")(runs.resolve("megacontext/tiny_lens", given))

    def refused(error, said, **other):
        config = runs.resolve("megacontext/tiny_lens", given | other)
        with pytest.raises(error, match=said):
            LensRows.of_tables(config, system.backbone)

    columns, provenance = labels.read(table)
    lines = zip(*columns.values(), strict=True)
    rows = [dict(zip(columns, line, strict=True)) for line in lines]
    stale = labels.write(tmp_path / "stale.parquet", rows, provenance | {"gists": "older"})
    refused(StoreError, "stale: measured with gists of version older", **{
        "data.labels": [str(stale)]
    })  # fmt: skip
    refused(ConfigError, "needs data.labels", **{"data.labels": []})
    refused(ConfigError, "needs train.init_from", **{"train.init_from": None})
    refused(StoreError, "no such store", **{"data.store": str(tmp_path / "none")})
