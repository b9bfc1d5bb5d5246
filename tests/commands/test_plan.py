"""`latent-jax plan`: what it prints, what it refuses, and that it touches no weight."""

from __future__ import annotations

import gc

import jax
import pytest

from latent_jax import backbones, cli
from latent_jax.commands import work
from latent_jax.core.config import dump_yaml
from tests.toy_cli import TOY

POD = "latentwire/llama3_8b_pod"


def call(capsys, *args):
    capsys.readouterr()
    code = cli.main(["plan", *args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(dump_yaml(TOY))
    return str(path)


def test_eight_billion_parameters_are_planned_without_an_array(capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a plan loads no weights")

    monkeypatch.setattr(backbones, "load", load)
    before = jax.live_arrays()  # held, so that none of them is collected meanwhile
    # One kind of batch is enough here.
    less = ("--set", "train.phases=[]", "--set", "data.mix={reconstruct: 1.0}")
    code, out, _ = call(
        capsys, POD, "--devices", "64", "--chip", "v5e", "--table", *less,
        "--set", "data.lengths=[128]",
        "--set", "losses.distil_logits=0", "--set", "losses.distil_states=0",
    )  # fmt: skip
    gc.collect()
    known = {id(array) for array in before}
    assert code == 0 and all(id(array) in known for array in jax.live_arrays())
    assert "8,030,261,248" in out and "data 8 x fsdp 8 x tensor 1" in out
    assert "of 16 GiB on each device" in out and "197 TFLOP/s x 0.4" in out
    row = next(line for line in out.splitlines() if "reader/layers/q/kernel" in line)
    assert "all-gather over fsdp (a layer's weights)" in out
    assert "layers, embed, heads" in row and "-, fsdp" in row and "134 MB" in row


def test_fits_or_says_what_to_do(toy, capsys):
    code, out, _ = call(capsys, toy, "--hbm", "1", "--peak", "100", "--mfu", "0.5")
    assert code == 0 and "fits: " in out and "1 x 100 TFLOP/s x 0.5" in out
    code, out, _ = call(capsys, toy, "--hbm", "0.000001", "--devices", "8")
    (line,) = [line for line in out.splitlines() if line.startswith("warning:")]
    assert code == 0 and "does not fit" in line and "try " in line
    code, out, _ = call(capsys, toy)
    assert code == 0 and "fit" not in out.replace("FLOP", "")  # no memory given: nothing is said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--devices", "3", "--set", "mesh.fsdp=2"), "take 2 devices, which does not divide 3"),
        (("--devices", "0"), "--devices = 0: allowed: more than 0"),
        (("--chip", "abacus"), "--chip abacus: allowed: a100, h100"),
        (("--mfu", "2"), "--mfu = 2.0: allowed: at most 1"),
        (("--hbm", "-1"), "--hbm = -1.0: allowed: more than 0"),
        (("--devices", "3"), "train.batch_size = 8: does not divide"),
    ],
)
def test_what_cannot_be_planned_is_one_line(toy, capsys, arguments, says):
    code, out, err = call(capsys, toy, *arguments)
    assert code == 2 and says in err and err.count("\n") == 1 and not out


def test_an_unknown_architecture_is_refused(capsys):
    code, _, err = call(capsys, POD, "--devices", "8", "--set", "backbone.name=who/Knows-7B")
    assert code == 2 and "who/Knows-7B: its architecture is not known" in err


def test_a_run_that_will_not_fit_is_told_before_it_starts(toy, capsys, monkeypatch, tmp_path):
    command = ["train", toy, "--quiet", "--out", str(tmp_path / "run"), "--set", "train.steps=1"]
    monkeypatch.setattr(work, "memory_limit", lambda: 1024)
    assert cli.main(command) == 0
    _, err = capsys.readouterr()
    assert err.startswith("warning: does not fit") and err.count("\n") == 1
    monkeypatch.setattr(work, "memory_limit", lambda: 2**40)
    assert cli.main(command) == 0 and not capsys.readouterr().err
