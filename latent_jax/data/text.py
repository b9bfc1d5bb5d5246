"""Plain text: documents from several sources, cut into windows of token ids.

Sources: ``novels``, ``wikitext``, ``factbook``, ``state_union``, ``shakespeare``, ``code`` (in
the data root), ``pydoc`` (Python's own help topics), ``embedded`` and ``squad`` (the passages of
those questions), ``recall`` (facts that are asked for again later, in ``pydoc``; `data.recall`), a
local file, folder or glob of ``.txt``, and ``auto`` (``novels`` when the data root holds it, else
``pydoc``). `load_segments` takes several in equal shares: ``novels+pydoc``.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from latent_jax.core.errors import DataError
from latent_jax.data import files
from latent_jax.data.recall import load_recall
from latent_jax.data.squad import load_squad

ROOT_FILES = {
    "novels": "text/novels.jsonl.xz",
    "wikitext": "text/wikitext-103-test-documents.jsonl.xz",
    "factbook": "text/factbook.jsonl.xz",
    "state_union": "text/state_union.jsonl.xz",
    "shakespeare": "text/tinyshakespeare.txt.xz",
    "code": "code/python.jsonl.xz",
}
PASSAGES = ("embedded", "squad")
SOURCES = ("auto", *ROOT_FILES, "pydoc", *PASSAGES, "recall")


class Encoder(Protocol):
    """The one thing this module needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...


def load_texts(
    source: str = "auto", split: str = "train", root: str | os.PathLike | None = None
) -> list[str]:
    """Loads documents as plain text.

    A source with its own split (``novels``) keeps it; other collections hold out a tenth of their
    documents by hash of the name; a single document holds out its last tenth.

    Args:
        source: one of `SOURCES`, or a path or glob of text files (``.txt``, also ``.xz``/``.gz``).
        split: ``train``, ``validation`` or ``all``.
        root: data folder; default the environment variable ``LATENT_JAX_DATA``.

    Returns:
        The documents, in a fixed order.

    Raises:
        DataError: unknown source or split, unreadable or empty file.
    """
    files.check_split(split, source)
    if source == "auto":
        source = "novels" if files.has_file(ROOT_FILES["novels"], root) else "pydoc"
    if source in PASSAGES:
        # dict.fromkeys: each passage once, in order, although it has several questions
        return list(dict.fromkeys(e.context for e in load_squad(source, split, root)))
    if source == "pydoc":
        from pydoc_data.topics import topics

        return _by_name({name: str(text) for name, text in topics.items()}, split, source)
    if source.split(":")[0] == "recall":
        return [
            load_recall(source, part, " ".join(load_texts("pydoc", part)).split())
            for part in (("train", "validation") if split == "all" else (split,))
        ]
    if source in ROOT_FILES:
        path = files.in_root(ROOT_FILES[source], source, root)
        if source == "shakespeare":
            return _by_name({path.name: files.read_text(path)}, split, source)
        return _rows(path, split, source)
    return _local(source, split)


def _rows(path: Path, split: str, source: str) -> list[str]:
    """Documents of a JSON-lines file: by its ``split`` field, else by hash of the name."""
    rows = files.read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{path}: line {number}: field 'text' is missing or not a string")
    if all("split" in row for row in rows):
        texts = [r["text"] for r in rows if split in ("all", r["split"]) and r["text"].strip()]
        if not texts:
            raise DataError(f"{path}: no document of split '{split}'")
        return texts
    names = [str(r.get("id") or r.get("path") or r["text"][:80]) for r in rows]
    pairs = zip(names, rows, strict=True)
    # one number per row keeps documents with equal names apart
    named = {f"{name}#{i}": row["text"] for i, (name, row) in enumerate(pairs)}
    return _by_name(named, split, source)


def _by_name(documents: dict[str, str], split: str, source: str) -> list[str]:
    documents = {name: text for name, text in documents.items() if text.strip()}
    if not documents:
        raise DataError(f"text source '{source}': all documents are empty")
    if split == "all":
        return list(documents.values())
    if len(documents) == 1:
        (text,) = documents.values()
        # cut at a space, so that neither side has half a word
        cut = text.find(" ", int(len(text) * 0.9))
        cut = cut if cut > 0 else int(len(text) * 0.9)
        part = text[:cut] if split == "train" else text[cut:]
        if not part.strip():
            raise DataError(f"text source '{source}': too short to be split")
        return [part]
    held = files.held_out(list(documents))
    return [text for name, text in documents.items() if (name in held) == (split == "validation")]


def _local(source: str, split: str) -> list[str]:
    if not source.strip():
        raise DataError(
            f"text source '{source}' is empty: name a path or one of {', '.join(SOURCES)}"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if ".txt" in p.suffixes and p.is_file())
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [p for p in found if p.is_file()]
    if not found:
        raise DataError(
            f"text source '{source}': no such file, no .txt in it, and not one of "
            f"{', '.join(SOURCES)}"
        )
    return _by_name({str(p): files.read_text(p) for p in found}, split, source)


