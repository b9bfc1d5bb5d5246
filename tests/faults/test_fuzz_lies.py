"""Files that are whole, with checksums that fit, and that lie: wrong types, counts, sizes, depths.

As a careless program or a malicious sender would write them. The right value or one clear line.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.backbones.readers import gguf, hf, llama2c
from latent_jax.backbones.readers.gguf_file import GGUFFile
from latent_jax.core.errors import UserError
from latent_jax.data.squad import load_squad
from latent_jax.systems.latentwire import wire
from latent_jax.systems.megacontext.store import GistTree, build, commits
from tests.faults.damage import LIES, Tally, bounded
from tests.faults.test_fuzz_readers import (
    QUICK,
    a_wire,
    good_examples,
    squad_text,
    unpacked,
    whole_model,
    write_gguf_model,
    write_hf_model,
    write_llama2c,
)
from tests.systems.megacontext.store.gist_store import SMALL, gists_of, stream

FEW, MANY = 60, 2000
NAN = float("nan")
ODD = (*LIES, -1, -(2**31), -(2**63), 10**30, 0.5, 1.5, -0.5, 1e-300, 1e300, float("inf"), NAN,
       None, True, False, "", "x", "\ud800", "\0", "9" * 50, [], [1], [[]], {}, {"a": 1},
       [None] * 3, ["x"] * 300)  # fmt: skip


@st.composite
def lying(draw, tree: Any):
    """A JSON tree with one to three values, keys or items replaced, doubled or left out."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            below = node[key]
            if isinstance(below, dict | list) and below and draw(st.integers(0, 3)):
                node = below
                continue
            kind = draw(st.sampled_from(("odd", "odd", "odd", "near", "gone", "more")))
            if kind == "gone":
                del node[key]
            elif kind == "more" and isinstance(node, list):
                node.insert(key, copy.deepcopy(below))
            elif kind == "more":
                node[key + "x"] = below
            elif kind == "near" and isinstance(below, int | float):
                node[key] = below + draw(st.sampled_from((-1, 1, 8, -8)))
            else:
                node[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            break
    return tree


def fuzz(name, tree, put, read, right, examples):
    """Reads what ``put`` writes of trees that lie."""
    tally = Tally(name)

    @settings(max_examples=examples, **QUICK)
    @given(lying(tree))
    def one(lies):
        put(lies)
        tally.read(read, right)

    put(tree)
    assert right(read())
    one()
    print(tally)
    assert tally.counts["refused"] > 0


# ---- how each kind is written --------------------------------------------------------------------

_CODES = {"u32": (4, "<I"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}


def gguf_value(kind: str, value: Any) -> bytes:
    """One value of a GGUF field, as far as the kind can hold it."""
    if kind == "text":
        raw = str(value).encode("utf-8", "replace")
        return struct.pack("<Q", len(raw)) + raw
    if kind.startswith("["):
        item = kind[1:]
        items = value if isinstance(value, list) else [value]
        number = 8 if item == "text" else _CODES[item][0]
        return struct.pack("<IQ", number, len(items)) + b"".join(gguf_value(item, i) for i in items)
    try:
        return struct.pack(_CODES[kind][1], value)
    except (struct.error, TypeError, OverflowError):
        return struct.pack("<Q", 2**63)[: struct.calcsize(_CODES[kind][1])]


def gguf_file(tree: dict[str, Any], path: Path, data: bytes) -> None:
    """Writes fields ``{name: {kind, value}}`` and tensors ``{name: {shape, kind, offset}}``."""
    fields, tensors = tree.get("fields"), tree.get("tensors")
    fields = fields if isinstance(fields, dict) else {}
    tensors = tensors if isinstance(tensors, dict) else {}
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, field in fields.items():
        kind = field["kind"] if isinstance(field, dict) and "kind" in field else "u32"
        if not isinstance(kind, str) or kind.strip("[") not in (*_CODES, "text"):
            kind = "[text"
        value = field.get("value") if isinstance(field, dict) else field
        number = 9 if kind.startswith("[") else 8 if kind == "text" else _CODES[kind][0]
        out += gguf_value("text", name) + struct.pack("<I", number) + gguf_value(kind, value)
    for name, tensor in tensors.items():
        tensor = tensor if isinstance(tensor, dict) else {}
        shape = tensor.get("shape")
        shape = shape if isinstance(shape, list) else [1]
        out += gguf_value("text", name) + struct.pack("<I", len(shape))
        out += b"".join(gguf_value("u64", n) for n in shape)
        out += gguf_value("u32", tensor.get("type", 0)) + gguf_value("u64", tensor.get("offset", 0))
    path.write_bytes(out + bytes(-len(out) % 32) + data)


def gguf_tree(path: Path) -> tuple[dict[str, Any], bytes]:
    """A GGUF file as the tree that `gguf_file` writes, and its tensors' bytes."""
    file, raw = GGUFFile(path), path.read_bytes()
    start = min(t.offset for t in file.tensors.values())
    kinds = {str: "text", int: "u32", float: "f32", bool: "bool"}
    fields = {}
    for name, value in file.metadata.items():
        many = isinstance(value, list | np.ndarray)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        kind = "[" + kinds[type(value[0])] if many else kinds[type(value)]
        fields[name] = {"kind": kind, "value": value}
    tensors = {
        t.name: {"shape": list(t.shape[::-1]), "type": int(t.kind), "offset": t.offset - start}
        for t in file.tensors.values()
    }
    return {"fields": fields, "tensors": tensors}, raw[start:]


@functools.cache
def parts_of_wire(folder: Path) -> tuple[dict[str, Any], bytes]:
    a_wire(folder)
    data = (folder / "some.wire").read_bytes()
    start = len(wire.SIGNATURE) + wire._PREAMBLE.size
    length = wire._PREAMBLE.unpack_from(data, len(wire.SIGNATURE))[1]
    return json.loads(data[start : start + length]), data[start + length : -wire._CHECKSUM]


def wire_file(header: Any, rest: bytes, path: Path) -> None:
    """A wire with this header, and a checksum that fits."""
    text = json.dumps(header).encode()
    made = wire.SIGNATURE + wire._PREAMBLE.pack(wire.VERSION, len(text)) + text + rest
    path.write_bytes(made + wire._digest(made))


def whole_wire(got: Any) -> bool:
    (z, mask, where, length, digits), header, _ = got
    return (
        z.shape[:2] == mask.shape == where.shape and len(length) == len(z) and digits is None
        and int(mask.sum()) == sum(header.latents) and np.isfinite(z).all()
    )  # fmt: skip


def a_store(path: Path) -> dict[str, Any]:
    with GistTree.create(path, SMALL) as tree:
        tree.set_version("v1")
        tree.add_document("a.txt", "0" * 64, stream(0, 50))
        build(tree, gists_of(SMALL))
    page = (path / commits.NAME).read_bytes()[commits._HEADER.size : commits.PAGE]
    return json.loads(page.rstrip(b"\0"))


def commit_file(tree: Any, path: Path) -> None:
    """Both pages with this description, and checksums that fit."""
    rest = json.dumps(tree).encode().ljust(commits.PAGE - commits._HEADER.size, b"\0")
    rest = rest[: commits.PAGE - commits._HEADER.size]
    page = commits._HEADER.pack(commits._MAGIC, zlib.crc32(rest)) + rest
    (path / commits.NAME).write_bytes(page + page)


def read_store(path: Path) -> Any:
    """All of a store."""
    with GistTree.open(path) as tree:
        if len(tree) > 10**6:  # nothing is wrong with a long history that lies on the disk
            return tree.tokens(0, 1), tree.levels
        gists = [tree.gists(level) for level in range(1, tree.levels + 1)]
        return tree.tokens(), gists, [d.path for d in tree.documents], tree.verify().lines()


def targets(folder: Path) -> dict[str, tuple]:
    """Per kind: tree, how it is written, how it is read, what may be read."""
    write_gguf_model(folder)
    fields, data = gguf_tree(folder / "m.gguf")
    model = folder / "hf"
    write_hf_model(model)
    header, rest = parts_of_wire(folder)
    store = folder / "store"
    page = a_store(store)
    (folder / "l").mkdir()
    write_llama2c(folder / "l")
    llama = folder / "l" / "model.bin"
    weights = llama.read_bytes()[28:]

    def llama_file(tree: list[int]) -> None:
        ints = [x if isinstance(x, int) and -(2**31) <= x < 2**31 else 0 for x in tree]
        llama.write_bytes(struct.pack(f"<{len(ints)}i", *ints) + weights)

    def json_at(path: Path):
        return json.loads(path.read_text()), lambda tree: path.write_text(json.dumps(tree))

    def model_right(got):
        return whole_model(got, None)

    qa = folder / "qa.json"
    tensors = model / "model.safetensors"
    raw = tensors.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)

    def tensor_file(tree: Any) -> None:
        text = json.dumps(tree).encode()
        aside = tensors.with_suffix(".new")
        aside.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        os.replace(aside, tensors)  # the old one may still be mapped

    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    found = {
        name: (*json_at(model / name), lambda: hf.read(model), model_right) for name in names
    }
    return found | {
        "GGUF": (
            fields, lambda tree: gguf_file(tree, folder / "m.gguf", data),
            lambda: gguf.read(folder / "m.gguf"), model_right,
        ),
        "safetensors": (
            json.loads(raw[8 : 8 + length]), tensor_file, lambda: hf.read(model), model_right,
        ),
        "llama2.c": (
            list(struct.unpack("<7i", struct.pack("<7i", 8, 12, 1, 2, 2, 264, 16))), llama_file,
            lambda: llama2c.read(llama), model_right,
        ),
        "wire": (
            header, lambda tree: wire_file(tree, rest, folder / "some.wire"),
            lambda: unpacked(folder / "some.wire"), whole_wire,
        ),
        "SQuAD": (
            json.loads(squad_text()), lambda tree: qa.write_text(json.dumps(tree)),
            lambda: load_squad(str(qa), "all"), lambda got: good_examples(got, None),
        ),
        "gist store": (
            page, lambda tree: commit_file(tree, store), lambda: read_store(store),
            lambda got: isinstance(got, tuple),
        ),
    }  # fmt: skip


NAMES = ("GGUF", "safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
         "llama2.c", "wire", "SQuAD", "gist store")  # fmt: skip


def deep(kind: str) -> bytes:
    """Lists in lists in lists, which recursive readers do not survive."""
    if kind == "GGUF":
        field = gguf_value("text", "a") + struct.pack("<I", 9)
        nested = field + struct.pack("<IQ", 9, 1) * 100_000
        return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + nested
    return b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("text", [b"deep", b"9" * 5000, b"null", b"[]", b"1", b'"x"', b"{}"])
def test_json_of_another_shape_is_one_line(text, tmp_path):
    text = deep("JSON") if text == b"deep" else text
    write_hf_model(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "qa.json"):
        (tmp_path / name).write_bytes(text)
        if name == "tokenizer_config.json" and text == b"{}":
            continue  # nothing special in it
        with bounded(), pytest.raises(UserError) as caught:
            load_squad(str(tmp_path / name)) if name == "qa.json" else hf.read(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        (tmp_path / name).write_bytes(before.get(name, b""))


def test_fields_in_fields_are_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(deep("GGUF"))
    with bounded(), pytest.raises(UserError, match="truncated or damaged GGUF header"):
        gguf.read(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_lies_are_one_line_or_harmless(name, tmp_path):
    fuzz(name, *targets(tmp_path)[name], FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_lies_are_one_line_or_harmless(name, tmp_path):
    fuzz(name, *targets(tmp_path)[name], MANY)
