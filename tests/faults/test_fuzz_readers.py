"""Damaged files of every kind: the right value or one clear line, soon, in little memory.

Where a format has a checksum, what is read must equal what was written; where it has none, it must
be a whole value of its kind (shapes, types). ``-s`` shows what came of how many files.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import lzma
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from latent_jax.backbones import ByteTokenizer, save_hf
from latent_jax.backbones.readers import gguf, hf, llama2c, table
from latent_jax.core.trees import flatten
from latent_jax.data import zero_files
from latent_jax.data.squad import QAExample, load_squad
from latent_jax.systems.latentwire import wire
from latent_jax.systems.latentwire.model import Wire
from tests.backbones.test_readers import make, write_gguf
from tests.faults.damage import Tally, damaged

FEW, MANY = 60, 2000
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}
ZEROS = np.cumsum(np.linspace(1.0, 2.0, 200)) + 14.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      name: of the damaged file, in a directory with ``beside``.
      write: puts whole files into a directory.
      read: the library's reader, of the file or its directory.
      right: whether a value may come of damage.
      front: bytes that hold the structure.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    right: Callable[[Any, Any], bool]
    front: int = 0


def same(got: Any, whole: Any) -> bool:
    """Equal, arrays and all."""
    if isinstance(whole, tuple | list):
        return len(got) == len(whole) and all(map(same, got, whole))
    if isinstance(whole, dict):
        return got.keys() == whole.keys() and all(same(got[k], whole[k]) for k in whole)
    if hasattr(whole, "shape"):
        return np.array_equal(np.asarray(got), np.asarray(whole))
    return got == whole


@functools.cache
def small():
    """A language model of 259 tokens and one narrow layer."""
    return make("llama", num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8,
                intermediate_size=16, max_position=64)  # fmt: skip


def whole_model(got: Any, _: Any) -> bool:
    """Every parameter that the config implies, in its shape; a tokenizer that works."""
    config, params, tokenizer, _ = got
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    tokenizer.decode(tokenizer.encode("a text")[:4])
    return shapes == dict(table.expected_shapes(config))


def write_llama2c(folder: Path) -> None:
    """One narrow layer, and a vocabulary of 259 + 5 pieces."""
    dim, hidden, heads, vocab, length = 8, 12, 2, 264, 16
    header = struct.pack("<7i", dim, hidden, 1, heads, heads, vocab, length)
    count = vocab * dim + 3 * dim + 4 * dim * dim + 3 * dim * hidden + length * (dim // heads)
    weights = np.linspace(-1, 1, count, dtype="<f4")
    (folder / "model.bin").write_bytes(header + weights.tobytes())
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), *"abcde"]
    rows = b"".join(struct.pack("<fi", -i, len(p)) + p.encode() for i, p in enumerate(pieces))
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 12) + rows)


def squad_text() -> bytes:
    paragraphs = [
        {"context": f"Passage {n}: the fox is red, the hén is brown.",
         "qas": [{"id": f"q{n}", "question": "What is the fox?",
                  "answers": [{"text": "red", "answer_start": 23}]}]}
        for n in range(4)
    ]  # fmt: skip
    return json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}).encode()


def good_examples(got: Any, _: Any) -> bool:
    return bool(got) and all(
        isinstance(e, QAExample) and e.question.strip() and e.answers
        and all(e.context[s:].startswith(a) for a, s in zip(e.answers, e.starts, strict=True))
        for e in got
    )  # fmt: skip


def one_row(got: Any, _: Any) -> bool:
    base, offset = got
    return isinstance(base, float) and offset.ndim == 1 and offset.dtype == np.float64


def write(name: str, data: Callable[[], bytes]) -> Callable[[Path], None]:
    """Writes one file into a directory."""

    def into(folder: Path) -> None:
        (folder / name).write_bytes(data())

    return into


def a_table() -> bytes:
    return zlib.compress(pickle.dumps(ZEROS.tolist(), 2))


def write_gguf_model(folder: Path) -> None:
    write_gguf(folder / "m.gguf", *small())


def write_hf_model(folder: Path) -> None:
    save_hf(folder, *small(), ByteTokenizer())


def a_wire(folder: Path) -> None:
    """Latents of two texts, 11 and 4 tokens."""
    mask, where = wire.places([11, 4], 16, 4.0, 8)
    z = np.random.default_rng(0).normal(size=(*mask.shape, 6)).astype(np.float32)
    stored = Wire(z, mask, where.astype(np.int32), np.asarray([11, 4], np.int32))
    origin = wire.Origin("tiny", "e" * 64, "reader", "llama")
    (folder / "some.wire").write_bytes(wire.pack(stored, origin, 4.0, 8, "int8", 4)[0])


def unpacked(path: Path) -> Any:
    got, header, parts = wire.unpack(wire.read_bytes(path), name=str(path))
    return jax.tree.map(np.asarray, tuple(got)), header, parts


def beside(read: Callable[[Path], Any], name: str = "") -> Callable[[Path], Any]:
    """Reads another file of the same directory, or the directory."""
    return lambda path: read(path.parent / name)


def read_all(path: Path) -> Any:
    return load_squad(str(path), "all")


def gaps_or_none(got: Any, whole: Any) -> bool:
    return got is None or same(got, whole)


KINDS = {
    "GGUF header": Kind("m.gguf", write_gguf_model, gguf.read, whole_model, front=9000),
    "GGUF first fields": Kind("m.gguf", write_gguf_model, gguf.read, whole_model, front=700),
    "llama2.c": Kind("model.bin", write_llama2c, llama2c.read, whole_model, front=28),
    "llama2.c vocabulary": Kind(
        "tokenizer.bin", write_llama2c, beside(llama2c.read, "model.bin"), whole_model
    ),
    "safetensors": Kind(
        "model.safetensors", write_hf_model, beside(hf.read), whole_model, front=1200
    ),
    "config.json": Kind("config.json", write_hf_model, beside(hf.read), whole_model),
    "tokenizer.json": Kind("tokenizer.json", write_hf_model, beside(hf.read), whole_model, 1500),
    "tokenizer_config.json": Kind(
        "tokenizer_config.json", write_hf_model, beside(hf.read), whole_model
    ),
    "wire": Kind("some.wire", a_wire, unpacked, same),
    "SQuAD": Kind("qa.json", write("qa.json", squad_text), read_all, good_examples),
    "SQuAD .gz": Kind(
        "qa.json.gz", write("qa.json.gz", lambda: gzip.compress(squad_text())), read_all, same
    ),
    "SQuAD .xz": Kind(
        "qa.json.xz", write("qa.json.xz", lambda: lzma.compress(squad_text())), read_all, same
    ),
    "zeros .sobj": Kind("z.sobj", write("z.sobj", a_table), zero_files.read_zeros, same),
    "zeros .npz": Kind(
        "z.npz", lambda d: zero_files.write_zeros(d / "z.npz", 0.0, ZEROS), zero_files.read_zeros,
        same,
    ),
    "zeros .npy": Kind(
        "z.npy", lambda d: zero_files.write_zeros(d / "z.npy", 0.0, ZEROS), zero_files.read_zeros,
        one_row, front=128,
    ),
    "zeros .txt": Kind(
        "z.txt", lambda d: zero_files.write_zeros(d / "z.txt", 0.0, ZEROS), zero_files.read_zeros,
        one_row,
    ),
    "gaps .npz": Kind(
        "g.npz", lambda d: zero_files.write_gaps(d / "g.npz", np.ones(40), 20),
        zero_files.read_gaps, gaps_or_none,
    ),
}  # fmt: skip


def fuzz(name: str, folder: Path, examples: int) -> None:
    kind = KINDS[name]
    kind.write(folder)
    path, tally = folder / kind.name, Tally(name)
    data, whole = path.read_bytes(), kind.read(path)
    assert kind.right(whole, whole)

    @settings(max_examples=examples, **QUICK)
    @given(damaged(data, kind.front))
    def one(changed):
        if changed != data:
            path.unlink()  # what is mapped stays as it was
            path.write_bytes(changed)
            tally.read(lambda: kind.read(path), lambda got: kind.right(got, whole))

    one()
    print(tally)
    assert tally.counts["refused"] > 0


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_one_line_or_harmless(name, tmp_path):
    fuzz(name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_much_damage_is_one_line_or_harmless(name, tmp_path):
    fuzz(name, tmp_path, MANY)
