"""Tables of counterfactual utilities: Parquet, one row per action, with where they come from.

A snapshot is a working context at a place of a stored history. Its rows are in the order of its
nodes; a node without a measured action (the protected tail) has one row of kind 0, so that the
rows of a snapshot are its tiling too. Losses belong to the gists that they were measured with: a
table of other gists is refused, and so is one of another history.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from latent_jax.core import files
from latent_jax.core.errors import StoreError
from latent_jax.systems.megacontext.counterfactual import Action, Measured
from latent_jax.systems.megacontext.layout import Layout
from latent_jax.systems.megacontext.memory import Node
from latent_jax.systems.megacontext.store import GistTree
from latent_jax.systems.megacontext.utilities import utilities

_FORMAT = 1
_KEY = b"latent_jax.labels"
_COLUMNS = {
    "snapshot": "int32", "first": "int64", "cursor": "int32", "budget": "int32",
    "policy": "string", "at": "int32",
    "level": "int8", "index": "int64", "kind": "int8", "entries": "int32", "span": "int32",
    "horizon": "int32", "nll": "float32", "delta_nll": "float32", "delta_kl": "float32",
    "drop_delta_nll": "float32",
}  # fmt: skip


class Snapshot(NamedTuple):
    """A labelled working context.

    Attributes:
      first: block of the store at which its history begins; nodes are counted from there.
      cursor: blocks of history before it.
      level: of its nodes, in the order of the history.
      index: of its nodes.
      utility: signed label, see `utilities`.
      measured: which nodes have one.
    """

    first: int
    cursor: int
    level: Int[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]
    utility: Float[np.ndarray, " n"]
    measured: Bool[np.ndarray, " n"]


def history_digest(tree: GistTree, tokens: int) -> str:
    """Names the first tokens of a history; it stays the same when more are appended."""
    found, step = hashlib.sha256(), 1 << 20
    for start in range(0, tokens, step):
        ids = tree.tokens(start, min(start + step, tokens))
        found.update(np.ascontiguousarray(ids, "<i4").tobytes())
    return found.hexdigest()[:16]


def rows(
    number: int, first: int, cursor: int, budget: int, policy: str, horizon: int,
    nodes: Sequence[Node], todo: Sequence[Action], found: Measured,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one snapshot.

    Args:
      nodes: all of the tiling, its tail among them.
      todo: actions, in the order of ``found``.
    """
    by_place: dict[int, list[int]] = {}
    for i, action in enumerate(todo):
        by_place.setdefault(action.at, []).append(i)
    out = []
    for at, (level, index) in enumerate(nodes):
        head = {
            "snapshot": number, "first": first, "cursor": cursor, "budget": budget,
            "policy": policy, "at": at, "level": level, "index": index, "horizon": horizon,
            "nll": found.nll,
        }  # fmt: skip
        for i in by_place.get(at, ()):
            out.append(head | {
                "kind": todo[i].kind, "entries": todo[i].entries, "span": todo[i].span,
                "delta_nll": found.delta_nll[i], "delta_kl": found.delta_kl[i],
                "drop_delta_nll": found.drop_delta_nll[i],
            })  # fmt: skip
        if at not in by_place:
            nothing = dict.fromkeys(("delta_nll", "delta_kl", "drop_delta_nll"), float("nan"))
            out.append(head | {"kind": 0, "entries": 0, "span": 0} | nothing)
    return out


def write(path: str | Path, table: list[dict[str, Any]], provenance: dict[str, Any]) -> Path:
    """Writes a table with its provenance in the file's metadata.

    Raises:
      RunError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.array([row[name] for row in table], getattr(pa, kind)())
        for name, kind in _COLUMNS.items()
    }
    made = pa.table(columns).replace_schema_metadata(
        {_KEY: json.dumps({"format": _FORMAT, **provenance})}
    )
    data = io.BytesIO()
    pq.write_table(made, data)
    files.make_dir(Path(path).parent)
    return files.write_bytes(path, data.getvalue())


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns and provenance of a table.

    Raises:
      StoreError: there is no such file, or it is not such a table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise StoreError(f"{path}: no such table of utilities; `latent-jax mega label` makes one")
    try:
        table = pq.read_table(path)
        provenance = json.loads((table.schema.metadata or {})[_KEY])
        columns = {name: table[name].to_numpy() for name in _COLUMNS}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{path}: not a table of utilities ({reason})") from None
    if provenance.get("format") != _FORMAT:
        raise StoreError(
            f"{path}: a table of format {provenance.get('format')}, this library reads {_FORMAT}: "
            "run `latent-jax mega label` again"
        )
    return columns, provenance


def check(
    path: str | Path, provenance: dict[str, Any], tree: GistTree, version: str, reader: str
) -> None:
    """Refuses a table that was measured with other gists, another reader or on another history.

    Args:
      path: of the table, for the message.
      provenance: from `read`.
      tree: the history that its places are in.
      version: digest of the GistNet that is in use now.
      reader: what reads behind contexts now (`memory.reader_version`).

    Raises:
      StoreError: stale, or of another store.
    """
    if provenance["gists"] != version:
        raise StoreError(
            f"{path}: stale: measured with gists of version {provenance['gists']}, those in use "
            f"are {version}: run `latent-jax mega label` again"
        )
    # Tables without a reader are older than readers that are not frozen.
    if (read := provenance.get("reader", "frozen")) != reader:
        raise StoreError(
            f"{path}: stale: measured with the reader {read}, that in use is {reader}: run "
            "`latent-jax mega label` again"
        )
    tokens = provenance["tokens"]
    if tokens > len(tree) or history_digest(tree, tokens) != provenance["history"]:
        raise StoreError(f"{path}: measured on another history than that of {tree.path}")


def snapshots(columns: dict[str, np.ndarray], layout: Layout) -> list[Snapshot]:
    """The labelled contexts of a table."""
    number = columns["snapshot"]
    edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1))
    return [
        _snapshot({name: x[a:b] for name, x in columns.items()}, layout)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]


def _snapshot(part: dict[str, np.ndarray], layout: Layout) -> Snapshot:
    at, kind = part["at"], part["kind"]
    places = np.unique(at, return_index=True)[1]
    level, index = part["level"][places].astype(int), part["index"][places].astype(int)
    done = np.flatnonzero(kind)
    # The size of a group is all that a label asks of the nodes.
    todo = [
        Action(
            int(at[i]), int(kind[i]), int(part["entries"][i]), int(part["span"][i]),
            [(0, 0)] * (layout.branching if kind[i] < 0 and part["level"][i] else 1), [],
        )
        for i in done
    ]  # fmt: skip
    utility, measured = utilities(layout, len(places), todo, part["delta_nll"][done])
    first, cursor = int(part["first"][0]), int(part["cursor"][0])
    return Snapshot(first, cursor, level, index, utility, measured)
