from __future__ import annotations

import contextlib
import json
import math
import shutil
import time

import jax
import numpy as np
import pytest

from latent_jax.core.errors import CheckpointError, ConfigError, MeshError, RunError
from latent_jax.sharding import MeshConfig, make_mesh
from latent_jax.train import Preempted, fit, load_variables, read_warnings, save_weights
from latent_jax.train import loop as loop_module
from latent_jax.train.protocol import BatchSpec
from latent_jax.train.testing import ToySystem, toy_config


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(out, system=None, mesh=None, progress=None, **train):
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return fit(system or ToySystem(), toy_config(**train), out, mesh, progress)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


class Stop(Exception):
    pass


def stop_at(step):
    """A system whose data end the run by an exception, as a crash would."""

    class Crashing(ToySystem):
        def train_data(self, phase, start_state):
            data = super().train_data(phase, start_state)
            outer = type(data).__next__

            class Data(type(data)):
                def __next__(self):
                    if self._at == step:
                        raise Stop
                    return outer(self)

            data.__class__ = Data
            return data

    return Crashing()


def test_resume_is_bit_for_bit_and_rows_are_never_doubled(tmp_path):
    kw = {"steps": 14, "checkpoint": {"every": 4}, "eval_every": 5}
    whole = run(tmp_path / "a", **kw)
    with pytest.raises(Stop):
        run(tmp_path / "b", stop_at(11), **kw)
    assert [r["step"] for r in rows(tmp_path / "b") if "loss" in r] == list(range(1, 12))
    again = run(tmp_path / "b", **kw)
    same(whole, again)
    for out in ("a", "b"):
        got = rows(tmp_path / out)
        assert [r["step"] for r in got if "loss" in r] == list(range(1, 15))
        assert [r["step"] for r in got if "eval.mse" in r] == [5, 10, 14]
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_finished_run_returns_at_once_and_another_config_is_refused(tmp_path):
    state = run(tmp_path, steps=3)
    before = (tmp_path / "metrics.jsonl").read_text()
    system = ToySystem()
    same(state, run(tmp_path, system, steps=3, log_every=2))  # logging may differ
    assert (tmp_path / "metrics.jsonl").read_text() == before
    with pytest.raises(CheckpointError, match="another configuration.*init_from"):
        run(tmp_path, steps=3, optimizer={"lr": 0.5})


def test_restore_onto_another_mesh_continues(tmp_path, devices):
    kw = {"steps": 8, "checkpoint": {"every": 4}}
    whole = run(tmp_path / "a", **kw)
    with pytest.raises(Stop):
        run(tmp_path / "b", stop_at(6), **kw)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices)
    again = run(tmp_path / "b", mesh=mesh, **kw)
    assert again.params["hidden"]["kernel"].sharding.spec[0] == "fsdp"
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-4,
                                                         atol=1e-5), whole.params, again.params)


def test_step_is_traced_once_and_moves_nothing_implicitly(tmp_path, monkeypatch):
    system = ToySystem()
    inner = loop_module._Run._loop

    def guarded(self, state, watch):
        with jax.transfer_guard("disallow"):
            return inner(self, state, watch)

    monkeypatch.setattr(loop_module._Run, "_loop", guarded)
    run(tmp_path, system, steps=12, log_every=4)
    assert system.traces == 1


def test_nan_steps_are_skipped_counted_and_stop_the_run_after_n(tmp_path):
    state = run(tmp_path / "ok", ToySystem(nan_steps=(3, 5)), steps=8, max_nonfinite=2)
    assert int(state.guard["skipped"]) == 2
    bad = [r["step"] for r in rows(tmp_path / "ok") if r["skipped"]]
    assert bad == [4, 6]
    row = rows(tmp_path / "ok")[3]
    assert row["term.mse"] is None and "term.mse" in row["nonfinite"]
    warning = read_warnings(tmp_path / "ok")[0]
    assert warning["step"] == 4 and "mse" in warning["message"]
    with pytest.raises(RunError, match=r"3 steps in a row.*mse"):
        run(tmp_path / "bad", ToySystem(nan_steps=tuple(range(4, 30))), steps=20, max_nonfinite=3)
    assert all(math.isfinite(r["loss"]) for r in rows(tmp_path / "bad")[:4])


def test_guards_warn_and_stop(tmp_path):
    rule = {"metric": "accuracy", "below": 2.0, "after": 2, "patience": 3, "message": "collapse"}
    state = run(tmp_path, steps=20, log_every=1, guards=[{**rule, "stop": True}])
    assert 5 <= int(state.step) < 20
    (warning,) = read_warnings(tmp_path)
    assert warning["guard"] == "stop" and warning["step"] == 5 and "collapse" in warning["message"]
    again = run(tmp_path, steps=20, log_every=1, guards=[{**rule, "stop": True}])
    same(state, again)  # saved where it stopped, and it stays stopped


