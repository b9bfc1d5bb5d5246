"""The report: complete, self-contained, and deaf to what samples try to inject."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from latent_jax.core.config import dump_yaml
from latent_jax.core.errors import RunError
from latent_jax.report import figures, html, load_run, samples, scores, tables, write_report

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'single' $x_1$"


def make_run(path: Path, **parts) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"system": "toy", "name": EVIL, "seed": 3, "data": {"source": EVIL}}
    (path / "config.yaml").write_text(dump_yaml(config))
    (path / "config.hash").write_text("abc123\n")
    for name, content in parts.items():
        file = path / name.replace("__", ".")
        if isinstance(content, str):
            file.write_text(content)
        elif file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            file.write_text(json.dumps(content))
    return path


def rows(count: int = 60) -> list[dict]:
    return [
        {
            "step": s, "phase": "main", "loss": 4.0 / s, "term.ae": 3.0 / s, "term.answer": 1.0 / s,
            "weight.ae": 1.0, "weight.answer": s / count, "share.ae": 0.75, "share.answer": 0.25,
            "grad_norm": 1.0, "grad_norm.lora": 0.5 / s, "lr": 1e-3 / s, "skipped": 0.0,
        }
        for s in range(1, count + 1)
    ]  # fmt: skip


RESULTS = {
    "ratio": 4.0,
    "squad.f1.latent": 0.41, "squad.f1.latent.ci95": [0.35, 0.47], "squad.em.latent": 0.3,
    "squad.f1.full_text": 0.6, "squad.f1.shuffled": 0.05, "squad.f1.no_context": 0.04,
    "squad.qwen.x8.f1.latent": 0.3, "squad.qwen.x16.f1.latent": 0.2,
    "squad.qwen.x8.f1.full_text": 0.6,
    "ae.token_accuracy": 0.8, "ae.token_accuracy.shuffled": 0.02, "ae.nll": float("nan"),
    "latent.spectrum": [1.0, 0.5, 0.25], "memory.peak_bytes": 3_812_345_678,
    EVIL + ".x.y": 1.0,
}  # fmt: skip

SAMPLES = [
    {"kind": "reconstruction", "text": "a b " + EVIL, "reconstruction": "a x " + EVIL, "n": 3},
    {"kind": "answer", "question": EVIL, "context": EVIL, "answers": [EVIL],
     "predictions": {"shuffled": EVIL, "latent": "1853"}, "f1": {"latent": 1.0}},
    {"kind": EVIL, "other": [EVIL]},
]  # fmt: skip


class Page(HTMLParser):
    """Collects tags, text and every URL that a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and value:
                self.urls.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    path = make_run(
        tmp_path_factory.mktemp("run"),
        metrics__jsonl=rows(),
        results__json=RESULTS,
        samples__jsonl=SAMPLES,
        warnings__jsonl=[{"step": 5, "guard": "collapse", "message": EVIL}],
        environment__json={"versions": {"jax": "0.10.2"}, "devices": ["1 × cpu: cpu"]},
    )
    text = write_report(path).read_text(encoding="utf-8")
    assert "xmlns" in text
    return Page(text)


def test_nothing_is_loaded_and_nothing_runs(page):
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.handlers == []
    assert all(url.startswith("#") for url in page.urls), page.urls


def test_injected_text_is_shown_as_text(page):
    assert page.text.count("<script>alert(1)</script>") >= 8  # title, data, samples, warning, names