def segments(
    tokenizer: Encoder,
    texts: Sequence[str],
    length: int,
    max_segments: int | None = None,
    seed: int = 0,
    stride: int | None = None,
    continuation: int = 0,
) -> Int32[np.ndarray, "n w"]:
    """Windows of ``w = length + continuation`` tokens from random places of the texts.

    Texts are cut into blocks of characters at white space, the blocks are visited in an order
    drawn from `seed`, and only as many are tokenised as the windows asked for need: five thousand
    segments from a shelf of novels do not tokenise the shelf. Windows never overlap unless
    `stride` is shorter than a window, and never cross a block.

    Args:
        tokenizer: anything with ``encode(text) -> list[int]``.
        texts: documents.
        length: tokens to compress.
        max_segments: number of windows wanted; None for all. Fewer come back when the texts do
            not hold as many.
        seed: order of the blocks and offset of the windows in each.
        stride: tokens between starts of windows in one block; default the window's width.
        continuation: further tokens after `length`, as targets of continuation.

    Returns:
        Token windows in random order.

    Raises:
        DataError: no texts, impossible sizes, or every text shorter than one window.
    """
    width = length + continuation
    stride = width if stride is None else stride
    if length < 1 or continuation < 0 or stride < 1:
        raise DataError(
            f"segments: length={length}, continuation={continuation}, stride={stride}: length and "
            "stride must be at least 1, continuation at least 0"
        )
    if max_segments is not None and max_segments < 1:
        raise DataError(f"segments: max_segments={max_segments} must be at least 1")
    if not any(text.strip() for text in texts):
        raise DataError("segments: the text is empty")
    rng = np.random.default_rng([seed, width])
    blocks = _blocks(texts, size=max(512, 16 * width))
    windows: list[list[int]] = []
    longest = 0
    for index in rng.permutation(len(blocks)):
        which, start, end = blocks[index]
        ids = tokenizer.encode(texts[which][start:end])
        longest = max(longest, len(ids))
        if len(ids) < width:
            continue
        # spread what is left over before the first window, so that starts are not always aligned
        slack = (len(ids) - width) % stride
        offset = int(rng.integers(slack + 1))
        windows += [ids[s : s + width] for s in range(offset, len(ids) - width + 1, stride)]
        if max_segments is not None and len(windows) >= max_segments:
            break
    if not windows:
        raise DataError(
            f"segments: no text is long enough: {width} tokens are needed (length {length} + "
            f"continuation {continuation}), the longest has {longest}"
        )
    result = np.asarray(windows, np.int32)
    return result[rng.permutation(len(result))[:max_segments]]


def split_sources(source: str) -> list[str]:
    """The parts of ``a+b+c``; a path or glob that matches something is one part, with any ``+``.

    Raises:
        DataError: an empty part, or one named twice (its windows would be there twice).

    Example:
        >>> split_sources("novels + pydoc")
        ['novels', 'pydoc']
    """
    path = Path(source).expanduser()
    if not source.strip() or path.exists() or glob.glob(str(path), recursive=True):
        return [source]
    parts = [part.strip() for part in source.split("+")]
    if not all(parts):
        raise DataError(
            f"text source '{source}': nothing on one side of a '+': write a+b, "
            "or a path that exists"
        )
    if len(set(parts)) < len(parts):
        raise DataError(f"text source '{source}': a source is named twice; shares are equal")
    return parts


def load_segments(
    tokenizer: Encoder,
    source: str,
    split: str,
    length: int,
    max_segments: int,
    seed: int = 0,
    continuation: int = 0,
    root: str | os.PathLike | None = None,
) -> Int32[np.ndarray, "n w"]:
    """`segments` of one source, or of several in equal shares (``novels+pydoc``), mixed.

    Args:
        tokenizer: anything with ``encode(text) -> list[int]``.
        source: what `load_texts` takes, or several of them joined by ``+``.
        split: ``train``, ``validation`` or ``all``, of each source.
        length: tokens to compress.
        max_segments: number of windows wanted. A source that does not hold its share gives what it
            has, and the others no more than theirs.
        seed: order and places of the windows.
        continuation: further tokens after `length`.
        root: data folder; default the environment variable ``LATENT_JAX_DATA``.

    Returns:
        Token windows in random order.

    Raises:
        DataError: an empty part, or as `load_texts` and `segments`.
    """
    sources = split_sources(source)
    share = math.ceil(max_segments / len(sources))
    parts = [
        segments(
            tokenizer, load_texts(part, split, root), length, share,
            seed=seed, continuation=continuation,
        )
        for part in sources
    ]  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    windows = np.concatenate(parts)
    return np.random.default_rng([seed, 3]).permutation(windows)[:max_segments]


def _blocks(texts: Sequence[str], size: int) -> list[tuple[int, int, int]]:
    """(text, start, end) of blocks of about `size` characters, cut before white space."""
    blocks = []
    for which, text in enumerate(texts):
        start = 0
        while start < len(text):
            end = start + size
            # a tail shorter than half a block joins the last one
            if len(text) - end < size // 2:
                end = len(text)
            else:
                half = start + size // 2
                space = max(text.rfind(" ", half, end), text.rfind("\n", half, end))
                end = space if space > start else end
            blocks.append((which, start, end))
            start = end
    return blocks