def test_init_from_starts_fresh_with_other_weights(tmp_path):
    first = run(tmp_path / "a", steps=6)
    second = run(tmp_path / "b", steps=0, init_from=str(tmp_path / "a"))
    same(first.params, second.params)
    assert int(second.step) == 0
    assert float(jax.tree.leaves(second.opt_state)[1].sum()) == 0.0
    weights = tmp_path / "w.safetensors"
    save_weights(weights, first.variables)
    same(first.params, run(tmp_path / "c", steps=0, init_from=str(weights)).params)
    with pytest.raises(CheckpointError, match="shape"):
        run(tmp_path / "d", ToySystem(hidden=8), steps=1, init_from=str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(tmp_path / "e", steps=1, init_from=str(tmp_path / "nowhere"))


def test_partial_init_from(tmp_path):
    class More(ToySystem):
        def init(self, rngs, batch):
            variables = super().init(rngs, batch)
            variables["params"]["extra"] = {"kernel": jax.numpy.ones(3)}
            return variables

        def param_labels(self, params):
            return {**super().param_labels(params), "extra": {"kernel": "body"}}

    run(tmp_path / "a", steps=1)
    with pytest.raises(CheckpointError, match="params/extra/kernel.*init_partial"):
        run(tmp_path / "b", More(), steps=0, init_from=str(tmp_path / "a"))
    state = run(tmp_path / "c", More(), steps=0, init_from=str(tmp_path / "a"), init_partial=True)
    assert state.params["extra"]["kernel"].sum() == 3


def test_slices_by_time_continue_to_the_same_end(tmp_path):
    class Slow(ToySystem):
        def unit_counts(self, batch):
            time.sleep(0.02)
            return {}

    whole, stops = run(tmp_path / "a", steps=6), 0
    for _ in range(20):
        try:
            state = run(tmp_path / "b", Slow(), steps=6, max_minutes=0.05 / 60)
            break
        except Preempted as e:
            assert e.exit_code == 75
            stops += 1
    assert stops
    same(whole, state)
    assert [r["step"] for r in rows(tmp_path / "b")] == list(range(1, 7))


def test_saves_by_time_do_not_change_what_is_best(tmp_path):
    kw = {"steps": 6, "eval_every": 3}
    run(tmp_path / "a", **kw)
    run(tmp_path / "b", checkpoint={"minutes": 1e-9, "keep_last": 9}, **kw)
    a, b = (load_variables(tmp_path / d)[1]["host"]["selection"] for d in "ab")
    assert a == b
    assert len(list((tmp_path / "b" / "checkpoints").glob("[0-9]*"))) == 6


def test_phases_alternate_labels_data_and_weights(tmp_path):
    class Watch(ToySystem):
        asked: list

        def train_data(self, phase, start_state):
            self.asked.append(phase)
            return super().train_data(phase, start_state)

    system = Watch()
    system.asked = []
    phases = [{"name": "e", "steps": 2, "train": ["head"], "data": "other",
               "weights": {"l2": 0.5}},
              {"name": "m", "steps": 3, "freeze": ["head"]}]
    kw = {"steps": 10, "phases": phases, "checkpoint": {"every": 3}, "log_every": 1}
    whole = run(tmp_path / "a", system, **kw)
    got = rows(tmp_path / "a")
    assert [r["phase"] for r in got] == ["e", "e", "m", "m", "m"] * 2
    assert all(("grad_norm.head" in r) == (r["phase"] == "e") for r in got)
    assert {r["weight.l2"] for r in got if r["phase"] == "e"} == {0.5}
    assert set(system.asked) == {"main", "other"}
    with pytest.raises(Stop):
        run(tmp_path / "b", stop_at(4), **kw)
    same(whole, run(tmp_path / "b", **kw))
    with pytest.raises(ConfigError, match="phases 'x'.*nobody"):
        run(tmp_path / "c", steps=2, phases=[{"name": "x", "train": ["nobody"]}])


def test_gate_state_survives_a_resume(tmp_path):
    weights = {"mse": 1.0, "l2": {"value": 0.1, "gate": {"metric": "accuracy", "open": 0.2,
                                                        "floor": 0.1, "patience": 2}}}
    kw = {"steps": 16, "checkpoint": {"every": 4}, "log_every": 1}
    whole = run(tmp_path / "a", ToySystem(weights=weights), **kw)
    assert bool(whole.gates["l2"]["opened"])
    assert {r["weight.l2"] for r in rows(tmp_path / "a")} >= {0.0}
    crashing = stop_at(13)
    crashing.weights = ToySystem(weights=weights).weights
    with pytest.raises(Stop):
        run(tmp_path / "b", crashing, **kw)
    same(whole, run(tmp_path / "b", ToySystem(weights=weights), **kw))


def test_a_gate_on_what_no_batch_gives_is_said_before_anything_is_compiled(tmp_path):
    """Also where several phases read batches of different kinds, one of which has it."""

    class Alternating(ToySystem):
        def loss_terms(self, variables, frozen, batch, rngs, train):
            terms, new, aux = super().loss_terms(variables, frozen, batch, rngs, train)
            if "other" in batch:
                terms["rare"] = terms.pop("watched")
            return terms, new, aux

        def batch_specs(self, phase):
            rows = jax.ShapeDtypeStruct((16,), np.float32)
            arrays = {"x": jax.ShapeDtypeStruct((16, 8), np.float32), "y": rows, "mask": rows}
            own = {"other": rows} if phase == "other" else {}
            return (BatchSpec(phase, 1.0, arrays | own),)

    def gated(metric):
        return {"mse": 1.0, "l2": {"value": 0.01, "gate": {"metric": metric}}}

    phases = [{"name": "a", "steps": 2}, {"name": "b", "steps": 2, "data": "other"}]
    said = "weights.l2.gate: no loss term or aux value 'nope'; there are: accuracy, l2, mse"
    for system, given in ((ToySystem, {}), (Alternating, {"phases": phases})):
        wrong = system(weights=gated("nope"))
        with pytest.raises(ConfigError, match=said):
            fit(wrong, toy_config(**given), tmp_path / "no")
    right = Alternating(weights=gated("rare"))
    fit(right, toy_config(steps=4, phases=phases), tmp_path / "yes")


def test_best_peak_and_last_are_kept(tmp_path):
    values = iter([0.1, 0.9, 0.3, 0.5, 0.6, 0.6, 0.2, 0.1])

    class Scored(ToySystem):
        def quick_eval(self, variables, frozen):
            return {"score": next(values)}

    run(tmp_path, Scored(), steps=16, eval_every=2,
        checkpoint={"metric": "eval.score", "mode": "max", "smoothing": 0.5, "keep_last": 1})
    ema, best, peak = None, (-1, 0), (-1, 0)
    for step, v in zip(range(2, 17, 2), [0.1, 0.9, 0.3, 0.5, 0.6, 0.6, 0.2, 0.1], strict=True):
        ema = v if ema is None else 0.5 * ema + 0.5 * v
        best, peak = max(best, (v, step)), max(peak, (ema, step))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == sorted({best[1], peak[1], 16})
    assert load_variables(tmp_path, "best")[1]["step"] == best[1] == 4
    assert load_variables(tmp_path, "peak")[1]["step"] == peak[1]
    assert load_variables(tmp_path)[1]["step"] == 16
    with pytest.raises(CheckpointError, match="no checkpoint '5'"):
        load_variables(tmp_path, "5")


def test_a_run_that_ended_before_its_first_checkpoint_starts_again_and_says_so(tmp_path):
    kw = {"steps": 6, "checkpoint": {"every": 4}, "log_every": 1}
    whole = run(tmp_path / "a", **kw)
    with pytest.raises(Stop):
        run(tmp_path / "b", stop_at(2), **kw)
    assert len(rows(tmp_path / "b")) == 2
    told = []
    again = run(tmp_path / "b", progress=lambda e: told.append(e.message), **kw)
    assert any(t and "starting from step 0" in t for t in told)
    same(whole, again)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_the_best_checkpoint_survives_a_resume(tmp_path):
    values = iter([0.9, 0.1, 0.2, 0.3, 0.4, 0.5])  # the first is the best
    kw = {"steps": 12, "eval_every": 2, "log_every": 1,
          "checkpoint": {"every": 1, "metric": "eval.score", "mode": "max", "keep_last": 1}}
    crashing = stop_at(5)
    for system in (crashing, ToySystem()):
        system.quick_eval = lambda variables, frozen: {"score": next(values)}
        ends = pytest.raises(Stop) if system is crashing else contextlib.nullcontext()
        with ends:
            run(tmp_path, system, **kw)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    # Not 3: it was saved with an evaluation behind it, but it is not what was evaluated.
    assert kept[0] == 2 and load_variables(tmp_path, "best")[1]["step"] == 2
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(CheckpointError, match="best checkpoint, step 2, is not there any more"):
        load_variables(tmp_path, "best")


def test_progress_reports_rates_and_messages(tmp_path):
    events = []
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    fit(ToySystem(), toy_config(steps=12, log_every=3), tmp_path, mesh=mesh, progress=events.append)
    last = events[-1]
    assert last.step == last.total == 12 and last.eta == 0
    assert last.rates["examples"] == pytest.approx(16 * last.rates["steps"])
    assert "term.mse" in last.metrics


def test_a_metric_that_is_never_measured_is_told(tmp_path):
    run(tmp_path, steps=2, checkpoint={"metric": "eval.nope"})
    (warning,) = read_warnings(tmp_path)
    assert "eval.nope was never measured" in warning["message"] and "term.mse" in warning["message"]


def test_bad_input_is_one_line(tmp_path, devices):
    mesh = make_mesh(MeshConfig(data=8), devices)
    with pytest.raises(MeshError, match="batch_size"):
        run(tmp_path / "x", ToySystem(batch_size=12), mesh=mesh, batch_size=12)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="cannot write .*Not a directory"):
        run(file / "run")
