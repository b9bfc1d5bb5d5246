"""The command line: exit codes, one-line errors, and every command on the toy system."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latent_jax import cli
from latent_jax.commands import errors
from latent_jax.core.config import dump_yaml
from tests.toy_cli import TOY

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A directory with a config and one finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "toy.yaml").write_text(dump_yaml(TOY))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.main(["run", "toy.yaml", "--quiet"]) == 0
        Path("runs/mute").mkdir()
        Path("runs/mute/config.yaml").write_text(dump_yaml({**TOY, "system": "tests.toy_cli:Mute"}))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def at_work(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def call(capsys, *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def one_line(err: str) -> bool:
    return err.startswith("latent-jax: ") and err.count("\n") == 1 and "Traceback" not in err


def test_help_is_quick_and_touches_no_device():
    code = (
        "import sys; from latent_jax import cli; cli.main(['--help'])\n"
        "assert 'jax' not in sys.modules, 'help imports jax'\n"
        "assert 'matplotlib' not in sys.modules, 'help imports matplotlib'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("run", "train", "eval", "generate", "ask", "diagnose", "report", "bench", "data"):
        assert name in done.stdout


def test_run_ends_with_the_table_and_the_report(at_work, capsys):
    code, out, _ = call(capsys, "run", "toy.yaml")
    assert code == 0
    assert "mse" in out and out.rstrip().endswith("report: runs/toy/report.html")


def test_progress_is_plain_in_a_pipe(at_work, capsys):
    code, _, err = call(capsys, "run", "toy.yaml", "--out", "runs/plain", "--seed", "7")
    assert code == 0
    assert "step 6/6" in err and "evaluate: toy 3/3" in err and "\x1b" not in err


def test_quiet_says_only_the_result(at_work, capsys):
    code, out, err = call(capsys, "run", "toy.yaml", "--quiet", "--out", "runs/quiet")
    assert (code, err) == (0, "")
    assert "mse" in out


def test_settings_reach_the_config(at_work, capsys):
    args = ["--set", "model.width=3", "--set", "train.optimizer.lr=3e-4", "--seed", "5"]
    code, out, _ = call(capsys, "config", "toy.yaml", "--yaml", *args, "--out", "123")
    assert code == 0
    import yaml

    tree = yaml.safe_load(out)
    assert tree["model"]["width"] == 3 and tree["seed"] == 5 and tree["out"] == "123"
    assert tree["train"]["optimizer"]["lr"] == pytest.approx(3e-4)


def test_config_tells_the_meaning(at_work, capsys):
    code, out, _ = call(capsys, "config", "toy.yaml")
    assert code == 0
    assert "inputs of the toy" in out and "width" in out and ">= 1" in out


def test_dry_run_writes_nothing(at_work, capsys):
    before = sorted(p.name for p in Path("runs").iterdir())
    code, out, _ = call(capsys, "run", "toy.yaml", "--dry-run", "--out", "runs/dry")
    assert code == 0
    for part in ("trained parameters", "frozen", "optimizer state", "activations", "is valid"):
        assert part in out
    # 8·16 kernel + 16 bias + 16 output; the bias of 1 is held.
    assert "160" in out
    assert sorted(p.name for p in Path("runs").iterdir()) == before


def test_train_eval_and_report_each_alone(at_work, capsys):
    assert call(capsys, "train", "toy.yaml", "--out", "runs/alone", "-q")[0] == 0
    assert not Path("runs/alone/results.json").exists()
    assert call(capsys, "eval", "alone", "-q")[0] == 0
    assert json.loads(Path("runs/alone/results.json").read_text())["toy.mse"] > 0
    Path("runs/alone/report.html").unlink()
    code, out, _ = call(capsys, "report", "runs/alone")
    assert code == 0 and Path(out.strip()).is_file()


def test_generate_takes_a_file_or_a_text(at_work, capsys):
    Path("text.txt").write_text("abc\n")
    for option in (["--text", "text.txt"], ["--prompt", "abc"]):
        code, out, _ = call(capsys, "generate", "runs/toy", *option)
        assert code == 0 and "rebuilt: cba" in out


def test_ask_and_diagnose(at_work, capsys):
    Path("text.txt").write_text("abc\n")
    code, out, _ = call(capsys, "ask", "runs/toy", "--text", "text.txt", "--question", "How long?")
    assert (code, out) == (0, "How long? 3\n")
    code, out, _ = call(capsys, "diagnose", "runs/toy", "--out", "d.json")
    assert code == 0 and "healthy" in out and "findings:\n  seed 0\n  none\n" in out
    assert json.loads(Path("d.json").read_text())["telemetry.norm"] == 1.0


@pytest.fixture
def three_runs(at_work):
    """Copies of the run whose diagnosis depends on their seed: 0, 1 and 5."""
    for seed in (0, 1, 5):
        folder = Path(f"many/run{seed}")
        if not folder.exists():
            shutil.copytree("runs/toy", folder)
            (folder / "config.yaml").write_text(dump_yaml({**TOY, "seed": seed}))
    Path("many/run9_notes.txt").touch()  # matches the glob, but is no run


def test_diagnose_of_several_runs_is_mean_and_std(three_runs, capsys):
    # The glob names run1 a second time: it counts once.
    names = ["many/run1", "many/run*"]
    code, out, _ = call(capsys, "diagnose", *names, "--out", "all.json")
    assert code == 0 and "many/run5: seed 5" in out
    found = json.loads(Path("all.json").read_text())
    assert found["runs"] == 3
    assert found["telemetry.norm"] == pytest.approx(3.0)  # of 1, 2 and 6
    assert found["telemetry.norm.std"] == pytest.approx(7**0.5)
    said = ["run1: seed 1", "run0: seed 0", "run0: none", "run5: seed 5"]
    assert found["findings"] == [f"many/{line}" for line in said]
    assert not [name for name in found if name.startswith("only") or name.endswith(".std.std")]


def test_diagnose_of_a_glob_with_one_run_is_that_of_the_run(three_runs, capsys):
    assert call(capsys, "diagnose", "many/run[5]", "--out", "one.json")[0] == 0
    found = json.loads(Path("one.json").read_text())
    assert found["telemetry.norm"] == 6.0 and "runs" not in found


def test_configurations_are_diagnosed_side_by_side(three_runs, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree("runs/toy", other)
    tree = {**TOY, "name": "<other>", "train": {**TOY["train"], "log_every": 3}, "seed": 3}
    (other / "config.yaml").write_text(dump_yaml(tree))
    code, out, _ = call(capsys, "diagnose", "many/run*", str(other), "--out", "both.json")
    assert code == 0 and "Norms [nats]" in out
    assert "│ toy     │ 3.0 ± 2.6 │" in out and "│ <other> │ 4.0 ± 9.0 │" in out
    assert "  toy: many/run5: seed 5\n" in out and "  <other>: seed 3\n" in out
    written = json.loads(Path("both.json").read_text())
    assert written["tables"]["Norms [nats]"]["toy"]["norm"] == pytest.approx([3.0, 7**0.5])
    assert written["found"]["toy"]["toy.mse"] == written["found"]["<other>"]["toy.mse"]
    page = Path("both.html").read_text()
    assert "<td>3.0 ± 2.6</td>" in page and "<td>&lt;other&gt;</td>" in page
    # Of one configuration there is nothing to compare.
    assert call(capsys, "diagnose", "many/run*", "--out", "seeds.json")[0] == 0
    assert not Path("seeds.html").exists()


@pytest.mark.parametrize("name", ["many/run1", "many/run*"])
def test_diagnose_writes_into_a_folder(three_runs, capsys, name, tmp_path):
    assert call(capsys, "diagnose", name, "--out", str(tmp_path))[0] == 0
    assert json.loads((tmp_path / "diagnose.json").read_text())["telemetry.norm"] > 0
    assert call(capsys, "diagnose", name, "--out", str(tmp_path / "new" / "d.json"))[0] == 0
    assert (tmp_path / "new" / "d.json").is_file()


def test_a_glob_without_a_run_is_one_line(three_runs, capsys):
    code, _, err = call(capsys, "diagnose", "many/run1", "nothing*")
    assert code == 2 and one_line(err) and "nothing*: no run matches" in err


def test_bench_and_config_list_what_there_is(at_work, capsys):
    code, out, _ = call(capsys, "bench")
    assert code == 0 and "backbone" in out
    assert call(capsys, "config")[0] == 0


def test_info(at_work, capsys, monkeypatch):
    monkeypatch.setenv("LATENT_JAX_DATA", "nowhere")
    code, out, _ = call(capsys, "info")
    assert code == 0
    assert "jax" in out and "smollm2" in out and "no such folder" in out


BAD = {
    "no such config": (["run", "nope.yaml"], "nope.yaml"),
    "unknown key": (["run", "toy.yaml", "--set", "train.stps=3"], "train.stps"),
    "nearest key": (["run", "toy.yaml", "--set", "train.stps=3"], "steps"),
    "wrong type": (["run", "toy.yaml", "--set", "train.steps=many"], "train.steps"),
    "no equals sign": (["run", "toy.yaml", "--set", "train.steps"], "train.steps"),
    "negative seed": (["run", "toy.yaml", "--seed", "-1"], "seed"),
    "seed of text": (["run", "toy.yaml", "--seed", "x"], "--help"),
    "another config": (["run", "toy.yaml", "--set", "train.steps=9"], "train.steps: 6 → 9"),
    "mesh": (["run", "toy.yaml", "--out", "runs/m", "--set", "mesh.tensor=7"], "mesh"),
    "no gpu": (["run", "toy.yaml", "--out", "runs/m", "--set", "mesh.require=tpu"], "tpu"),
    "no such run": (["eval", "runs/nope"], "runs/nope"),
    "no run there": (["report", "."], "config.yaml"),
    "no such checkpoint": (["eval", "runs/toy", "--checkpoint", "5"], "'5'"),
    "no such hook": (["generate", "runs/mute"], "cannot generate"),
    "needed option": (["generate", "runs/toy"], "--prompt"),
    "useless option": (["generate", "runs/toy", "--max-new-tokens", "3"], "--max-new-tokens"),
    "no numbers": (["generate", "runs/toy", "--temperature", "warm"], "--temperature warm"),
    "no raw bytes": (["generate", "runs/toy", "--prompt", "a", "--raw"], "--raw"),
    "two texts": (["generate", "runs/toy", "--prompt", "a", "--text", "toy.yaml"], "one of them"),
    "no text": (["ask", "runs/toy", "--text", "no.txt", "--question", "?"], "no.txt"),
    "empty text": (["ask", "runs/toy", "--text", "empty.txt", "--question", "?"], "empty"),
    "empty question": (["ask", "runs/toy", "--text", "toy.yaml", "--question", " "], "question"),
    "not text": (["ask", "runs/toy", "--text", "binary", "--question", "?"], "UTF-8"),
    "missing option": (["ask", "runs/toy", "--text", "toy.yaml"], "question"),
    "hook complains": (["ask", "runs/toy", "--text", "nothing.txt", "--question", "?"], "nothing"),
    "unknown benchmark": (["bench", "nope"], "nope"),
    "unknown asset": (["fetch", "smolm2"], "smollm2"),
    "unknown command": (["rnu"], "rnu"),
    "bad data file": (["data", "check", "toy.yaml"], "toy.yaml"),
    "disk full": (["run", "toy.yaml", "--out", "runs/e", "--set", "error=disk"], "/somewhere/file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(at_work, capsys, case):
    Path("empty.txt").write_text(" \n")
    Path("binary").write_bytes(b"\xff\xfe\x00\x80")
    Path("nothing.txt").write_text("nothing")
    args, told = BAD[case]
    code, _, err = call(capsys, *args, *(["-q"] if args[0] in ("run", "eval") else []))
    assert code == 2, err
    assert one_line(err), err
    assert told in err
    assert not Path("runs/m").exists()


def test_interrupt_is_130(at_work, capsys):
    code, _, err = call(
        capsys, "run", "toy.yaml", "-q", "--out", "runs/e2", "--set", "error=interrupt"
    )
    assert code == 130 and one_line(err)


def test_a_bug_keeps_its_traceback(at_work):
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "toy.yaml", "-q", "--out", "runs/e3", "--set", "error=bug"])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_refusals_of_the_system_name_the_path(code):
    text = errors.explain(OSError(code, os.strerror(code), "some/path"))
    assert text.startswith(f"some/path: {os.strerror(code)}")
    assert ("make room" in text) == (code == errno.EDQUOT)


def test_out_of_memory_says_what_to_lower():
    assert "train.batch_size" in errors.explain(RuntimeError("RESOURCE_EXHAUSTED: 8 GB"))
    assert errors.explain(RuntimeError("anything else")) is None


def test_read_only_directory(at_work, capsys):
    if os.geteuid() == 0:
        # Root may write anywhere; a file in the way of the directory is refused all the same.
        Path("locked").write_text("")
    else:
        Path("locked").mkdir(mode=0o555)
    code, _, err = call(capsys, "run", "toy.yaml", "-q", "--out", "locked/run")
    assert code == 2 and one_line(err) and "locked" in err


def test_sigterm_saves_and_the_same_command_resumes(at_work):
    command = [sys.executable, "-m", "latent_jax.cli", "run", "toy.yaml", "--out", "runs/term",
               "--set", "train.steps=100000", "--set", "train.log_every=50"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step "):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    assert process.returncode == 75, rest
    assert "run the same command again to resume" in rest.splitlines()[-1]
    saved = [int(p.name) for p in Path("runs/term/checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) < 100000
