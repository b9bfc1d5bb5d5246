"""Parts of the report: units, sizes and seeds below every figure, and what notebooks show of it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from latent_jax.core.errors import RunError
from latent_jax.report import calibration, comparisons, heat, load_run, looks, units, write_report
from latent_jax.report.notebook import RunView, show
from latent_jax.systems.latentwire.look import Read, Rebuilt
from latent_jax.systems.spacing.look import Looked

EVIL = "</span><script>alert(1)</script>"
CONFIG = """
system: toy
name: t
seed: 3
train: {batch_size: 32}
eval: {quick_rows: 16, windows: 8}
"""
RESULTS = """{"squad.questions": 96, "squad.f1.latent": 0.4, "squad.f1.full_text": 0.5,
"windows": 400,
"squad.f1.latent.ci95": [0.3, 0.5], "nll.last": -1.5, "nll.last.ci95": [-1.6, -1.4], "crps": 0.1,
"pit.histogram": [1.1, 0.9], "rvq.level0.stage0.usage": [0.5, 0.3, 0.2],
"baseline.ar128.nll": 1.0, "baseline.ar8.nll": 2.0, "baseline.gaudin.rmse": 0.4}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = [
        f'{{"step": {s}, "loss": {3 / s}, "term.a": 1.0, "share.a": 0.5, "share.b": 0.5, '
        f'"eval.nll": 2.0, "rvq.level0.stage0.dead": 0.1, "grad_norm": 1.0, "lr": 0.1}}\n'
        for s in (1, 2, 3)
    ]
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "results.json").write_text(RESULTS)
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


def test_every_figure_says_what_its_points_are_and_the_seed(page):
    figures = re.findall(r"<figure>(.*?)</figure>", page, flags=re.S)
    assert len(figures) >= 9
    for figure in figures:
        (caption,) = re.findall(r"<figcaption>(.*?)</figcaption>", figure, flags=re.S)
        assert "seed 3" in caption and ("n = " in caption or "a point: " in caption), caption
    assert "n = 96 questions; seed 3" in page and "the same 16 held-out rows" in page


def test_every_figure_has_a_unit_on_its_axis(page):
    for figure in re.findall(r"<figure>(.*?)</figure>", page, flags=re.S):
        title = re.search(r'aria-label="([^"]*)"', figure).group(1)
        words = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
        labels = [w for w in words if w != title and not re.fullmatch(r"[−\-\d.e×]*", w)]
        assert len(set(labels)) >= 2, (title, words)  # across and down


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("squad.f1.latent", "share"), ("ae.exact_prefix.shuffled", "tokens"),
        ("squad.nll.latent", "nats per token"), ("nll.last", "nats"), ("rmse", "mean gaps"),
        ("baseline.gaudin.rmse", "mean gaps"), ("bpb.total", "bits per byte"),
        ("rate_distortion.stages1.code_bits_per_byte", "bits per byte"),
        ("top.stage0.bits", "bits per row"), ("rvq.level0.stage0.perplexity", "codes"),
        ("recovery.lod1.slots4", "share recovered"), ("nll_at_h.lod1.gist", "nats per token"),
        ("throughput.tokens_per_second", "tokens per second"), ("ratio", "tokens per latent"),
        ("squad.questions", ""), ("recovery.lod1.histories", ""), ("latent.cosine", "cosine"),
        ("flops.train_per_byte.top", "FLOPs per byte"), ("term.reconstruct", "nats"),
        ("term.commit", "mean square"), ("share.answer", "share"), ("lr.pool", "rate per step"),
        ("latent.norm", "norm"), ("grad_norm.pool", "norm"), ("coverage.80.conformal", "share"),
        ("slots.ablation_delta.0", "nats"), ("floor.gue.k8", "nats"), ("made_up.name", ""),
    ],
)  # fmt: skip
def test_units(name, unit):
    assert units.unit(name) == unit


def test_several_seeds_are_told():
    assert units.measured_on("nll", {"windows": 10}, {"seed": 2, "seeds": 3}) == (
        "n = 10 windows of gaps; seeds 2 to 4, their mean"
    )


