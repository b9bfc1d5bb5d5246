"""Processes that write to a store until they are killed; see `test_crash`.

Started once, it reads lines ``<store> <seed>`` and forks a writer for each, which appends pieces
of `stream(…, seed)`, builds gists and now and then changes the gist version. The writer says
``pid <n>``, ``open``, and ``flushed <tokens>`` after each flush; its parent ``dead`` at its end.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from latent_jax.systems.megacontext.store import GistTree, build
from tests.systems.megacontext.store.gist_store import SMALL, gists_of, stream


def write(path: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with GistTree.open(path, writable=True) as tree:
        if not tree.version:
            tree.set_version("v1")
        say("open")
        while True:
            for _ in range(int(rng.integers(1, 6))):
                count = int(rng.integers(1, 200))
                start = len(tree)
                ids = stream(start, start + count, seed)
                if rng.random() < 0.5:
                    tree.append(ids)
                else:
                    tree.add_document(f"{seed}/{start}", f"{seed}", ids)
                if rng.random() < 0.7:
                    build(tree, gists_of(SMALL, tree.version), batch=int(rng.choice([1, 8])))
            if rng.random() < 0.3:
                # Stale gists are written over in place: the hardest thing to be killed in.
                tree.set_version("v2" if tree.version == "v1" else "v1")
                build(tree, gists_of(SMALL, tree.version), limit=int(rng.integers(1, 300)))
            tree.flush()
            say(f"flushed {len(tree)}")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    for line in sys.stdin:
        path, seed = line.rsplit(" ", 1)
        child = os.fork()
        if not child:
            try:
                say(f"pid {os.getpid()}")
                write(path, int(seed))
            except BaseException as error:
                say(f"failed {error!r}")
            os._exit(1)
        os.waitpid(child, 0)
        say("dead")


if __name__ == "__main__":
    main()