def test_every_part_is_there(page):
    for words in (
        "Question answering (SQuAD)", "Reconstruction", "Latent statistics", "Cost",
        "Warnings from the guards", "Samples", "Configuration", "abc123", "1 × cpu: cpu", "0.10.2",
        "squad.qwen.x8", "another text's latents", "0.35 – 0.47", "3.81 GB", "nan",
        "F1, qwen against the ratio", "share of the loss", "ae (weight 1)",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") >= 8
    assert page.tags.count("mark") >= 3


def test_ids_are_unique(page):
    assert len(page.ids) == len(set(page.ids))


def test_links_lead_somewhere(page):
    missing = [u for u in page.urls if u != "#" and u[1:] not in page.ids]
    assert missing == []


def test_a_bare_run_still_has_a_report(tmp_path):
    text = write_report(make_run(tmp_path / "bare")).read_text()
    assert "results.json is missing." in text


def test_what_is_known_to_be_wrong_stands_in_the_report(tmp_path):
    path = make_run(tmp_path, results__json=RESULTS, metrics__jsonl=rows(3))
    said = []

    def find(results, samples, log):
        said.append((results["ratio"], len(samples), len(log)))
        return ["latents-collapsed: " + EVIL]

    found = Page(write_report(path, find).read_text())
    assert said == [(4.0, 0, 3)] and "latents-collapsed" in found.text
    assert "script" not in found.tags
    assert "show none" in write_report(path, lambda *_: []).read_text()
    assert "show none" not in write_report(path).read_text()


def test_a_killed_run_still_has_a_report(tmp_path):
    cut = "".join(json.dumps(row) + "\n" for row in rows(5)) + '{"step": 6, "lo'
    path = make_run(tmp_path, metrics__jsonl=cut, results__json='{"a": 1')
    run = load_run(path)
    assert len(run.metrics) == 5
    assert run.notes[-2:] == ["metrics.jsonl: 1 unreadable line left out.",
                              "results.json is not valid JSON."] or len(run.notes) >= 2
    assert "unreadable line" in write_report(path).read_text()


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_no_run_is_one_clear_error(tmp_path, what):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    with pytest.raises(RunError, match=re.escape(str(path))):
        write_report(path)


def test_any_systems_results_show(tmp_path):
    results = {
        "bpb.total": 1.9, "rvq.level0.stage0.live": 200, "rvq.level0.stage1.live": 190,
        "rvq.level0.stage0.perplexity": 150.5, "baseline.unigram.nll": 3.0, "crps": 0.2,
        "nll_at_h.focus.w512": 2.0, "done": True,
    }  # fmt: skip
    text = Page(write_report(make_run(tmp_path, results__json=results)).read_text()).text
    for words in ("stage1", "190", "unigram", "crps", "w512", "150.5", "yes"):
        assert words in text, words


def test_tables_put_the_latent_first_and_controls_last():
    (section,) = [s for s in tables.sections(RESULTS) if s.key == "squad"]
    names = [row[0] for row in section.tables[0].rows]
    assert names == ["latent", "full_text", "shuffled", "no_context"]


def test_bare_name_joins_the_table_of_its_controls():
    (section,) = [s for s in tables.sections(RESULTS) if s.key == "ae"]
    assert [row[0] for row in section.tables[0].rows] == ["latent", "shuffled"]
    assert [name for name, _ in section.facts] == ["ae.nll"]


def test_by_ratio_reads_both_forms():
    found = scores.by_ratio(RESULTS)
    assert found[""]["latent"] == {4.0: (0.41, (0.35, 0.47))}
    assert found["qwen"]["latent"] == {8.0: (0.3, None), 16.0: (0.2, None)}


def test_quality_against_bits_is_drawn_from_few_bits_to_many():
    found = {"wire.d_z": 8, "wire.int4.f1.ci95": [0.1, 0.3]}
    for form, size, f1 in (("fp32", 32.0, 0.5), ("int4", 4.5, 0.2), ("int8", 8.5, 0.4)):
        found |= {f"wire.{form}.bytes_per_token": size, f"wire.{form}.f1": f1}
    names, lines = scores.by_bits(found)
    assert names == ["int4\n4 B", "int8\n8 B", "fp32\n32 B"]
    assert lines == {"f1": dict(zip(names, [(0.2, (0.1, 0.3)), (0.4, None), (0.5, None)],
                                    strict=True))}  # fmt: skip
    (section,) = tables.sections(found)
    assert [row[0] for row in section.tables[0].rows] == ["fp32", "int4", "int8"]
    (picture,) = html._comparisons(section, found, "")
    assert "Quality against bits" in picture and "int4" in picture


def test_wrong_pieces_are_marked():
    pieces = samples.compare(["a", " b", " c", " d"], ["a", " x", " c"])
    assert pieces == [("a", "same"), (" x", "wrong"), (" c", "same"), (" d", "missing")]


def test_figures_are_reproducible_and_follow_the_page_colour():
    line = {"loss": ([1, 2, 3], [3.0, 2.0, 1.0])}
    first, second = figures.curve("loss", line, log=True), figures.curve("loss", line, log=True)
    assert first == second
    assert "currentColor" in first and "mathdefault" not in first and "$" not in first


def test_long_logs_stay_small(tmp_path):
    path = make_run(tmp_path, metrics__jsonl=rows(5000))
    assert write_report(path).stat().st_size < 1_500_000


def test_stages_are_lines_of_one_panel():
    """Eight stages are one figure with eight lines and not eight figures."""
    rows = [
        {"step": s, "rvq.level0.stage0.dead": 0.1 * s, "rvq.level0.stage1.dead": 0.2 * s,
         "rvq.level0.error": 1.0, "eval.top.stage0.accuracy": 0.5}
        for s in (1, 2, 3)
    ]  # fmt: skip
    panels = dict(html.curves(rows))
    assert len(panels["Rvq"]) == 2
    assert all(name in panels["Rvq"][0] for name in ("level0.dead", "stage0", "stage1"))
    assert "level0.error" in panels["Rvq"][1]
    assert len(panels["Held out, while training"]) == 1


def test_bytes_are_drawn_against_the_code_bits_of_each_level(tmp_path):
    results = {
        f"rate_distortion.{level}stages{i}.{name}": value * i
        for level, scale in (("", 1.0), ("level1.", 0.3))
        for i in (1, 2)
        for name, value in (("code_bits_per_byte", scale), ("byte_accuracy", 0.4))
    }
    names, lines = scores.by_code_bits(results)
    assert names == ["0.3", "0.6", "1", "2"]
    assert lines == {
        "level1": {"0.3": (0.4, None), "0.6": (0.8, None)},
        "level0": {"1": (0.4, None), "2": (0.8, None)},
    }
    page = write_report(make_run(tmp_path / "r", results__json=results)).read_text()
    assert "Right bytes, free-running, by stages kept" in page


def test_a_standard_deviation_stands_beside_its_number():
    results = {"nll.last": -1.5, "nll.last.std": 0.25, "nll.last.seed0": -1.75, "crps": 0.5,
               "crps.std": 0.125, "alone.std": 2.0, "nll.last.ci95": [-2.0, -1.0]}  # fmt: skip
    found = {s.key: s for s in tables.sections(results)}
    ((name, cell),) = found["crps"].facts
    assert (name, cell.text, cell.interval) == ("crps", "0.5", "± 0.125")
    (table,) = found["nll"].tables
    assert [row for row, _, _ in table.rows] == ["seed0", "this run"] and table.columns == ["last"]
    assert table.rows[1][2][0].interval == "-2 to -1"  # an interval says more
    assert found["alone"].facts[0][0] == "alone.std"


def test_a_result_stands_in_the_table_of_its_controls():
    results = {"recovery.lod1.slots2": 0.5, "recovery.lod1.slots2.shuffled": 0.25,
               "recovery.lod1.histories": 64, "recovery.lod2.histories": 64}  # fmt: skip
    (section,) = tables.sections(results)
    found = {t.title: [row for row, _, _ in t.rows] for t in section.tables}
    assert found == {"recovery.lod1": ["gist", "shuffled"], "recovery": ["lod1", "lod2"]}