def test_a_notebook_shows_what_the_page_shows(run, page):
    view = RunView(run)
    for figure in re.findall(r"<svg.*?</svg>", view.section("rvq").body, flags=re.S):
        assert figure in page
    assert "0.3 – 0.5" in view.section("squad").body
    assert view.section("nll", "unheard").body == view.section("nll").body
    assert "-1.6 to -1.4" in view.section("nll").body  # a dash would be another minus
    curves = view.curves("loss", "rvq").body
    assert 'aria-label="loss"' in curves and "grad" not in curves
    assert "<style>" in view._repr_html_() and "seed" in view._repr_html_()


def test_what_a_run_does_not_have_is_one_line(run):
    with pytest.raises(RunError, match="no results squid.*squad"):
        RunView(run).section("squid")
    with pytest.raises(RunError, match="no column with unheard"):
        RunView(run).curves("unheard")
    assert load_run(run).config["seed"] == 3


def test_rows_are_ordered_by_their_numbers(run):
    body = RunView(run).section("baseline").body
    order = [body.index(name) for name in ("ar8", "ar128", "gaudin")]
    assert order == sorted(order) and "rmse" in body


def test_texts_are_shown_as_text_and_the_redder_the_dearer():
    found = Rebuilt([EVIL, "b\n", "c"], np.array([0.0, 4.0, np.nan]), [EVIL, "x", "x"])
    (map_,) = looks.tokens("own", [found], "seed 0")
    assert "<script>" not in map_ and map_.count("alert(1)") == 2 and "⏎" in map_
    assert "4 nats per token; likeliest: &#39;x&#39;" in map_
    assert [float(x) for x in re.findall(r"--heat:([\d.]+)", map_)] == [0.0, 0.375, 0.0]
    assert "mean 2, deepest colour 8 nats per token, 2 pieces; seed 0" in map_
    table = looks.nearest([Read(EVIL, [(EVIL, 0.5)])], "one text")
    assert "<script>" not in table and "0.50" in table


def test_a_matrix_tells_small_numbers_and_its_scale():
    small = heat.matrix("m", np.eye(2), "cosine", ["a", "b"], ["a", "b"], across="x", down="y")
    large = heat.matrix("m", np.zeros((20, 20)), "cosine")
    assert "1.00" in small and "cosine" in small and "1.00" not in large


def test_ranks_of_an_honest_density_stay_in_their_band():
    honest = (np.arange(500) + 0.5) / 500
    for values, inside in ((honest, True), (honest**3, False)):
        share = (np.arange(500) + 0.5) / 500
        limit = 1.358 / np.sqrt(500)  # Kolmogorov's, for many values
        assert (np.abs(share - np.sort(values)).max() < limit) == inside
        assert calibration.ranks("r", values).count("<path") >= 2
    assert "density" in calibration.pit("p", [1.0, 1.0], 100)


def test_predictions_slots_and_histories_are_drawn():
    grid = np.linspace(0, 3, 20)
    looked = Looked(
        np.linspace(0, 1, 50), np.array([2, 0]), np.array([1.0, 2.0]), grid, np.exp(-grid)[None],
        np.array([1.0]),
    )  # fmt: skip
    pictures = looks.predictions(looked, "seed 1")
    assert len(pictures) == 4 and all("seed 1" in p for p in pictures)
    found = {"slots.ablation_delta.0": 0.1, "slots.ablation_delta.1": 0.2, "slots.norm": [1.0, 2.0]}
    assert len(looks.slots(found, "seed 1")) == 2 and looks.slots({}, "") == []
    losses = {arm: np.arange(3.0) for arm in ("full", "gist", "dropped")}
    assert "n = 3 histories" in show(looks.histories(losses))._repr_html_()


def test_gists_and_baselines_are_drawn_beside_the_run():
    found = {
        "recovery.lod1.slots4": 0.5, "recovery.lod1.slots4.ci95": [0.4, 0.6],
        "recovery.lod1.slots4.shuffled": 0.2, "recovery.lod1.histories": 48, "nll.last": -1.0,
        "baseline.ar8.nll": -0.5, "baseline.ar32.nll": -1.2, "baseline.position_averaged.nll": 0.0,
    }  # fmt: skip
    (picture,) = comparisons.recovery(found)
    assert all(f">{arm}<" in picture for arm in ("gist", "shuffled")) and "histories" not in picture
    (picture,) = comparisons.likelihoods(found)
    assert picture.index(">ar32<") < picture.index(">this run<") < picture.index(">ar8<")
    assert comparisons.recovery({}) == [] and comparisons.likelihoods({"nll.last": 1.0}) == []
