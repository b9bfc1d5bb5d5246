"""A run small enough to train in seconds."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from latent_jax import run as runs

TEXT = b"the cat sat on a mat and"

_TINY = {
    "system": "abstractinator", "name": "t",
    "segments": {"rule": "space", "longest": 6, "budget": 8},
    "level": {
        "width": 16, "heads": 2, "ff": 32, "compressor_layers": 1, "reach": 8, "queries": 4,
        "row_width": 16, "expander_layers": 1, "lookback": 1, "codes": 16, "stages": 3,
        "vq": {"reset": {"stale": 5}},
    },
    "top": {"layers": 1, "width": 16, "heads": 2, "ff": 32},
    "byte_lm": {"layers": 1, "width": 16, "heads": 2, "ff": 32},
    "data": {"text": "pydoc", "window": 24},
    "train": {
        "steps": 240, "batch_size": 32, "log_every": 10, "log": {"tensorboard": False},
        "optimizer": {"lr": 0.01, "warmup_steps": 10, "weight_decay": 0.01},
        "phases": [
            {"name": "level0", "steps": 140, "data": "level0", "train": ["compressor", "expander"]},
            {"name": "top", "steps": 50, "data": "top", "train": ["top"]},
            {"name": "peer", "steps": 0, "data": "byte_lm", "train": ["byte_lm"]},
        ],
    },
    "eval": {
        "windows": 96, "batch_size": 32, "quick": 8, "continuation": 0, "token_lm": None,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Makes the tree of a tiny run's config, with some sections changed."""

    def make(**sections: Any) -> dict[str, Any]:
        tree = copy.deepcopy(_TINY)
        for name, value in sections.items():
            tree[name] = tree[name] | value if isinstance(tree.get(name), dict) else value
        return tree

    return make


@pytest.fixture(scope="session")
def made(tiny):
    """System, variables with codes at every stage, a batch of two windows."""
    tree = tiny()
    tree["level"]["vq"] = {"init": "random"}
    system = runs.system_class("abstractinator")(runs.resolve(tree))
    ids = jnp.asarray([list(TEXT), list(TEXT[::-1])], jnp.int32)
    batch = {"ids": ids, "there": jnp.ones(ids.shape, bool)}
    variables = jax.jit(lambda key: system.init({"params": key}, batch))(jax.random.key(0))
    # The head starts at zero, which would hide what the row model reads.
    top = variables["params"]["top"]
    top["head"] = 0.3 * jax.random.normal(jax.random.key(1), top["head"].shape)
    return system, variables, batch
