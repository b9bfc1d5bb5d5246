"""A run small enough to train in seconds."""

from __future__ import annotations

import copy
from typing import Any

import pytest

_TINY = {
    "system": "abstractinator", "name": "t",
    "segments": {"rule": "space", "longest": 6, "budget": 8},
    "level": {
        "width": 16, "heads": 2, "ff": 32, "compressor_layers": 1, "reach": 8, "queries": 2,
        "row_width": 8, "expander_layers": 1, "lookback": 1, "codes": 16, "stages": 3,
        "vq": {"reset": {"stale": 5}},
    },
    "top": {"layers": 1, "width": 16, "heads": 2, "ff": 32},
    "data": {"text": "pydoc", "window": 24},
    "train": {
        "steps": 8, "batch_size": 8, "log_every": 4, "log": {"tensorboard": False},
        "optimizer": {"lr": 0.003, "weight_decay": 0.1},
        "phases": [
            {"name": "level0", "steps": 5, "data": "level0", "train": ["compressor", "expander"]},
            {"name": "top", "steps": 0, "data": "top", "train": ["top"]},
        ],
    },
    "eval": {"windows": 8, "batch_size": 8, "quick": 8},
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
