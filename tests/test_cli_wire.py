"""`latent-jax compress | reconstruct | ask` on an untrained compressor of the packaged reader."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_jax import backbones, cli
from latent_jax.core.config import dump_yaml
from latent_jax.systems.latentwire.assets import save_compressor
from latent_jax.systems.latentwire.config import EncoderConfig, ModelConfig
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.wire import Origin, pack
from tests.toy_cli import TOY

TEXT = "The mill at Dunmore burned down in 1911.\n"


def compressor(folder: Path, seed: int) -> None:
    reader = backbones.load("tiny")
    config = ModelConfig(ratio=4, segment=8, encoder=EncoderConfig(lora_rank=2))
    model, ids = Compressor(config, reader.config, 0), np.zeros((1, 8), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), reader.params, ids, ids == 0)["params"]
    draw = np.random.default_rng(seed).standard_normal
    weights = jax.tree.map(lambda s: 0.1 * draw(s.shape).astype(np.float32), shapes)
    save_compressor(folder, weights, config, reader, (), {})


@pytest.fixture(scope="module")
def at_work(tmp_path_factory):
    """A folder with two compressors, a text, a run of another system, and a foreign wire."""
    folder = tmp_path_factory.mktemp("wires")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        compressor(folder / "first", 0)
        compressor(folder / "second", 1)
        Path("text.txt").write_text(TEXT)
        Path("runs/toy/checkpoints").mkdir(parents=True)
        Path("runs/toy/config.yaml").write_text(dump_yaml(TOY))
        Path("broken.wire").write_bytes(b"\x89LWIRE\r\n" + b"x" * 50)
        yield folder


def call(capsys, *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(args))
    return (code, *capsys.readouterr())


@pytest.fixture(scope="module")
def sent(at_work):
    args = ["compress", "first", "--text", "text.txt", "--out", "out/mill.wire"]
    assert cli.main(args) == 0
    return "out/mill.wire"


def test_compress_says_what_it_takes_and_saves(sent, capsys):
    code, out, _ = call(
        capsys, "compress", "first", "--text", "text.txt", "--out", "again.wire", "--bits", "int8"
    )
    assert code == 0
    total = int(re.search(r"bytes: ([\d,]+) = header", out)[1].replace(",", ""))
    assert total == Path("again.wire").stat().st_size < Path(sent).stat().st_size / 3
    assert f"the text has {len(TEXT) - 1} in UTF-8" in out and "gzipped" in out
    assert "keys and values instead of" in out and "saved: key/value memory" in out


def test_a_stored_wire_is_asked_and_rebuilt(sent, capsys):
    code, asked, _ = call(capsys, "ask", sent, "--question", "When?")
    assert code == 0
    assert call(capsys, "ask", "first", "--text", "text.txt", "--question", "When?") == (
        0, asked, ""
    )  # fmt: skip


BAD = {
    "no such compressor": (["compress", "third", "--text", "text.txt", "--out", "z"], "third: no"),
    "another system": (["compress", "toy", "--text", "text.txt", "--out", "z"], "compresses no"),
    "no such format": (["compress", "first", "--text", "text.txt", "--out", "z", "--bits", "int3"],
                       "no wire format 'int3'; known"),
    "no text": (["compress", "first", "--text", "no.txt", "--out", "z"], "no.txt"),
    "ratio": (["compress", "first", "--text", "text.txt", "--out", "z", "--ratio", "0.2"],
              "at least 1 token"),
    "broken": (["reconstruct", "broken.wire"], "broken.wire: wire version"),
    "no wire": (["reconstruct", "text.txt"], "not a stored wire"),
    "no file": (["reconstruct", "nothing.wire"], "nothing.wire: No such file"),
    "other encoder": (["ask", "out/mill.wire", "--question", "?", "--compressor", "second"],
                      "made by the encoder first"),
    "text twice": (["ask", "out/mill.wire", "--question", "?", "--text", "text.txt"],
                   "holds its text already"),
    "compressor without text": (["ask", "first", "--question", "?"], "--text is missing"),
    "gone": (["reconstruct", "gone.wire"], "name its compressor with --compressor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(sent, capsys, case):
    if case == "gone":
        z = np.zeros((1, 1, 4), np.float32), np.ones((1, 1), bool), np.array([[1]]), np.array([4])
        from latent_jax.systems.latentwire.model import Wire

        origin = Origin("elsewhere", "0" * 64, "tiny", "llama")
        Path("gone.wire").write_bytes(pack(Wire(*z), origin, 4, 8)[0])
    args, line = BAD[case]
    code, _, err = call(capsys, *args)
    assert code == 2 and line in err and err.count("\n") == 1 and "Traceback" not in err
    assert not Path("z").exists()


@pytest.mark.slow
def test_reconstruct_prints_each_text(at_work, capsys):
    texts = ["--text", "text.txt", "--text", "text.txt"]
    compressor(at_work / "rebuilding", 2)
    assert call(capsys, "compress", "rebuilding", *texts, "--out", "two.wire")[0] == 0
    code, out, _ = call(capsys, "reconstruct", "two.wire")
    assert code == 0 and out.startswith("[0]\n") and "[1]\n" in out
