"""Text files into a gist tree: each file once, in a fixed order, resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.systems.megacontext.store.tree import GistTree

# Long texts are tokenised in pieces, which bounds memory and keeps all cores busy.
_PIECE = 1 << 18
_FLUSH_EVERY = 1 << 18  # tokens: what an interruption can cost


class Encoder(Protocol):
    """The one thing this module needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without special tokens."""
        ...


@dataclasses.dataclass
class Ingested:
    """What `ingest` did.

    Attributes:
      added: files added, those that changed since an earlier time among them.
      unchanged: files that were there already.
      tokens: tokens added.
      skipped: (path, reason) of files that hold no text.
    """

    added: int = 0
    unchanged: int = 0
    tokens: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def find_files(root: str | Path, leave_out: Path | None = None) -> list[Path]:
    """Files below a directory by relative path, hidden ones and `leave_out` not among them.

    Raises:
      DataError: there is no such directory, or nothing in it.
    """
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; give one with text files")
    leave_out = leave_out.resolve() if leave_out else None
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [
            f for f in folders if not f.startswith(".") and (here / f).resolve() != leave_out
        ]
        found += [here / name for name in names if not name.startswith(".")]
    if not found:
        raise DataError(f"{root}: no files in it (hidden ones are not read)")
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def ingest(
    tree: GistTree,
    tokenizer: Encoder,
    root: str | Path,
    progress: Callable[[int, int, int], None] | None = None,
) -> Ingested:
    """Appends the text files below a directory, each as it is, with nothing between them.

    A file that is there already (same path below `root`, same sha256) is passed over, so that the
    same call continues after an interruption; one that has changed is appended again, for a
    history is never rewritten. Empty files and files that are not UTF-8 text are skipped.

    Args:
      tree: open for writing.
      tokenizer: of the model that the tree belongs to.
      root: directory, or one file.
      progress: called with (files done, files, tokens added so far) after each file.

    Raises:
      DataError: no such directory, or nothing in it.
      StoreError: the store refuses, or the disk is full.
    """
    root = Path(root)
    files = find_files(root, leave_out=tree.path)
    base = root.parent if root.is_file() else root
    known = {(document.path, document.sha256) for document in tree.documents}
    done, unflushed = Ingested(), 0
    for number, path in enumerate(files, 1):
        name = path.relative_to(base).as_posix()
        text, digest, reason = _read(path)
        if reason:
            done.skipped.append((name, reason))
        elif (name, digest) in known:
            done.unchanged += 1
        else:
            ids = [i for piece in tokenizer.encode_batch(list(_pieces(text))) for i in piece]
            document = tree.add_document(name, digest, np.asarray(ids, np.int32))
            done.added += 1
            done.tokens += document.stop - document.start
            unflushed += document.stop - document.start
            if unflushed >= _FLUSH_EVERY:
                tree.flush()
                unflushed = 0
        if progress is not None:
            progress(number, len(files), done.tokens)
    tree.flush()
    return done


def _read(path: Path) -> tuple[str, str, str]:
    """Text, sha256, and the reason why it is none."""
    try:
        # A pipe or a device would be waited for forever.
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        return "", "", f"cannot be read ({error.strerror})"
    if data is None:
        return "", "", "no regular file"
    if not data.strip():
        return "", "", "empty"
    if b"\0" in data:
        return "", "", "binary"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", "", f"not UTF-8 text ({error.reason} at byte {error.start})"
    return text, hashlib.sha256(data).hexdigest(), ""


def _pieces(text: str) -> Iterator[str]:
    """Cuts after the last line break within reach, or where there is none."""
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
